"""Several sources of records in one training set, by weight."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def weights_of(path: str | Sequence[str] | Mapping[str, float]) -> dict[str, float | None]:
    """Return the sources of a `path` option, each with its weight, None where none was given.

    Raises:
        ValueError: There is no source, one comes twice, or a weight is no positive number.
    """
    if isinstance(path, str):
        return {path: None}
    twice = [name for name, count in Counter(list(path)).items() if count > 1]
    if twice or not path:
        found = f"lists {twice[0]} twice" if twice else "names no source"
        raise ValueError(f"path {found}; name each once (weights: {{a.jsonl: 3, b.jsonl: 1}})")
    if not isinstance(path, Mapping):
        return dict.fromkeys(path)
    for name, weight in path.items():
        if isinstance(weight, bool) or not 0 < weight < math.inf:
            raise ValueError(f"the weight {weight} of {name} is no positive number; give one")
    return dict(path)


def source_names(paths: Sequence[str]) -> list[str]:
    """Return a short name for each source: the stem of its file where that tells them apart."""
    if len(paths) == 1:
        return [""]
    stems = [Path(path).stem if Path(path).suffix else Path(path).name for path in paths]
    return stems if len(set(stems)) == len(stems) else list(paths)


def shares(sizes: Sequence[int], weights: Sequence[float | None], seed: int) -> list[list[int]]:
    """Return which records of each source an epoch holds, as indices; some may come repeatedly.

    Without weights every record of every source once. With weights w, source i gives the share
    w_i / sum(w) of an epoch, which is as long as it must be for every record of every source to
    come at least once: the source that is largest for its weight comes once, the others are
    repeated, whole as often as fits, and a part of them, drawn by the seed, once more.

    Args:
        sizes: Records of each source.
        weights: Of each source; None for all of them or for none.
        seed: Decides that part; nothing else does.
    """
    given = [weight for weight in weights if weight is not None]
    if not given:
        return [list(range(size)) for size in sizes]
    per_weight = max(size / weight for size, weight in zip(sizes, given, strict=True))
    return [
        _repeated(size, max(size, round(weight * per_weight)), seed)
        for size, weight in zip(sizes, given, strict=True)
    ]


def _repeated(size: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    once_more = torch.randperm(size, generator=generator)[: count % size].tolist()
    return [*list(range(size)) * (count // size), *sorted(once_more)]
