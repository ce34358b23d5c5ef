"""A causal language model in Lightning: its loss, its steps, its evaluation, its answers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.callbacks.spikes import SpikeGuard
from lit_adapters.evaluation import EvaluationSums
from lit_adapters.footprint import peak_bytes
from lit_adapters.generation import answer, generate
from lit_adapters.guards import PATIENCE, check_gradients, check_loss, check_tokens
from lit_adapters.losses import LossKind, TokenLoss
from lit_adapters.model_loss import ModelLoss
from lit_adapters.sharding import average_gradients, clips_itself, gradient_norm, inside
from lit_adapters.throughput import TokenWindow

Batch = Mapping[str, Any]
Row = dict[str, Any]

# What the model reads of a batch: a padded one has a mask, a packed one positions.
INPUTS = ("input_ids", "attention_mask", "position_ids")

# Sums over tokens would overflow fp16 gradients. The number of tokens in a window is known only at
# its end; a power of two near it changes no bit of the result.
LOSS_UNIT = 1024


class CausalLMModule(LightningModule):
    """What `AdapterFineTuneModule` does with its model, whatever is trained of it.

    The loss of an optimizer step is the mean over its trained tokens.

    Args:
        loss: Where the loss comes from, as in `ModelLoss`.
        max_new_tokens: Longest answer of `predict`, tokens.
    """

    model: PreTrainedModel
    packing_obstacle: str | None = "the model is not built yet"  # why batches have to be padded
    asks_spike_guard = True  # it knows the mean over tokens of a step, which callbacks do not

    def __init__(self, loss: LossKind, max_new_tokens: int) -> None:
        super().__init__()
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens} is below 1, and leaves no answer")
        self.model_loss = ModelLoss(loss)
        self.max_new_tokens = max_new_tokens
        self.evaluated = EvaluationSums()
        self.window = TokenWindow()
        self.overflows = 0  # optimizer steps in a row whose loss was not finite

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the model."""
        raise NotImplementedError

    def token_loss(self, batch: Batch, count_correct: bool = False) -> TokenLoss:
        """Run the model; the one place where the loss is computed.

        Args:
            batch: ``input_ids``, ``labels`` and either ``attention_mask`` or, if sequences follow
                each other in one row, ``position_ids``; all (batch, time) int64.
            count_correct: Whether to count the tokens that the model ranks first.
        """
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        labels = batch["labels"]
        return inside(
            self.model,
            lambda model: self.model_loss(
                model, {**inputs, "use_cache": False}, labels, count_correct
            ),
        )

    def nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed negative log likelihood (nats) and the number of trained tokens."""
        loss = self.token_loss(batch)
        return loss.nll, loss.tokens

    @property
    def searching(self) -> bool:
        """Whether Lightning's learning-rate finder is at work, with a schedule of its own."""
        schedules = (config.scheduler for config in self.trainer.lr_scheduler_configs)
        return any(".tuner." in type(schedule).__module__ for schedule in schedules)

    # --- training --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Forget a window that was broken off."""
        self.window, self.overflows = TokenWindow(), 0

    def on_train_epoch_start(self) -> None:
        """Do not count the pause between epochs as training time."""
        self.window.start()

    def on_validation_end(self) -> None:
        """Do not count validation as training time."""
        self.window.start()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the summed loss in units of `LOSS_UNIT` tokens.

        Callbacks see gradients in that unit until `on_before_optimizer_step` of this module has
        divided them by the tokens of the window.
        """
        nll, tokens = self.nll(batch)
        if self.searching:
            return nll / tokens.clamp(min=1)  # what a search compares must be a mean
        self.window.add(nll.detach(), tokens)
        return nll / LOSS_UNIT

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into the mean over the window's trained tokens, then log."""
        average_gradients(self.model)
        if self.searching:
            return
        nll, tokens, rate = self.window.close(self.trainer.strategy.reduce)
        total, count = torch.stack([nll, tokens]).tolist()  # one wait for the device, not two
        check_tokens(count, self.trainer.global_step)
        # Lightning divided each micro-batch by the accumulation, DDP and FSDP by the ranks.
        divided = LOSS_UNIT * self.trainer.accumulate_grad_batches * self.trainer.world_size
        gradients = [
            p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None
        ]
        check_gradients(gradients)
        torch._foreach_mul_(gradients, divided / count)
        loss, norm = nll / tokens, gradient_norm(self.model, gradients)
        left_out = [
            guard.leaves_out(self.trainer, loss, norm, count)
            for guard in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(guard, SpikeGuard)
        ]
        self.overflows = 0 if math.isfinite(total) else self.overflows + 1
        # A scaler leaves out steps of overflows in fp16; all of them would be a standstill.
        tolerated = PATIENCE - 1 if str(self.trainer.precision) == "16-mixed" else 0
        if not any(left_out) and self.overflows > tolerated:
            check_loss(total / count, self.trainer.global_step)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/grad_norm", norm)
        self.log("train/tokens_per_second", rate, prog_bar=True)
        self.log("lr", optimizer.param_groups[0]["lr"])
        self.log("memory/peak_mb", peak_bytes(self.device) / 1e6)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip; by norm under FSDP1 through its root, for no rank knows the norm by itself."""
        if gradient_clip_val is not None and not gradient_clip_val >= 0:
            raise ValueError(
                f"gradient_clip_val {gradient_clip_val} would turn gradients around; give the "
                "largest norm that they may have, such as 1.0, or null to clip none"
            )
        if gradient_clip_val and clips_itself(self.model) and gradient_clip_algorithm != "value":
            cast(Any, self.model).clip_grad_norm_(float(gradient_clip_val))
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, and free the gradients: Lightning's loop would hold them until the next forward."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.optimizer_zero_grad(epoch, batch_idx, cast(Optimizer, optimizer))

    # --- evaluation ------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget an evaluation that was broken off."""
        self.evaluated = EvaluationSums()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one batch to the sums of its loader; a search for a learning rate looks at none."""
        if not self.searching:
            self.evaluated.add(self.token_loss(batch, count_correct=True), dataloader_idx)

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log loss, perplexity and token accuracy over all tokens of all ranks."""
        trainer = self.trainer
        self._log_evaluation("val", trainer.val_dataloaders, len(trainer.num_val_batches))

    def on_test_epoch_end(self) -> None:
        """Log loss, perplexity and token accuracy over all tokens of all ranks."""
        trainer = self.trainer
        self._log_evaluation("test", trainer.test_dataloaders, len(trainer.num_test_batches))

    def _log_evaluation(self, stage: str, loaders: Any, count: int) -> None:
        """Log over all loaders; if they are several in a dictionary, over each by its name too."""
        if self.searching:
            return
        sums = self.evaluated.close(self.trainer.strategy.reduce, count)
        if sums[0].tokens == 0:
            raise RuntimeError(
                f"no token of the {stage} split is trained on: every label of its batches is "
                "-100; look at batch['labels']"
            )
        named = ["", *loaders] if isinstance(loaders, Mapping) and count > 1 else [""]
        for source, (nll, tokens, correct) in zip(named, sums, strict=False):
            if tokens == 0:  # of a source that limit_val_batches left out
                continue
            loss, suffix = nll / tokens, f"/{source}" if source else ""
            values = {"loss": loss, "perplexity": loss.exp(), "token_accuracy": correct / tokens}
            for name, value in values.items():
                # Equal on all ranks already; Lightning would warn that it might not be.
                bar = name == "loss" and not source
                self.log(f"{stage}/{name}{suffix}", value, prog_bar=bar, sync_dist=True)

    def predict_step(self, batch: Batch | Sequence[Row], batch_idx: int) -> list[Row]:
        """Answer the prompts of a batch; each result holds prompt, prediction and reference.

        Args:
            batch: Rows with a ``prompt``, perhaps its ``prompt_ids`` and ``stop_ids`` that end
                answers beside EOS, which are returned with their ``prediction``; or labelled
                tokens, whose prompts come before the last answer.
            batch_idx: Its number.
        """
        if isinstance(batch, Mapping):
            return inside(
                self.model,
                lambda model: answer(model, self.tokenizer, batch, self.max_new_tokens),
            )
        prompts = [row["prompt_ids"] if "prompt_ids" in row else row["prompt"] for row in batch]
        stop = {token for row in batch for token in row.get("stop_ids", ())}
        answers = inside(
            self.model,
            lambda model: generate(model, self.tokenizer, prompts, self.max_new_tokens, stop=stop),
        )
        rows = [{k: row[k] for k in row if k not in ("prompt_ids", "stop_ids")} for row in batch]
        return [{**row, "prediction": a} for row, a in zip(rows, answers, strict=True)]
