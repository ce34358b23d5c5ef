"""From tokens to padded batches, in an order that depends on (seed, epoch) and nothing else."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_adapters.data.tokens import IGNORED, Tokens

_WINDOW = 50  # batches among which examples may move when grouped by length

Batch = dict[str, Tensor]


def collate(examples: Sequence[Tokens], pad_id: int) -> Batch:
    """Pad examples on the right to the longest of them.

    No examples make one row that trains nothing: what a device is given whose share of the last
    batch is empty, since all devices must take the same number of steps.

    Returns:
        `input_ids` (padded with `pad_id`), `attention_mask` (padded with 0) and `labels` (padded
        with -100), each int64 of shape (examples, longest).
    """
    rows = examples or [Tokens(input_ids=[pad_id] * 2, labels=[IGNORED] * 2)]
    return {
        "input_ids": _pad([row["input_ids"] for row in rows], pad_id),
        "attention_mask": _pad([[1] * len(row["input_ids"]) for row in rows], 0),
        "labels": _pad([row["labels"] for row in rows], IGNORED),
    }


def _pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def sequences(batch: Mapping[str, Tensor]) -> list[Batch]:
    """Undo the padding: one `{"input_ids": (length,), "labels": (length,)}` per row."""
    return [
        {"input_ids": ids[mask.bool()], "labels": labels[mask.bool()]}
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


@dataclass(frozen=True)
class TrainOrder:
    """Which examples form which batch of which epoch.

    A global batch is what all devices consume together in one step; device `rank` of `devices`
    takes every `devices`-th example of it. Several devices see the same global batches as one
    device with `devices` times the batch size, except that up to `devices - 1` examples are left
    out of each epoch (others in each), so that every device has an example at every step.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per device and step.
        seed: Together with the epoch, all that decides the order.
        shuffle: Whether the order is random at all.
        group_by_length: Batch examples of similar length: after shuffling, sort by length within
            windows of 50 batches, and shuffle the batches. Less padding, still a random order.
        rank: This device.
        devices: How many devices share the data.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    group_by_length: bool = True
    rank: int = 0
    devices: int = 1

    def __post_init__(self) -> None:
        _check_size(self.batch_size)
        if len(self.lengths) < self.devices:
            raise ValueError(
                f"{len(self.lengths)} examples cannot be shared by {self.devices} devices; "
                "use fewer devices or more examples"
            )

    def __len__(self) -> int:
        usable = len(self.lengths) - len(self.lengths) % self.devices
        return math.ceil(usable / (self.batch_size * self.devices))

    def batches(self, epoch: int) -> list[list[int]]:
        """Return this device's batches of an epoch, as indices of examples."""
        return [batch[self.rank :: self.devices] for batch in self.global_batches(epoch)]

    def global_batches(self, epoch: int) -> list[list[int]]:
        """Return the batches of all devices together; the same on every device."""
        size, count = self.batch_size * self.devices, len(self.lengths)
        usable = count - count % self.devices
        if not self.shuffle:
            return _chop(list(range(usable)), size)
        seed = zlib.crc32(f"training order, seed {self.seed}, epoch {epoch}".encode())
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator).tolist()[:usable]
        if not self.group_by_length:
            return _chop(order, size)
        batches = []
        for window in _chop(order, size * _WINDOW):
            batches += _chop(sorted(window, key=self.lengths.__getitem__), size)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass(frozen=True)
class EvalOrder:
    """Every example exactly once over all devices, in the order of the data.

    Device `rank` takes every `devices`-th example. All devices get the same number of batches,
    of sizes that differ by at most one; where examples run out, a batch is empty.
    """

    examples: int
    batch_size: int
    rank: int = 0
    devices: int = 1

    def __post_init__(self) -> None:
        _check_size(self.batch_size)

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.examples / self.devices) / self.batch_size)

    def batches(self, epoch: int = 0) -> list[list[int]]:
        """Return this device's batches, the same in every epoch."""
        mine = list(range(self.rank, self.examples, self.devices))
        edges = [number * len(mine) // len(self) for number in range(len(self) + 1)]
        return [mine[start:end] for start, end in zip(edges, edges[1:], strict=False)]


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; give at least 1")


def _chop(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
