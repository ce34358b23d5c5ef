"""An iterable over batches that can be resumed in the middle of an epoch."""

import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from lit_adapters.data.batches import Batch, EvalOrder, TrainOrder, collate
from lit_adapters.data.tokens import Tokens


class BatchLoader:
    """Batches of one split; each iteration is one epoch.

    Deliberately no `torch.utils.data.DataLoader`, whose sampler a trainer would replace: the
    order is already shared among devices, seeded and resumable. Iterating neither reads nor
    advances the global random state, so that loading never shifts a model's dropout.

    Iteration is lazy: which epoch, and how many of its batches to skip, is settled when the first
    batch is asked for. Skipping costs nothing, since skipped batches are never built.

    Args:
        examples: The tokenised split.
        order: Which examples form which batch.
        pad_id: Token id for padding; it is masked, so any id of the vocabulary will do.
        num_workers: Worker processes; 0 collates in this process.
        packed: Concatenate the examples of a batch instead of padding them.
        pin_memory: Put batches where an accelerator can fetch them beside the computation.
    """

    def __init__(
        self,
        examples: Sequence[Tokens],
        order: TrainOrder | EvalOrder,
        pad_id: int,
        num_workers: int = 0,
        packed: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self.examples = examples
        self.order = order
        self.pad_id = pad_id
        self.num_workers = num_workers
        self.packed = packed
        self.pin_memory = pin_memory
        self._at = (0, 0)  # epoch, batches of it handed out
        self._next = (0, 0)  # where the next iteration begins

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        epoch, done = self.start()
        batches: DataLoader[Tokens] = DataLoader(
            self.examples,  # type: ignore[arg-type]  # a sequence is all a DataLoader needs
            batch_sampler=self.order.batches(epoch)[done:],
            collate_fn=partial(collate, pad_id=self.pad_id, packed=self.packed),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(epoch),  # or it draws from the global one
        )
        for batch in batches:
            done += 1
            self._at, self._next = (epoch, done), (epoch + 1, 0)
            yield batch

    def start(self) -> tuple[int, int]:
        """Return where an iteration begins: the epoch, and the batches of it to leave out."""
        return self._next

    def state_dict(self) -> dict[str, int]:
        """Return the position, and a checksum of the order to recognise it by."""
        epoch, done = self._at
        return {"epoch": epoch, "batches_done": done, "order": self._checksum()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where the state was taken; warn if the order is another."""
        epoch, done = state["epoch"], state["batches_done"]
        if state["order"] != self._checksum():
            warnings.warn(
                f"the order of batches in epoch {epoch} is not the one of the checkpoint: the "
                "data, seed, batch_size, batch_tokens, max_length, group_by_length or number of "
                f"devices has changed; the epoch goes on after batch {done} of the new order, so "
                "that some of its examples come twice and others not at all. To avoid that, resume "
                "with the settings of the checkpoint, or from a checkpoint of an epoch's end",
                stacklevel=2,
            )
        self._at = self._next = (epoch, done) if done < len(self) else (epoch + 1, 0)

    def _checksum(self) -> int:
        # rank 0: a trainer saves the state of one device and loads it on all
        return zlib.crc32(repr(replace(self.order, rank=0)).encode())
