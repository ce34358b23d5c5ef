"""From tokens to batches, in an order that depends on (seed, epoch) and nothing else."""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lit_adapters.data.packing import Batches, evenly, exactly, fill, in_a_row
from lit_adapters.data.tokens import IGNORED, Tokens

_WINDOW = 50  # batches among which examples may move when grouped by length
_FILLED = 200  # the same for batches by tokens: among more examples there are more that fit
_SPARE = 0.01  # more batches than the first epoch needs, for epochs that pack less well

Batch = dict[str, Any]


def collate(examples: Sequence[Tokens], pad_id: int, packed: bool = False) -> Batch:
    """Pad examples on the right to the longest of them, or pack them: one behind the other.

    No examples make one row that trains nothing: what a device is given whose share of the last
    batch is empty, since all devices must take the same number of steps. Nothing predicts the first
    token of a sequence, so it has no label.

    Returns:
        Padded: `input_ids` (padded with `pad_id`), `attention_mask` (padded with 0) and `labels`
        (padded with -100), each int64 of shape (examples, longest). Packed: `input_ids`, `labels`
        and `position_ids`, which begin at 0 in each sequence, each int64 of shape (1, tokens), and
        `use_cache`, False: with a cache, transformers takes such a row for one sequence.
    """
    rows = examples or [Tokens(input_ids=[pad_id] * 2, labels=[IGNORED] * 2)]
    ids = [row["input_ids"] for row in rows]
    labels = [[IGNORED, *row["labels"][1:]] for row in rows]
    if packed:
        return {
            "input_ids": torch.tensor([sum(ids, [])]),
            "position_ids": torch.cat([torch.arange(len(row)) for row in ids])[None],
            "labels": torch.tensor([sum(labels, [])]),
            "use_cache": False,
        }
    return {
        "input_ids": _pad(ids, pad_id),
        "attention_mask": _pad([[1] * len(row) for row in ids], 0),
        "labels": _pad(labels, IGNORED),
    }


def _pad(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)


