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
        monitor: Logged value that decides which state is best; without validation the last is.
        mode: Whether the smallest (min) or the largest (max) value is best.
        every_n_train_steps: Optimizer steps between two writes of ``last.ckpt``.
        save_last: Whether to write ``last.ckpt`` at all.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        monitor: str = "val/loss",
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
        self._restored: Mapping[str, Any] | None = None

    # --- when ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and let the module load a checkpoint without its base."""
        super().setup(trainer, pl_module, stage)
        pl_module.strict_loading = False  # `on_load_checkpoint` is strict about what is trained

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continue the random streams of a resumed run; before this point others draw from them."""
        if self._restored is not None:
            set_random_state(self._restored)
            self._restored = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` when it is due."""
        if trainer.global_step % self.interval == 0:
            self._write_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, and the adapter folder if no validation chose a best one."""
        self._write_last(trainer)
        if not self.best_model_path and not _is_dry_run(trainer):
            self._write_folder(trainer)

    def _write_last(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self.save_last and step != self._last_step and not _is_dry_run(trainer):
            self._last_step = step
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best so far, which stays where the earlier run wrote it."""
        self.best_model_path = state_dict["best_model_path"]
        self.best_model_score = state_dict["best_model_score"]
        if state_dict["dirpath"] == self.dirpath:
            self.best_k_models = state_dict["best_k_models"]
            self.kth_best_model_path = state_dict["kth_best_model_path"]
            self.kth_value = state_dict["kth_value"]

    # --- how -------------------------------------------------------------------------------------

    def _save_topk_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        if self.monitor in monitor_candidates:  # absent without validation: nothing to compare
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(
        self, trainer: Trainer, monitor_candidates: dict[str, Tensor]
    ) -> None:
        self._write_last(trainer)

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
                with part.open("rb") as handle:
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


def adapted_children(module: nn.Module) -> dict[str, nn.Module]:
    """The direct children of a LightningModule that hold adapters, by attribute name."""
    return {name: child for name, child in module.named_children() if any(adapted_layers(child))}
