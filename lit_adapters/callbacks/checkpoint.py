"""Checkpoints that hold the adapter and not the frozen base, written so that a kill is harmless."""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from weakref import ref

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lit_adapters.callbacks.adapted_children import adapted_children
from lit_adapters.callbacks.files import check_writable, is_of_a_search, write_checkpoint
from lit_adapters.callbacks.load_check import LoadCheck, new_tokens_of
from lit_adapters.callbacks.loops import (
    begin_next_epoch,
    forget_begun_validation,
    is_dry_run,
    validates_next,
    validation_is_ahead,
    validation_is_planned,
)
from lit_adapters.callbacks.stopping import Stopping, here
from lit_adapters.guards import warn_if_left_out
from lit_adapters.io import save_adapter
from lit_adapters.prompting import NOTE, from_note, prompting_of, set_prompting, to_note
from lit_adapters.spread import gathered
from lit_adapters.trained_state import (
    keep_trained,
    random_state,
    set_random_state,
    trained_modules,
)


class AdapterCheckpoint(ModelCheckpoint):
    """Keep ``last.ckpt`` to resume from, ``best.ckpt``, and the best adapter as a PEFT folder.

    Checkpoints hold adapters, optimizer, scheduler, loops and random state, and load with
    ``weights_only=True``. Each is written under a temporary name and renamed when it is complete.
    Works with any LightningModule that holds attached adapters.

    Ctrl-C (SIGINT) and SIGTERM end a fit after the optimizer step it is in, whole accumulation
    window included, with a ``last.ckpt`` of that step; a second Ctrl-C ends it at once. Before the
    first step, in a validation and after the last epoch it ends at once: the state is whole, and
    ``last.ckpt`` is written if there were steps since. A resumed run makes up for the validation.
    Only what is in no checkpoint is lost: a validation inside an accumulation window, or after
    ``max_steps``, leaves the ``last.ckpt`` from before. Several ranks agree on the step and stop
    in no validation, but after it. Then a handler that was there before the fit is called, and

    - for SIGINT KeyboardInterrupt is raised, which Lightning turns into SystemExit with status 1
      (``python -m lit_adapters``: 130);
    - for SIGTERM Lightning's SIGTERMException, a SystemExit with status 143.

    Nothing of this happens in another thread than the main one, with ``fast_dev_run`` or
    ``save_last=False``, or for a signal that the process ignores.

    Args:
        dirpath: Where to write; the logger's folder below ``default_root_dir`` if null.
        monitor: Logged value that decides which state is best; the last one is if it is null, or
            if there is no validation.
        mode: Whether the smallest (min) or the largest (max) value is best.
        every_n_train_steps: Optimizer steps between two writes of ``last.ckpt``.
        save_last: Whether to write ``last.ckpt`` at all.
        check_base: Refuse to load a checkpoint that was trained on a base with other weights.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        monitor: str | None = "val/loss",
        mode: Literal["min", "max"] = "min",
        every_n_train_steps: int = 10,
        save_last: bool = True,
        check_base: bool = True,
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
        if mode == "min" and monitor is not None and "accuracy" in monitor:
            raise ValueError(
                f"AdapterCheckpoint(monitor={monitor!r}, mode='min') would keep the state of the "
                "lowest accuracy for the best; pass mode='max'"
            )
        self.interval = every_n_train_steps
        self.check_base = check_base
        self.adapter_path: Path | None = None
        self._last_step = -1  # optimizer steps done when last.ckpt was written
        self._steps_before = -1  # optimizer steps done when the present batch began
        self._due = False  # whether last.ckpt waits for a validation to pass
        self._whole = True  # whether the present batch ended an accumulation window
        self._restored: Mapping[str, Any] | None = None
        self._module: ref[LightningModule] | None = None  # of the last fit
        self._validation_is_ahead = False  # of what was restored
        self._stopping = Stopping(enabled=save_last)
        self._load_check = LoadCheck()

    # --- when ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and let the module load a checkpoint without its base.

        Raises:
            OSError: if nothing can be written there.
            ValueError: if another one writes there.
        """
        super().setup(trainer, pl_module, stage)
        self._last_step, self._due, self._whole, self._restored = -1, False, True, None
        self._stopping.begin()
        pl_module.strict_loading = False  # the load check is strict about what is trained
        self._load_check.begin(trainer, pl_module, self.check_base)
        if stage == "fit":
            if self._module is not None and self._module() is not pl_module:
                self._forget_best()
            self._module = ref(pl_module)
            self._last_global_step_saved = 0  # of this fit; Lightning saves no step twice
            self._check_alone(trainer)
            if trainer.is_global_zero and not is_dry_run(trainer):
                check_writable(Path(str(self.dirpath)))

    def _check_alone(self, trainer: Trainer) -> None:
        for other in trainer.checkpoint_callbacks:
            shares = isinstance(other, AdapterCheckpoint) and other.dirpath == self.dirpath
            if shares and other is not self:
                raise ValueError(
                    f"two AdapterCheckpoints would write best.ckpt and the adapter to one folder, "
                    f"{self.dirpath}, each over the other's; give one of them another dirpath"
                )

    def _forget_best(self) -> None:
        """Compare no other module with that of an earlier fit."""
        self.best_k_models, self.best_model_score, self.current_score = {}, None, None
        self.best_model_path = self.kth_best_model_path = ""
        self.kth_value = torch.tensor(math.inf if self.mode == "min" else -math.inf)
        self.adapter_path = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the module, which a launcher sends by itself."""
        return {**vars(self), "_module": None}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recognise the base before anything is trained; say what the folder will not hold."""
        for root in adapted_children(pl_module).values():
            warn_if_left_out(root)
        self._load_check.recognise(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals: the earliest moment after Lightning began to."""
        self._stopping.listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        super().on_train_start(trainer, pl_module)
        self._stopping.listen(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continue the random streams of a resumed run; before this point others draw from them."""
        self._stopping.batch_begins()
        self._restore_random_state()
        self._steps_before = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` when it is due, and stop if a signal asked for it.

        Never inside an accumulation window, whose gradients no checkpoint holds; and where a
        validation follows, after it: a resume from before would leave it out.
        """
        step = trainer.global_step
        self._whole = step > self._steps_before
        if 0 <= trainer.max_steps <= step:  # above it where several optimizers step in one batch
            trainer.should_stop = True  # Lightning then validates: the last state may be the best
        if not self._whole:
            return
        if step // self.interval > self._steps_before // self.interval or trainer.should_stop:
            self._due = True
        if trainer.is_last_batch:
            return
        if validates_next(trainer):
            if not validation_is_planned(trainer):  # a longer run does not repeat it
                self._stopping.before_final = here(trainer)
        else:
            if self._due:
                self._write_last(trainer)
            self._stopping.step_is_done(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let a signal stop the run at once; it is resumed before this validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._validation_is_ahead:
            self._restore_random_state()
            forget_begun_validation(trainer)
        self._stopping.validation_begins(trainer, self._whole)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best state; write ``last.ckpt`` if it waited for this.

        Raises:
            ValueError: if the module logs no such value as ``monitor``.
        """
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._stopping.signals.hold = fits
        logged = trainer.callback_metrics
        if trainer.state.fn == "fit" and self.monitor and self.monitor not in logged:
            raise ValueError(
                f"AdapterCheckpoint(monitor={self.monitor!r}): no such value is logged in "
                f"validation; logged are {sorted(logged) or 'none'}. Name one of "
                "them, or pass monitor=None to keep the last state as the best"
            )
        super().on_validation_end(trainer, pl_module)
        if fits and not trainer.is_last_batch:
            if self._due:
                self._stopping.point = self._stopping.before_final
                self._write_last(trainer)
            self._stopping.point = self._stopping.before_final = None
            if self._whole:
                self._stopping.stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best state; write ``last.ckpt`` if it waited for the epoch's validation."""
        self._stopping.point = None
        super().on_train_epoch_end(trainer, pl_module)
        if self._due:
            self._write_last(trainer)
        self._stopping.epoch_is_done(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, and the adapter folder if no validation chose a best one."""
        self._stopping.signals.hold = True
        self._write_last(trainer)
        if not self.best_model_path and not is_dry_run(trainer):
            self._write_folder(trainer)
        self._stopping.point = None
        self._stopping.stop_if_asked(trainer)
        self._stopping.signals.remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what a signal stopped, and say how to go on."""
        super().on_exception(trainer, pl_module, exception)
        self._load_check.end()
        if self._stopping.was_reason(trainer, exception):
            self._write_stopped(trainer)
            if trainer.is_global_zero:
                path = self.last_model_path if self._last_step >= 0 else trainer.ckpt_path
                said = self._stopping.farewell(trainer, path, self._last_step)
                print(said, file=sys.stderr, flush=True)
        self._stopping.signals.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._load_check.end()
        self._stopping.signals.remove()

    def _write_stopped(self, trainer: Trainer) -> None:
        point = self._stopping.left(trainer)
        if point is None:
            return
        # From its last step Lightning resumes nothing, no validation.
        at_end = 0 <= trainer.max_steps <= trainer.global_step
        if not (at_end and point.validation_is_ahead and self._last_step >= 0):
            self._write_last(trainer)
        if at_end and not self.best_model_path:
            self._write_folder(trainer)

    def _restore_random_state(self) -> None:
        if self._restored is not None:
            set_random_state(self._restored)
        self._restored, self._validation_is_ahead = None, False

    def _write_last(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self.save_last and step != self._last_step and not is_dry_run(trainer):
            self.last_model_path = str(Path(str(self.dirpath)) / "last.ckpt")
            write_checkpoint(trainer, self.last_model_path)
            self._last_step, self._due = step, False

    # --- what ------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out frozen weights; add the random state and what the base is recognised by."""
        checkpoint["state_dict"] = keep_trained(pl_module, checkpoint["state_dict"])
        checkpoint["random_state"] = random_state()
        if self._load_check.base is not None:
            checkpoint["base_fingerprint"] = self._load_check.base
        if tokens := new_tokens_of(pl_module):
            checkpoint["new_tokens"] = tokens
        if (prompting := to_note(prompting_of(pl_module))) is not None:
            checkpoint[NOTE] = prompting
        if (point := self._stopping.point) is not None:  # the state is that of a moment passed
            checkpoint["loops"]["fit_loop"] = point.fit
            checkpoint["random_state"] = point.random_state

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of another adapter; remember the random state for the first step."""
        self._load_check.catch_up(trainer, pl_module, checkpoint, self.check_base)
        if trainer.state.fn != "fit":  # which states its own
            set_prompting(pl_module, from_note(checkpoint.get(NOTE), trainer.ckpt_path))
        if is_of_a_search(trainer.ckpt_path):  # goes back to where it began: no run is resumed
            return
        self._restored = checkpoint.get("random_state")
        self._validation_is_ahead = validation_is_ahead(checkpoint.get("loops"))
        begin_next_epoch(checkpoint.get("loops"))

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
        write_checkpoint(trainer, filepath)
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        self._write_folder(trainer)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)

    def _write_folder(self, trainer: Trainer) -> None:
        roots = adapted_children(trainer.lightning_module)
        folder = Path(str(self.dirpath)) / "adapter"
        for name, root in roots.items():
            with gathered(trained_modules(root)):
                if trainer.is_global_zero:
                    save_adapter(root, folder if len(roots) == 1 else folder / name)
        self.adapter_path = folder if roots else None
