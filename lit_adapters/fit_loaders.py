"""Training batches that begin where a trainer is."""

from collections.abc import Iterable
from typing import Any, cast

from lightning.pytorch import Trainer

from lit_adapters.data import BatchLoader, StreamLoader


class FitLoader(BatchLoader):
    """Training batches that begin where the trainer's own progress says.

    The trainer counts the batches that were trained; a loader could only count those it handed
    out, which is one more when a step failed.
    """

    trainer: Trainer | None = None

    def start(self) -> tuple[int, int]:
        """Return the trainer's epoch and the batches of it that were trained."""
        return _progress(self, self.trainer) or super().start()


class FitStream(StreamLoader):
    """Streamed batches that begin where the trainer's own progress says."""

    trainer: Trainer | None = None

    def start(self) -> tuple[int, int]:
        """Return the trainer's epoch and the batches of it that were trained.

        A trainer reads one batch ahead of a stream, so it asks while it still takes the last
        batch of an epoch, from which it was resumed, for one of the epoch.
        """
        found = _progress(self, self.trainer)
        if found is not None and self.trainer is not None:
            loop = self.trainer.fit_loop
            if found[1] and loop.epoch_loop.batch_progress.is_last_batch:
                return loop.epoch_progress.current.started, 0  # type: ignore[attr-defined]
        return found or super().start()


def _progress(loader: object, trainer: Trainer | None) -> tuple[int, int] | None:
    if trainer is None or trainer.train_dataloader is not loader:
        return None  # iterated by hand
    loop = trainer.fit_loop
    epoch = loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return epoch, loop.epoch_loop.batch_progress.current.ready


def resume_loaders(trainer: Trainer) -> None:
    """Let loaders that keep their position go on there; called when training starts.

    `configure_optimizers` asks for the number of steps, which makes Lightning 2.6 set the data up
    before it has read the checkpoint, and not again after.
    """
    loop = trainer.fit_loop
    if loop._combined_loader_states_to_load:
        loop._load_combined_loader_states()
        iter(cast(Iterable[Any], loop._data_fetcher))
