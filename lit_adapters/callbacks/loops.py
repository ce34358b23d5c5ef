"""Where Lightning's loops stand, as a checkpoint must say it for a run to go on exactly there."""

from copy import deepcopy
from typing import Any

from lightning.pytorch import Trainer

VALIDATION = "epoch_loop.val_loop.batch_progress"


def is_dry_run(trainer: Trainer) -> bool:
    """Whether ``fast_dev_run`` is on: nothing is to be written."""
    return bool(getattr(trainer, "fast_dev_run", False))


def validates_next(trainer: Trainer) -> bool:
    """Whether a validation follows the training batch that ends now."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def validation_is_planned(trainer: Trainer) -> bool:
    """The same if the run were not about to stop: whether a longer run would validate here."""
    stops, trainer.should_stop = trainer.should_stop, False
    try:
        return validates_next(trainer)
    finally:
        trainer.should_stop = stops


def fit_progress(trainer: Trainer) -> dict[str, Any]:
    """State of the loops of a fit, for later."""
    return deepcopy(trainer.fit_loop.state_dict())


def with_validation_ahead(fit: dict[str, Any]) -> dict[str, Any]:
    """Make a state from within a validation one whose validation is repeated from its start.

    Lightning resumes inside a validation, at the batch that was begun; the sums over the batches
    before it are lost then, so that has to be the first.
    """
    batches = fit[VALIDATION]
    batches["is_last_batch"] = False
    for counts, done in (
        (batches["total"], batches["total"]["completed"]),
        (batches["current"], 0),
    ):
        counts.update(ready=done + 1, started=done + 1, processed=done, completed=done)
    return fit


def validation_is_ahead(loops: dict[str, Any] | None) -> bool:
    """Whether the state is one that `with_validation_ahead` made."""
    total = (loops or {}).get("fit_loop", {}).get(VALIDATION, {}).get("total")
    return bool(total) and total["started"] == total["ready"] == total["completed"] + 1


def forget_begun_validation(trainer: Trainer) -> None:
    """After such a resume: Lightning goes on to count the begun batch in its totals.

    Any later checkpoint of the epoch would then seem to be from within a validation.
    """
    trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.reset_on_restart()


def begin_next_epoch(loops: dict[str, Any] | None) -> None:
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
