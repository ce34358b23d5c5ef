"""When a fit may stop for a signal, and where the run is then resumed."""

import signal
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from lit_adapters.callbacks.files import is_of_a_search
from lit_adapters.callbacks.interrupt import StopSignals
from lit_adapters.callbacks.loops import fit_progress, is_dry_run, with_validation_ahead
from lit_adapters.trained_state import random_state


class Point(NamedTuple):
    """Where a run can be resumed, when it has moved on without an optimizer step."""

    fit: dict[str, Any]
    random_state: dict[str, Any]
    validation_is_ahead: bool = False


def here(trainer: Trainer) -> Point:
    """The present moment."""
    return Point(fit_progress(trainer), random_state())


class Stopping:
    """Ends a fit for SIGINT or SIGTERM, as soon as that loses no work.

    The hooks of a callback tell it the moments of a fit. Inside an optimizer step a signal is held
    back; between two steps there is a ``point``, and it stops the fit at once.
    """

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.signals = StopSignals()
        self.point: Point | None = None
        self.before_final: Point | None = None  # before a validation that only ends the run
        self._next = False  # before the next batch begins
        self._first_step = 0  # optimizer steps done when this run began

    def begin(self) -> None:
        """Forget an earlier run."""
        self.point, self.before_final, self._next = None, None, False
        self.signals.remember_earlier()

    def listen(self, trainer: Trainer) -> None:
        """Take signals over from Lightning, which listens before the sanity check."""
        self._first_step = trainer.global_step
        if self._wanted(trainer):
            self.signals.install()
            if trainer.received_sigterm:  # after Lightning began to listen and before this
                self.signals.stop()

    def batch_begins(self) -> None:
        """Hold signals back, or stop for one that the batch before left."""
        if self._next:
            self.signals.stop()
        self.signals.hold, self.point = True, None

    def step_is_done(self, trainer: Trainer) -> None:
        """Between two batches: stop for a signal once Lightning has logged this one."""
        self._next = self._asked(trainer)
        if self._next:
            self.point = here(trainer)

    def validation_begins(self, trainer: Trainer, whole: bool) -> None:
        """From here on a signal stops the run at once; it is resumed before this validation.

        Unless the present batch is inside an accumulation window, not a ``whole`` one.
        """
        self.point = None
        if whole:
            progress = with_validation_ahead(fit_progress(trainer))
            self.point = Point(progress, random_state(), validation_is_ahead=True)
            self.stop_if_asked(trainer)
        self.signals.hold = trainer.world_size > 1

    def epoch_is_done(self, trainer: Trainer) -> None:
        """From here to the next batch a signal stops the run at once."""
        self.stop_if_asked(trainer)
        self.point = here(trainer)
        self.signals.hold = trainer.world_size > 1

    def stop_if_asked(self, trainer: Trainer) -> None:
        """Stop here if any rank has received a signal."""
        if self._asked(trainer):
            self.point = self.point or here(trainer)
            self.signals.stop()

    def _asked(self, trainer: Trainer) -> bool:
        asked = self.signals.received is not None
        return self.enabled and trainer.strategy.reduce_boolean_decision(asked, all=False)

    def _wanted(self, trainer: Trainer) -> bool:
        return self.enabled and trainer.state.fn == "fit" and not is_dry_run(trainer)

    def was_reason(self, trainer: Trainer, exception: BaseException) -> bool:
        """Whether the fit ended by ``exception`` for a signal."""
        if isinstance(exception, KeyboardInterrupt) and self._wanted(trainer):
            self.signals.received = self.signals.received or signal.SIGINT  # before it listened
        return self.signals.received is not None

    def left(self, trainer: Trainer) -> Point | None:
        """Where the stopped run can be resumed, if this run did any step."""
        return None if trainer.global_step == self._first_step else self.point

    def farewell(self, trainer: Trainer, path: str | Path | None, written: int) -> str:
        """Say how to go on from the checkpoint ``path``, written after step ``written`` or -1."""
        name = self.signals.received.name if self.signals.received else ""
        said = f"{name}: stopped after optimizer step {trainer.global_step}"
        if not path or is_of_a_search(path):
            return f"{said}, before the first checkpoint; there is nothing to resume"
        earlier = written not in (-1, trainer.global_step)
        of = f" (of step {written})" if earlier else ""
        return f"{said}; to go on{of}: --ckpt_path {path} (in Python: trainer.fit(ckpt_path=...))"
