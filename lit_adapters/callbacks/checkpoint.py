"""Checkpoints that hold the adapter and not the frozen base, written so that a kill is harmless."""

import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lit_adapters.attachment import adapted_layers
from lit_adapters.callbacks.interrupt import StopSignals
from lit_adapters.callbacks.loops import (
    begin_next_epoch,
    fit_progress,
    forget_begun_validation,
    validates_next,
    validation_is_ahead,
    validation_is_planned,
    with_validation_ahead,
)
from lit_adapters.fingerprint import fingerprint, same_base
from lit_adapters.io import save_adapter
from lit_adapters.trained_state import (
    check_trained,
    frozen_names,
    keep_trained,
    random_state,
    set_random_state,
)


class _Point(NamedTuple):
    """Where a run can be resumed, when it has moved on without an optimizer step."""

    fit: dict[str, Any]
    random_state: dict[str, Any]
    validation_is_ahead: bool = False


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
        self.interval = every_n_train_steps
        self.check_base = check_base
        self.adapter_path: Path | None = None
        self._last_step = -1  # optimizer steps done when last.ckpt was written
        self._steps_before = -1  # optimizer steps done when the present batch began
        self._due = False  # whether last.ckpt waits for a validation to pass
        self._whole = True  # whether the present batch ended an accumulation window
        self._restored: Mapping[str, Any] | None = None
        self._validation_is_ahead = False  # of what was restored
        self._signals = StopSignals()
        self._first_step = 0  # optimizer steps done when this run began
        self._point: _Point | None = None
        self._final: _Point | None = None  # before a validation that only ends the run
        self._stop_next = False  # before the next batch begins
        self._base: str | None = None  # fingerprint
        self._load_check: RemovableHandle | None = None

    # --- when ------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and let the module load a checkpoint without its base.

        Raises:
            OSError: if nothing can be written there.
        """
        super().setup(trainer, pl_module, stage)
        self._last_step, self._due, self._whole = -1, False, True
        self._restored, self._point, self._base = None, None, None
        self._stop_next, self._final = False, None
        self._signals.remember_earlier()
        pl_module.strict_loading = False  # `_check` is strict about what is trained
        self._check_at_load(trainer, pl_module)
        if stage == "fit" and trainer.is_global_zero and not _is_dry_run(trainer):
            check_writable(Path(str(self.dirpath)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recognise the base before anything is trained."""
        self._done_loading()
        if self._base is None:
            self._base = _fingerprint(trainer, pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals: the earliest moment after Lightning began to."""
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to signals."""
        super().on_train_start(trainer, pl_module)
        self._first_step = trainer.global_step
        self._listen(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continue the random streams of a resumed run; before this point others draw from them."""
        if self._stop_next:
            self._signals.stop()
        self._restore_random_state()
        self._steps_before = trainer.global_step
        self._signals.hold, self._point = True, None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write ``last.ckpt`` when it is due, and stop if a signal asked for it.

        Never inside an accumulation window, whose gradients no checkpoint holds; and where a
        validation follows, after it: a resume from before would leave it out.
        """
        step = trainer.global_step
        self._whole = step > self._steps_before
        if step == trainer.max_steps:
            trainer.should_stop = True  # Lightning then validates: the last state may be the best
        if not self._whole:
            return
        if step % self.interval == 0 or trainer.should_stop:
            self._due = True
        if trainer.is_last_batch:
            return
        if validates_next(trainer):
            if not validation_is_planned(trainer):  # a longer run does not repeat it
                self._final = _Point(fit_progress(trainer), random_state())
        else:
            if self._due:
                self._write_last(trainer)
            self._stop_next = self._asked(trainer)  # once Lightning has logged this one
            if self._stop_next:
                self._point = _Point(fit_progress(trainer), random_state())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal stops the run at once; it is resumed before this validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self._validation_is_ahead:
            self._restore_random_state()
            forget_begun_validation(trainer)
        self._point = None
        if self._whole:
            self._point = _Point(with_validation_ahead(fit_progress(trainer)), random_state(), True)
            self._stop_if_asked(trainer)
        self._signals.hold = trainer.world_size > 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best state; write ``last.ckpt`` if it waited for this.

        Raises:
            ValueError: if the module logs no such value as ``monitor``.
        """
        fits = trainer.state.fn == "fit" and not trainer.sanity_checking
        self._signals.hold = fits
        logged = trainer.callback_metrics
        if trainer.state.fn == "fit" and self.monitor and self.monitor not in logged:
            raise ValueError(
                f"AdapterCheckpoint(monitor={self.monitor!r}): no such value is logged in "
                f"validation; logged are {sorted(logged) or 'none'}. Name one of "
                "them, or pass monitor=None to keep the last state as the best"
            )
        super().on_validation_end(trainer, pl_module)
        if fits and not trainer.is_last_batch:
            self._point, self._final = self._final, None
            if self._due:
                self._write_last(trainer)
            self._point = None
            if self._whole:
                self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the best state; write ``last.ckpt`` if it waited for the epoch's validation."""
        self._point = None
        super().on_train_epoch_end(trainer, pl_module)
        if self._due:
            self._write_last(trainer)
        self._stop_if_asked(trainer)
        self._point = _Point(fit_progress(trainer), random_state())
        self._signals.hold = trainer.world_size > 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final state, and the adapter folder if no validation chose a best one."""
        self._signals.hold = True
        self._write_last(trainer)
        if not self.best_model_path and not _is_dry_run(trainer):
            self._write_folder(trainer)
        self._point = None
        self._stop_if_asked(trainer)
        self._signals.remove()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Write what a signal stopped, and say how to go on."""
        super().on_exception(trainer, pl_module, exception)
        self._done_loading()
        if isinstance(exception, KeyboardInterrupt) and self._wants_signals(trainer):
            self._signals.received = self._signals.received or signal.SIGINT  # before it listened
        if self._signals.received is not None:
            self._write_stopped(trainer)
            if trainer.is_global_zero:
                print(self._farewell(trainer), file=sys.stderr, flush=True)
        self._signals.remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._done_loading()
        self._signals.remove()

    # --- signals ---------------------------------------------------------------------------------

    def _listen(self, trainer: Trainer) -> None:
        if self._wants_signals(trainer):
            self._signals.install()
            if trainer.received_sigterm:  # after Lightning began to listen and before this
                self._signals.stop()

    def _wants_signals(self, trainer: Trainer) -> bool:
        return bool(trainer.state.fn == "fit" and self.save_last and not _is_dry_run(trainer))

    def _asked(self, trainer: Trainer) -> bool:
        asked = self._signals.received is not None
        return bool(self.save_last) and trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._asked(trainer):
            if self._point is None:
                self._point = _Point(fit_progress(trainer), random_state())
            self._signals.stop()

    def _write_stopped(self, trainer: Trainer) -> None:
        step, point = trainer.global_step, self._point
        if point is None or step == self._first_step:
            return
        at_end = step == trainer.max_steps  # from there Lightning resumes nothing, no validation
        if not (at_end and point.validation_is_ahead and self._last_step >= 0):
            self._write_last(trainer)
        if at_end and not self.best_model_path:
            self._write_folder(trainer)

    def _farewell(self, trainer: Trainer) -> str:
        name = self._signals.received.name if self._signals.received else ""
        said = f"{name}: stopped after optimizer step {trainer.global_step}"
        path = self.last_model_path if self._last_step >= 0 else trainer.ckpt_path
        if not path:
            return f"{said}, before the first checkpoint; there is nothing to resume"
        earlier = self._last_step not in (-1, trainer.global_step)
        of = f" (of step {self._last_step})" if earlier else ""
        return f"{said}; to go on{of}: --ckpt_path {path} (in Python: trainer.fit(ckpt_path=...))"

    def _restore_random_state(self) -> None:
        if self._restored is not None:
            set_random_state(self._restored)
        self._restored, self._validation_is_ahead = None, False

    def _write_last(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self.save_last and step != self._last_step and not _is_dry_run(trainer):
            self.last_model_path = str(Path(str(self.dirpath)) / "last.ckpt")
            self._write(trainer, self.last_model_path)
            self._last_step, self._due = step, False

    # --- what ------------------------------------------------------------------------------------

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out frozen weights; add the random state and what the base is recognised by."""
        checkpoint["state_dict"] = keep_trained(pl_module, checkpoint["state_dict"])
        checkpoint["random_state"] = random_state()
        if self._base is not None:
            checkpoint["base_fingerprint"] = self._base
        if self._point is not None:  # the state is that of a moment that has passed
            checkpoint["loops"]["fit_loop"] = self._point.fit
            checkpoint["random_state"] = self._point.random_state

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse a checkpoint of another adapter; remember the random state for the first step."""
        if self._load_check is not None:  # the strategy did not load through the module
            self._check(trainer, pl_module, checkpoint)
        self._done_loading()
        self._restored = checkpoint.get("random_state")
        self._validation_is_ahead = validation_is_ahead(checkpoint.get("loops"))
        begin_next_epoch(checkpoint.get("loops"))

    def _check_at_load(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at a checkpoint before the first of its tensors is copied into the module."""
        self._done_loading()

        def check(*_: Any) -> None:
            checkpoint = trainer._checkpoint_connector._loaded_checkpoint
            if checkpoint:  # else the module loads something of its own
                self._check(trainer, pl_module, checkpoint)
                self._done_loading()

        self._load_check = pl_module.register_load_state_dict_pre_hook(check)

    def _done_loading(self) -> None:
        if self._load_check is not None:
            self._load_check.remove()
            self._load_check = None

    def _check(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: Mapping[str, Any]
    ) -> None:
        check_trained(pl_module, keep_trained(pl_module, checkpoint["state_dict"]))
        recorded, self._base = checkpoint.get("base_fingerprint"), _fingerprint(trainer, pl_module)
        if not self.check_base or recorded is None or self._base is None:
            return
        if not same_base(str(recorded), self._base):
            raise ValueError(
                f"the checkpoint {trainer.ckpt_path} was trained on another base (fingerprint "
                f"{recorded}); the frozen weights here have fingerprint {self._base}. Load that "
                "base, or pass check_base=False (--checkpoint.check_base=false) if you mean it"
            )

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
        except BaseException as error:
            part.unlink(missing_ok=True)  # a full disk stays no fuller than it was
            if not isinstance(error, OSError):
                raise
            there = Path(filepath).exists()
            kept = "the file from before is whole" if there else "no file is there"
            raise OSError(
                error.errno,
                f"cannot write the checkpoint {filepath}: {error.strerror or error}; {kept}. "
                "Make room, or choose another folder (--checkpoint.dirpath), and resume",
            ) from error
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


def _fingerprint(trainer: Trainer, module: LightningModule) -> str | None:
    if trainer.strategy.restore_checkpoint_after_setup:  # weights may be sharded: FSDP and the like
        return None
    base, frozen = nn.Module(), frozen_names(module)
    for name, parameter in module.named_parameters():
        if name in frozen:
            base.register_parameter(name.replace(".", "/"), parameter)
    return fingerprint(base, list(adapted_layers(module)))


def check_writable(folder: Path) -> None:
    """Make ``folder`` and see that a file can be written there, before hours are spent.

    Raises:
        OSError: if not.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"?")
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write checkpoints into {folder}: {error.strerror or error}. Choose another "
            "folder: AdapterCheckpoint(dirpath=...), --checkpoint.dirpath or "
            "--trainer.default_root_dir",
        ) from error


def adapted_children(module: nn.Module) -> dict[str, nn.Module]:
    """What was adapted in a LightningModule, by attribute name.

    A direct child that holds adapters inside is a model of its own; adapters directly on children
    mean that the LightningModule itself is the model.
    """
    if any("." not in name for name, *_ in adapted_layers(module)):
        return {"": module}
    return {name: child for name, child in module.named_children() if any(adapted_layers(child))}
