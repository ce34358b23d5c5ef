"""What is looked at once in a fit: sizes, whether adapters are at work, whether they move."""

from contextlib import nullcontext
from inspect import signature
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedModel

from lit_adapters.attachment import check_adapters_fire
from lit_adapters.footprint import Footprint, optimizer_bytes
from lit_adapters.guards import PATIENCE, check_moved
from lit_adapters.input_sharing import finding_shared_inputs
from lit_adapters.optim import unpacked
from lit_adapters.sharding import is_sharded


class FirstSteps:
    """Remembers what an `AdapterFineTuneModule` has looked at already; one for each fit."""

    def __init__(self) -> None:
        self.fired = False
        self.moved = False
        self.measured = False

    def check_fire(
        self, model: PreTrainedModel, trainer: Trainer, batch: Any, compiled: bool
    ) -> bool:
        """Make sure, on the first batch, that no adapter is bypassed; return whether it is that.

        Adapters of layers that read one input share products from then on, unless they are
        ``compiled`` or sharded.
        """
        if self.fired:
            return False
        self.fired = True
        inputs: dict[str, Any] = {k: v for k, v in batch.items() if k != "labels"}
        if "logits_to_keep" in signature(model.forward).parameters:
            inputs["logits_to_keep"] = 1  # all of them could be the peak of the run
        whole = not is_sharded(trainer.strategy) and not compiled
        with finding_shared_inputs(model) if whole else nullcontext():
            check_adapters_fire(model, {**inputs, "use_cache": False})
        return True

    def check_moved(self, model: PreTrainedModel, trainer: Trainer) -> None:
        """Make sure, after `PATIENCE` optimizer steps, that adapters move."""
        if not self.moved and trainer.global_step >= PATIENCE:
            self.moved = True
            check_moved(model, trainer.optimizers[0].param_groups[0]["lr"])

    def measure_optimizer(self, trainer: Trainer) -> None:
        """Log the size of the optimizer's state when there is one."""
        optimizers = trainer.optimizers
        if not self.measured and any(optimizer.state for optimizer in optimizers):
            self.measured = True
            log_once(trainer, {"bytes/optimizer": sum(map(optimizer_bytes, optimizers))})
            for said in filter(None, map(unpacked, optimizers)):
                rank_zero_info(said)


def log_sizes(trainer: Trainer, sizes: Footprint) -> None:
    """Tell every logger what is trained and how large the parts are."""
    log_once(
        trainer,
        {
            "parameters/trainable": sizes.trainable,
            "parameters/trainable_share": sizes.share,
            "bytes/base": sizes.base_bytes,
            "bytes/adapter": sizes.adapter_bytes,
        },
    )


def log_once(trainer: Trainer, values: dict[str, float]) -> None:
    """Log what does not change during a fit."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