def sequences(batch: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Undo padding and packing: `{"input_ids": (length,), "labels": (length,)}` each."""
    if "position_ids" in batch:
        ids, labels, positions = (batch[k][0] for k in ("input_ids", "labels", "position_ids"))
        ends = [*(positions == 0).nonzero().flatten().tolist()[1:], len(positions)]
        lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
        parts = zip(ids.split(lengths), labels.split(lengths), strict=True)
        return [{"input_ids": ids, "labels": labels} for ids, labels in parts]
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
    return [{"input_ids": ids[mask], "labels": labels[mask]} for ids, mask, labels in rows]


@dataclass(frozen=True)
class TrainOrder:
    """Which examples form which batch of which epoch.

    A global batch is what all devices consume together in one step; device `rank` of `devices`
    takes every `devices`-th example of it. Several devices see the same global batches as one
    device with `devices` times the batch size, except that up to `devices - 1` examples are left
    out of each epoch (others in each), so that every device has an example at every step.

    With `batch_tokens`, a device's batch holds as many examples as fit instead. The number of
    batches is the same in every epoch all the same; a few hold less than they could.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples per device and step.
        seed: Together with the epoch, all that decides the order.
        shuffle: Whether the order is random at all.
        group_by_length: After shuffling, choose by length within windows of 50 batches, and shuffle
            the batches: padded, examples of similar length go together, for less padding; packed,
            such that batches, and what devices take of them, hold nearly the same number of tokens.
        rank: This device.
        devices: How many devices share the data.
        batch_tokens: Tokens per device and step, instead of `batch_size`; batches are filled from
            shuffled windows of about 200.
        packed: Whether the examples of a batch are concatenated, so that nothing is padded.
    """

    lengths: Sequence[int]
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    group_by_length: bool = True
    rank: int = 0
    devices: int = 1
    batch_tokens: int | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        _check_size(self.batch_size)
        _check_tokens(self.batch_tokens, self.lengths)
        if len(self.lengths) < self.devices:
            raise ValueError(
                f"{len(self.lengths)} examples cannot be shared by {self.devices} devices; "
                "use fewer devices or more examples"
            )

    def __len__(self) -> int:
        if self.batch_tokens is not None:
            return self._filled // self.devices
        usable = len(self.lengths) - len(self.lengths) % self.devices
        return math.ceil(usable / (self.batch_size * self.devices))

    def batches(self, epoch: int) -> Batches:
        """Return this device's batches of an epoch, as indices of examples."""
        if self.batch_tokens is not None:
            return self._fill(epoch, self._filled)[self.rank :: self.devices]
        return [self._share(batch) for batch in self.global_batches(epoch)]

    def _share(self, batch: list[int]) -> list[int]:
        if not (self.packed and self.shuffle and self.group_by_length):
            return batch[self.rank :: self.devices]
        sizes = [len(batch) // self.devices] * self.devices
        return evenly(batch, self.lengths, sizes)[self.rank]

    def global_batches(self, epoch: int) -> Batches:
        """Return batches by number of examples, of all devices together, the same on each."""
        size, count = self.batch_size * self.devices, len(self.lengths)
        usable = count - count % self.devices
        if not self.shuffle:
            return _chop(list(range(usable)), size)
        generator = self._generator(epoch)
        order = torch.randperm(count, generator=generator).tolist()[:usable]
        if not self.group_by_length:
            return _chop(order, size)
        batches = []
        for window in _chop(order, size * _WINDOW):
            if self.packed:
                batches += evenly(window, self.lengths, [*map(len, _chop(window, size))])
            else:
                batches += _chop(sorted(window, key=self.lengths.__getitem__), size)
        return self._shuffled(batches, generator)

    @cached_property
    def _filled(self) -> int:
        """Batches by tokens of any epoch, over all devices: a multiple of their number."""
        assert self.batch_tokens is not None
        every = range(len(self.lengths))
        needed = len(fill(every, self.lengths, self.batch_tokens, self.packed))
        first = len(self._fill(0))
        count = max(needed, math.ceil(first * (1 + _SPARE)) if first != needed else first)
        count = min(math.ceil(count / self.devices) * self.devices, len(self.lengths))
        return count - count % self.devices

    def _fill(self, epoch: int, count: int | None = None) -> Batches:
        """Return the batches by tokens of an epoch, of all devices; as many as they take if None.

        Whatever the shuffle, the whole fits into `_filled` batches when filled at once.
        """
        assert self.batch_tokens is not None
        total = len(self.lengths)
        generator = self._generator(epoch)
        shuffled = torch.randperm(total, generator=generator).tolist()
        order = shuffled if self.shuffle else list(range(total))
        share = self.batch_tokens * _FILLED * self.devices / sum(self.lengths)
        batches: Batches = []
        for window in _chop(order, max(1, math.ceil(total * share))):
            batches += fill(window, self.lengths, self.batch_tokens, self.packed)
        if count is not None:
            if len(batches) > count:
                batches = fill(order, self.lengths, self.batch_tokens, self.packed)
            batches = exactly(count, self._shuffled(batches, generator))
        return self._shuffled(batches, generator)

    def _shuffled(self, batches: Batches, generator: torch.Generator) -> Batches:
        order = torch.randperm(len(batches), generator=generator).tolist()
        return [batches[i] for i in order] if self.shuffle else batches

    def _generator(self, epoch: int) -> torch.Generator:
        seed = zlib.crc32(f"training order, seed {self.seed}, epoch {epoch}".encode())
        return torch.Generator().manual_seed(seed)


@dataclass(frozen=True)
class EvalOrder:
    """Every example exactly once over all devices, in the order of the data.

    Device `rank` takes every `devices`-th example. All devices get the same number of batches, of
    sizes that differ by at most one, or of at most `batch_tokens` tokens; where examples run out, a
    batch is empty.
    """

    lengths: Sequence[int]
    batch_size: int
    rank: int = 0
    devices: int = 1
    batch_tokens: int | None = None
    packed: bool = False

    def __post_init__(self) -> None:
        _check_size(self.batch_size)
        _check_tokens(self.batch_tokens, self.lengths)

    def __len__(self) -> int:
        if self.batch_tokens is not None:
            return max(len(self._cut(rank)) for rank in range(self.devices))
        return math.ceil(math.ceil(len(self.lengths) / self.devices) / self.batch_size)

    def batches(self, epoch: int = 0) -> Batches:
        """Return this device's batches, the same in every epoch."""
        if self.batch_tokens is not None:
            cut = self._cut(self.rank)
            return cut + [[] for _ in range(len(self) - len(cut))]
        mine = range(self.rank, len(self.lengths), self.devices)
        edges = [number * len(mine) // len(self) for number in range(len(self) + 1)]
        return [list(mine[start:end]) for start, end in zip(edges, edges[1:], strict=False)]

    def _cut(self, rank: int) -> Batches:
        assert self.batch_tokens is not None
        mine = range(rank, len(self.lengths), self.devices)
        return in_a_row(mine, self.lengths, self.batch_tokens, self.packed)


def _check_size(batch_size: int) -> None:
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is below 1; give at least 1")


def _check_tokens(batch_tokens: int | None, lengths: Sequence[int]) -> None:
    longest = max(lengths, default=0)
    if batch_tokens is not None and batch_tokens < longest:
        raise ValueError(
            f"batch_tokens {batch_tokens} is below the longest example ({longest} tokens); raise "
            f"it to {longest} or more, or lower max_length"
        )


def _chop(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
