"""A causal language model in Lightning: its loss, its evaluation, its answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.evaluation import EvaluationSums
from lit_adapters.generation import answer, generate
from lit_adapters.losses import LossKind, TokenLoss
from lit_adapters.model_loss import ModelLoss
from lit_adapters.sharding import inside

Batch = Mapping[str, Any]
Row = dict[str, Any]

# What the model reads of a batch: a padded one has a mask, a packed one positions.
INPUTS = ("input_ids", "attention_mask", "position_ids")


class CausalLMModule(LightningModule):
    """What `AdapterFineTuneModule` does with its model beside training it.

    Args:
        loss: Where the loss comes from, as in `ModelLoss`.
        max_new_tokens: Longest answer of `predict`, tokens.
    """

    model: PreTrainedModel
    packing_obstacle: str | None = "the model is not built yet"  # why batches have to be padded

    def __init__(self, loss: LossKind, max_new_tokens: int) -> None:
        super().__init__()
        self.model_loss = ModelLoss(loss)
        self.max_new_tokens = max_new_tokens
        self.evaluated = EvaluationSums()

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
