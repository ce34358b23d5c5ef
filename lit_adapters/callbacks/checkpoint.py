"""Checkpoints that hold the adapter and not the frozen base, written so that a kill is harmless."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lit_adapters.attachment import adapted_layers
from lit_adapters.io import save_adapter
from lit_adapters.trained_state import (
    check_trained,
    keep_trained,
    random_state,
    set_random_state,
)


class AdapterCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt`` to resume from, ``best.ckpt``, and the best adapter as a PEFT folder.

    Checkpoints hold adapters, optimizer, scheduler, loops and random state, and load with
    ``weights_only=True``. Each is written under a temporary name and renamed when it is complete.
    Works with any LightningModule that holds attached adapters.

    Args:
        dirpath: Where to write; the logger's folder below ``default_root_dir`` if null.
        monitor: Logged value that decides which state is best; the last one is if it is null, or
            if there is no validation.
        mode: Whether the smallest (min) or the largest (max) value is best.
        every_n_train_steps: Optimizer steps between two writes of ``last.ckpt``.
        save_last: Whether to write ``last.ckpt`` at all.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        every_n_train_steps: int = 10,
        save_last: bool = True,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_last=save_last,
            every_n_epochs=1,
            enable_version_counter=False,
        )
        if every_n_train_steps < 1:
            raise ValueError(f"every_n_train_steps must be at least 1, got {every_n_train_steps}")
        self.interval = every_n_train_steps
        self.adapter_path: Path | None = None
        self._last_step = -1  # optimizer steps done when last.ckpt was written
        self._steps_before = -1  # optimizer steps done when the present batch began
        self._due = False  # whether last.ckpt waits for a validation to pass
        self._restored: Mapping[str, Any] | None = None

    # --- when ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and let the module load a checkpoint without its base."""
        super().setup(trainer, pl_module, stage)
        self._last_step, self._due = -1, False
        pl_module.strict_loading = False  # `on_load_checkpoint` is strict about what is trained

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continue the random streams of a resumed run; before this point others draw from them."""
        if self._restored is not None:
            set_random_state(self._restored)
            self._restored = None
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` when it is due.

        Never inside an accumulation window, whose gradients no checkpoint holds; and where a
        validation follows, after it: a resume from before would leave it out.
        """
        step = trainer.global_step
        if step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates: the last state may be the best
        if step > self._steps_before and (step % self.interval == 0 or trainer.should_stop):
            self._due = True
            if not trainer.is_last_batch and not _validates_after(trainer, batch_idx):
                self._write_last(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best state; write ``last.ckpt`` if it waited for this.

        Raises:
            ValueError: if the module logs no such value as ``monitor``.
        """
        logged = trainer.callback_metrics
        if trainer.state.fn == "fit" and self.monitor and self.monitor not in logged:
            raise ValueError(
                f"AdapterCheckpoint(monitor={self.monitor!r}): no such value is logged in "
                f"validation; logged are {sorted(logged) or 'none'}. Name one of "
                "them, or pass monitor=None to keep the last state as the best"
            )
        super().on_validation_end(trainer, pl_module)
        if self._due and not trainer.is_last_batch:
            self._write_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best state; write ``last.ckpt`` if it waited for the epoch's validation."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._due:
            self._write_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, and the adapter folder if no validation chose a best one."""
        self._write_last(trainer)
        if not self.best_model_path and not _is_dry_run(trainer):
            self._write_folder(trainer)

    def _write_last(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self.save_last and step != self._last_step and not _is_dry_run(trainer):
            self._last_step, self._due = step, False
            self.last_model_path = str(Path(str(self.dirpath)) / "last.ckpt")
            self._write(trainer, self.last_model_path)

    # --- what ------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out frozen weights; add the random state."""
        checkpoint["state_dict"] = keep_trained(pl_module, checkpoint["state_dict"])
        checkpoint["random_state"] = random_state()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of another adapter; remember the random state for the first step."""
        check_trained(pl_module, keep_trained(pl_module, checkpoint["state_dict"]))
        self._restored = checkpoint.get("random_state")
        _begin_next_epoch(checkpoint.get("loops"))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best so far, which stays where the earlier run wrote it."""
        self.best_model_path = state_dict["best_model_path"]
        self.best_model_score = state_dict["best_model_score"]
        self.best_k_models = state_dict["best_k_models"]
        self.kth_best_model_path = state_dict["kth_best_model_path"]
        self.kth_value = state_dict["kth_value"]
        if self.best_model_path:
            self.adapter_path = Path(self.best_model_path).parent / "adapter"

    # --- how -------------------------------------------------------------------------------------

    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        if self.monitor in monitor_candidates:  # absent without validation: nothing to compare
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        """Nothing: Lightning would call this inside an accumulation window too."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Called by Lightning for the best state."""
        self._write(trainer, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        self._write_folder(trainer)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _write(self, trainer: Trainer, filepath: str) -> None:
        part = Path(f"{filepath}.part")
        try:
            trainer.save_checkpoint(part, weights_only=False)  # on every rank
            if trainer.is_global_zero:
                with part.open("r+b") as handle:
                    os.fsync(handle.fileno())
                part.replace(filepath)
        except BaseException:
            part.unlink(missing_ok=True)  # a full disk stays no fuller than it was
            raise
        trainer.strategy.barrier("AdapterCheckpoint")

    def _write_folder(self, trainer: Trainer) -> None:
        roots = adapted_children(trainer.lightning_module)
        folder = Path(str(self.dirpath)) / "adapter"
        if trainer.is_global_zero:
            for name, root in roots.items():
                save_adapter(root, folder if len(roots) == 1 else folder / name)
        self.adapter_path = folder if roots else None


def _is_dry_run(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))


def _begin_next_epoch(loops: dict[str, Any] | None) -> None:
    """Let a run that was saved at the end of an epoch begin the next.

    With `max_steps`, Lightning 2.6 takes the finished epoch for a begun one: it counts an empty
    epoch, and the loggers' steps are one too high. The state at the end of the epoch's last batch
    is resumed correctly in all cases, so the counters are set back to that.
    """
    if not loops:
        return
    fit = loops["fit_loop"]
    epochs, batches = fit["epoch_progress"], fit["epoch_loop.batch_progress"]
    if batches["is_last_batch"] and epochs["current"]["processed"] == epochs["current"]["ready"]:
        for counts in epochs.values():
            counts["processed"] = counts["completed"] = counts["ready"] - 1
        for name in ("total", "current"):
            batches[name]["completed"] = batches[name]["ready"] - 1
        fit["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1


def _validates_after(trainer: Trainer, batch_idx: int) -> bool:
    """Whether a validation within the epoch follows this batch."""
    if not trainer.enable_validation or trainer.val_check_batch is None:
        return False
    by_total = trainer.check_val_every_n_epoch is None
    done = trainer.fit_loop.total_batch_idx if by_total else batch_idx
    return (done + 1) % trainer.val_check_batch == 0


def adapted_children(module: nn.Module) -> dict[str, nn.Module]:
    """What was adapted in a LightningModule, by attribute name.

    A direct child that holds adapters inside is a model of its own; adapters directly on children
    mean that the LightningModule itself is the model.
    """
    if any("." not in name for name, *_ in adapted_layers(module)):
        return {"": module}
    return {name: child for name, child in module.named_children() if any(adapted_layers(child))}
