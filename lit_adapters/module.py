"""The LightningModule that trains: a base, an adapter on it, an optimizer over the adapter."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.adapters import METHOD, AdapterSpec, LoRA
from lit_adapters.agreement import compare, settings_of, start_of, structure_of
from lit_adapters.attachment import adapted_layers, attach
from lit_adapters.base_model import Dtype, load_base, load_tokenizer
from lit_adapters.blocks import make_lean, make_stock
from lit_adapters.callbacks.init import InitAdapters
from lit_adapters.callbacks.load_check import WHOLE, remember_base
from lit_adapters.callbacks.lost_rank import ExplainLostRank
from lit_adapters.causal_lm import Batch, CausalLMModule
from lit_adapters.compilation import backend_of, compile_layers
from lit_adapters.fingerprint import remember_fingerprint
from lit_adapters.first_steps import FirstSteps, log_sizes
from lit_adapters.fit_loaders import resume_loaders
from lit_adapters.footprint import footprint
from lit_adapters.guards import warn_if_rounded
from lit_adapters.input_sharing import compute_apart
from lit_adapters.known_tokens import teach_held
from lit_adapters.loading_once import build_once, machine_of, obstacle_of
from lit_adapters.losses import LossKind
from lit_adapters.optim import build_optimizer, options_of, set_options, take_rate, warmup_then
from lit_adapters.optim.schedule import Decay
from lit_adapters.packed_rows import keep_rows_apart, put_in_front
from lit_adapters.portable_states import make_portable
from lit_adapters.precision import base_dtype, careful, compute_dtype
from lit_adapters.quantization import Kind, Quantization
from lit_adapters.recompute import Policy, recompute_activations, recompute_every
from lit_adapters.remainders import rewrite_for
from lit_adapters.saved_settings import (
    quantization_from_plain,
    quantization_to_plain,
    spec_from_plain,
    spec_to_plain,
)
from lit_adapters.sharding import check_optimizer, is_sharded, shard, spread_over_all
from lit_adapters.trained_state import check_trained, keep_trained


class AdapterFineTuneModule(CausalLMModule):
    """Fine-tune a Hugging Face causal language model with an adapter.

    The base is loaded, adapted and initialised in `configure_model`, before anything is sharded
    and before the optimizer exists. The loss is the mean over all trained tokens of an optimizer
    step (the whole accumulation window, all ranks). Checkpoints hold no frozen weight.

    Args:
        base: The model: ``tiny`` (embedded, works offline), a local folder or a hub id. From code
            also a model that is already built.
        adapter: What to train beside the frozen base; null is what a model passed in holds already,
            else LoRA of rank 8 on all linear layers.
        tokenizer: Folder or hub id of the tokenizer, or the tokenizer; that of the base if null.
        optimizer: Called with the parameter groups. AdamW at 2e-4 without decay if null.
        lr_scheduler: Decay after the warm-up: cosine, linear or constant; or a scheduler class,
            advanced once per optimizer step (ReduceLROnPlateau: per epoch, by ``val/loss`` or the
            ``monitor`` of Lightning's class) and without our warm-up.
        warmup: Optimizer steps of linear warm-up if 1 or more, else their share of all steps.
        lora_plus_ratio: Learning rate of ``lora_B``, and of vectors such as magnitudes and biases,
            over that of everything else (LoRA+: about 16).
        embedding_lr: Learning rate of adapters on embeddings; the optimizer's if null.
        gradient_checkpointing: Recompute activations in the backward pass, for less memory and more
            time: none, full, or n for the first of every n layers (True is full, False is none).
        dtype: Data type of the frozen base; auto follows the trainer's precision.
        revision: Branch, tag or commit of a hub model.
        attn_implementation: Attention of transformers, such as sdpa, eager or flash_attention_2.
        max_new_tokens: Longest answer of `predict`, tokens.
        loss: Where it comes from: auto is the states before the output head, in chunks of tokens,
            so that the logits are never held, or the logits if the head is no plain matrix (then a
            line in the log says why); full is the logits; liger is liger-kernel on CUDA.
        quantization: Load the linear layers of the base in nf4, fp4 or int8 (QLoRA), or as a
            class such as ``lit_adapters.BitsAndBytes`` says; null keeps their precision.
        learning_rate: In place of the optimizer's own. Lightning's learning-rate finder sets it:
            ``Tuner(trainer).lr_find(module, datamodule=data)`` before `fit`, or the callback
            ``LearningRateFinder`` (on the command line
            ``--trainer.callbacks+=LearningRateFinder``).
        compile: Run the decoder layers through torch.compile: true, or the name of a backend. Steps
            are faster after the first two, which take seconds, or minutes. Not under FSDP1.
        lean_blocks: Keep less of gated MLPs and RMS norms for the backward pass, where their code
            is that of Llama: about a fifth less memory, the same numbers up to rounding. Not with
            `compile`, which keeps less by itself.
    """

    def __init__(
        self,
        base: str | nn.Module = "tiny",
        adapter: AdapterSpec | None = None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: Decay | LRSchedulerCallable = "cosine",
        warmup: float = 0.03,
        lora_plus_ratio: float = 1.0,
        embedding_lr: float | None = None,
        gradient_checkpointing: Policy = "none",
        dtype: Dtype = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        max_new_tokens: int = 128,
        loss: LossKind = "auto",
        quantization: Kind | Quantization | None = None,
        learning_rate: float | None = None,
        compile: bool | str = False,
        lean_blocks: bool = True,
    ) -> None:
        super().__init__(loss, max_new_tokens)
        self.base = base if isinstance(base, str) else None
        if isinstance(base, nn.Module):
            self.model = cast(PreTrainedModel, base)  # once: two names would be saved twice
            loading = {
                "quantization": quantization is not None,
                "dtype": dtype != "auto",
                "revision": revision is not None,
                "attn_implementation": attn_implementation is not None,
            }
            if any(loading.values()):  # a checkpoint's settings may say so, too: no error
                warnings.warn(
                    f"{', '.join(name for name in loading if loading[name])} would say how a base "
                    "is loaded, and does nothing here, where it is passed in as a model: load it "
                    "like that, or name its folder or hub id as the base",
                    stacklevel=2,
                )
        # No default instance: the command line would hand its settings to another class named.
        chosen = adapter or (isinstance(base, nn.Module) and _spec_of(base)) or LoRA()
        self.adapter = spec_from_plain(chosen) if isinstance(chosen, Mapping) else chosen
        self._chose_adapter = adapter is not None
        self.optimizer_factory = optimizer or default_optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup = warmup
        self.lora_plus_ratio = lora_plus_ratio
        self.embedding_lr = embedding_lr
        self.recompute_every = recompute_every(gradient_checkpointing)
        self.dtype_of_base: Dtype = dtype
        self.revision = revision
        self.attn_implementation = attn_implementation
        self.quantization = quantization_from_plain(quantization)
        self.learning_rate = learning_rate
        self.compile_backend = backend_of(compile)
        self.lean_blocks = lean_blocks
        self._tokenizer = tokenizer
        self._built = False
        self.first_steps = FirstSteps()
        # Adapter-only checkpoints leave the base out on purpose; `check_trained` is the strict one.
        self.strict_loading = False
        # Plain types only: a checkpoint is then readable with weights_only=True.
        self.save_hyperparameters(
            {
                "base": base if isinstance(base, str) else None,
                "adapter": spec_to_plain(self.adapter),
                "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
                **({"lr_scheduler": lr_scheduler} if isinstance(lr_scheduler, str) else {}),
                "warmup": warmup,
                "lora_plus_ratio": lora_plus_ratio,
                "embedding_lr": embedding_lr,
                "gradient_checkpointing": gradient_checkpointing,
                "dtype": dtype,
                "revision": revision,
                "attn_implementation": attn_implementation,
                "max_new_tokens": max_new_tokens,
                "loss": loss,
                "quantization": quantization_to_plain(self.quantization),
                "learning_rate": learning_rate,
                "compile": compile,
                "lean_blocks": lean_blocks,
            }
        )

    # --- the model -------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for; it knows the adapter's new tokens."""
        if self._tokenizer is None and self.base is None:
            raise ValueError(
                "the base was passed in as a model, so its tokenizer is unknown; pass "
                "tokenizer=... to AdapterFineTuneModule or to the data module"
            )
        if self._tokenizer is None or isinstance(self._tokenizer, str):
            own = self._tokenizer is None
            name = cast(str, self.base if own else self._tokenizer)
            self._tokenizer = load_tokenizer(name, self.revision if own else None)
        self.adapter.teach(self._tokenizer)
        teach_held(self, self._tokenizer)  # of a model passed in
        return self._tokenizer

    def configure_callbacks(self) -> list[Callback]:
        """Say how FSDP2 spreads the model, while that can be said; bring what explains errors."""
        spread_over_all(self.trainer.strategy)
        return [ExplainLostRank()] if self.trainer.world_size > 1 else []

    def configure_model(self) -> None:
        """Load the base, attach the adapter, run an `InitAdapters` callback, shard it; once."""
        strategy = getattr(self._trainer, "strategy", None)
        if strategy is not None:
            make_portable(self)
        if self._built:  # perhaps with another adapter than now
            self.packing_obstacle = self.packing_obstacle or put_in_front(self.model)
            return
        if strategy is not None:
            compare(partial(settings_of, self))
        machine = machine_of(strategy)
        built = build_once(machine, self._build, partial(obstacle_of, self))
        for name, value in built.items():
            setattr(self, name, value)
        for callback in self._initialising():
            callback.adopt(self, self.model)
        if strategy is not None:
            compare(partial(structure_of, self.model))
        if self.compile_backend:
            compile_layers(self.model, self.compile_backend, strategy)
        compute_apart(self.model)  # one passed in may have been trained whole
        self.model = shard(self.model, strategy, machine)
        self._built = True

    def _build(self) -> dict[str, Any]:
        """Make the model that is trained; return what sharding would leave unknown, by name."""
        sharded = is_sharded(getattr(self._trainer, "strategy", None))
        if self.base is not None:
            precision = str(getattr(self._trainer, "precision", "32-true"))
            self.model = load_base(
                self.base,
                base_dtype(self.dtype_of_base, precision),
                self.revision,
                self.attn_implementation,
                self.quantization,
                compute_dtype(self.dtype_of_base, precision),
                self._trainer.strategy.root_device if self._trainer else None,
            )
        held = _spec_of(self.model)  # a model passed in may be adapted already
        if held is not None and self._chose_adapter:
            if held != self.adapter:
                raise ValueError(
                    f"the model passed in holds adapters already, {held}, and {self.adapter} was "
                    "asked for; leave `adapter` out to train those, or call `detach` or `merge` "
                    "first"
                )
            rank_zero_info("The model passed in holds such adapters already; they are trained on.")
        if held is None:
            tokenizer = self.tokenizer if self.adapter.reads_text else None
            attach(self.model, self.adapter, tokenizer=tokenizer)
        if self.recompute_every:
            recompute_activations(self.model, self.recompute_every)
        make_stock(self.model)  # one passed in may be lean
        if self.lean_blocks and not self.compile_backend:  # what is compiled keeps less anyway
            make_lean(self.model)
        self.packing_obstacle = keep_rows_apart(self.model)
        for callback in self._initialising():
            callback.initialise(self, self.model, agree=not sharded)
        self.model.train()  # from_pretrained returns evaluation mode, where dropout never runs
        if sharded:
            self._sizes = footprint(self.model)
            remember_base(self)
            remember_fingerprint(self.model)
        return {
            name: getattr(self, name)
            for name in ("model", "packing_obstacle", "_sizes", WHOLE)
            if hasattr(self, name)
        }

    def _initialising(self) -> list[InitAdapters]:
        callbacks = self._trainer.callbacks if self._trainer else []  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, InitAdapters)]

    def _apply(
        self, fn: Callable[[Tensor], Tensor], recurse: bool = True
    ) -> "AdapterFineTuneModule":
        """Let ``precision="bf16-true"`` cast weights, but nothing packed and no fp32 buffer."""
        with careful(self, fn) as apply:
            super()._apply(apply, recurse)
        return self

    # --- training --------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Compare what ranks start from; tell every logger how large the parts are."""
        super().on_fit_start()
        self.first_steps = FirstSteps()
        compare(partial(start_of, self))
        warn_if_rounded(self.model)
        sharded = is_sharded(self.trainer.strategy)
        log_sizes(self.trainer, self._sizes if sharded else footprint(self.model))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make sure, once, that no adapter is bypassed, which is no training time."""
        if self.first_steps.check_fire(self.model, self.trainer, batch, bool(self.compile_backend)):
            self.window.start()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Once: see that adapters move; log the size of the optimizer's state."""
        if self.searching:
            if outputs and not outputs["loss"].isfinite():
                self.trainer.should_stop = True  # larger rates will not do better
            return
        self.first_steps.check_moved(self.model, self.trainer)
        self.first_steps.measure_optimizer(self.trainer)

    def configure_optimizers(self) -> Any:
        """Build the optimizer over the trainable parameters, and its schedule."""
        optimizer = build_optimizer(
            self.optimizer_factory,
            self.model,
            self.lora_plus_ratio,
            self.embedding_lr,
            self.learning_rate,
            fused=str(self.trainer.precision) != "16-mixed",  # there, fused steps cannot be clipped
        )
        check_optimizer(optimizer, self.trainer.strategy)
        if isinstance(self.lr_scheduler, str):
            total = self.trainer.estimated_stepping_batches
            if self.warmup >= max(total, 1):
                rank_zero_info(
                    f"The warm-up of {self.warmup:g} steps never ends: this run has {total:g} "
                    "optimizer steps, and does not reach the learning rate."
                )
            schedule: Any = warmup_then(self.lr_scheduler, optimizer, total, self.warmup)
        else:
            schedule = self.lr_scheduler(optimizer)
        self._chosen = options_of(optimizer)
        self._chosen_rate = self.learning_rate
        moves: dict[str, Any] = {"scheduler": schedule, "interval": "step"}
        if isinstance(schedule, ReduceLROnPlateau):  # that of the command line names its value
            moves |= {"interval": "epoch", "monitor": getattr(schedule, "monitor", "val/loss")}
        return {"optimizer": optimizer, "lr_scheduler": moves}

    def on_train_start(self) -> None:
        """Let this run's optimizer settings win over those that a checkpoint restored."""
        if self.searching:
            return
        schedulers = [config.scheduler for config in self.trainer.lr_scheduler_configs]
        optimizer = cast(Optimizer, self.optimizers(use_pl_optimizer=False))
        set_options(optimizer, self._chosen, schedulers)
        if self.learning_rate is not None and self.learning_rate != self._chosen_rate:
            take_rate(optimizer, self.learning_rate, schedulers)  # found since by a callback
        resume_loaders(self.trainer)

    # --- checkpoints -----------------------------------------------------------------------------

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load without listing the frozen base, which is left out on purpose, as missing."""
        found = super().load_state_dict(state_dict, strict, assign)
        kept = keep_trained(self, dict.fromkeys(found.missing_keys))
        return type(found)(list(kept), found.unexpected_keys)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen base out, whichever callback saves."""
        checkpoint["state_dict"] = keep_trained(self, checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not hold exactly what is trained here."""
        check_trained(self, checkpoint["state_dict"])
        rewrite_for(self.model, checkpoint["state_dict"], "model.")


def _spec_of(model: nn.Module) -> AdapterSpec | None:
    held = next(adapted_layers(model, METHOD), None)
    return None if held is None else cast(AdapterSpec, held.adapter.spec)


def default_optimizer(groups: Any) -> Optimizer:
    """AdamW at 2e-4, no weight decay: LoRA's customary setting."""
    return AdamW(groups, lr=2e-4, weight_decay=0.0)
