"""Making up for the splits a source does not have."""

import math
from collections.abc import Sequence

import torch

from lit_adapters.data.records import Records, Splits


def complete_splits(splits: Splits, val_size: int | float, seed: int) -> Splits:
    """Return all three splits: validation held out of train if missing, test = validation."""
    train, validation = splits["train"], splits.get("validation")
    if validation is None:
        train, validation = hold_out(train, val_size, seed)
    return {"train": train, "validation": validation, "test": splits.get("test", validation)}


def held_out_of(val_size: int | float, sizes: Sequence[int]) -> list[int | float]:
    """Return what to hold out of each source, by its number of records.

    A share is that of each source. A count is of all together, and each gives in proportion to its
    size; the fractions that are left over go where they are largest.

    Raises:
        ValueError: a count is not below the number of all records.
    """
    total = sum(sizes)
    if len(sizes) < 2 or val_size < 1 or val_size % 1:
        return [val_size] * len(sizes)
    if val_size >= total:
        raise ValueError(
            f"val_size {val_size} holds out {val_size} of {total} records of {len(sizes)} sources "
            "and leaves none to train on; lower val_size, or set it to 0"
        )
    exact = [int(val_size) * size / total for size in sizes]
    counts = [math.floor(share) for share in exact]
    by_fraction = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    room = [i for i in by_fraction if counts[i] + 1 < sizes[i]]
    for i in room[: int(val_size) - sum(counts)]:
        counts[i] += 1
    return list(counts)


def hold_out(records: Records, val_size: int | float, seed: int) -> tuple[Records, Records]:
    """Split records into (train, validation) by a seeded permutation; each keeps its order.

    Args:
        records: All records.
        val_size: Below 1 a share of the records (at least one record unless 0), else a count.
        seed: Decides which records are held out; nothing else does.

    Raises:
        ValueError: `val_size` is negative, no whole count, or leaves nothing to train on.
    """
    if not 0 <= val_size < math.inf or (val_size >= 1 and val_size != int(val_size)):
        raise ValueError(
            f"val_size {val_size} is neither a share in [0, 1) nor a whole count; give one"
        )
    share = max(1, round(len(records) * val_size)) if val_size > 0 else 0
    count = int(val_size) if val_size >= 1 else share
    if count >= len(records):
        raise ValueError(
            f"val_size {val_size} holds out {count} of {len(records)} records and leaves none to "
            "train on; lower val_size, or set it to 0 to train without validation"
        )
    generator = torch.Generator().manual_seed(seed)
    held = set(torch.randperm(len(records), generator=generator)[:count].tolist())
    train = [index for index in range(len(records)) if index not in held]
    return records.take(train), records.take(sorted(held))
