"""How much memory a training step takes, and how large a micro-batch may be."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    UnsupportedFakeTensorException,
)

from lit_adapters.estimate.memory_trace import CATEGORIES, Category, Peak
from lit_adapters.estimate.rehearsal import Rehearsal

FEW, MORE = 2, 3  # groups of layers in the two runs that tell of all
MOST = 10**9  # sequences


@dataclass(frozen=True)
class Estimate:
    """Bytes of a training step.

    Attributes:
        peak: The most that is held at one time.
        parts: What the peak is made of.
        largest: The most of each kind, at its own time. Base, adapter, gradients and optimizer are
            counted tensor by tensor.
        stage: When the peak is: forward, loss, backward or step.
    """

    peak: int
    parts: dict[Category, int]
    largest: dict[Category, int]
    stage: str


def estimate(rehearsal: Rehearsal, batch_size: int | None = None) -> Estimate:
    """Return the memory of a step with this micro-batch, or with that of the training.

    Raises:
        RuntimeError: if the model decides about shapes by numbers, which there are none of.
    """
    return summary(peaks_of(rehearsal, batch_size or rehearsal.training.batch_size))


def peaks_of(rehearsal: Rehearsal, batch_size: int) -> dict[Any, Peak]:
    """Return the peaks of the parts of a step; raises as `estimate` does.

    Where a model repeats equal layers, steps of two and of three of them are run: what is held
    while the first or the last is at work, or none, lies on a straight line over their number; what
    is held between grows or shrinks from one to the other.
    """
    stack, period = repeated_layers(rehearsal.model)
    count = len(stack) // period
    try:
        if count <= MORE:
            return rehearsal.run(batch_size, _groups(stack, period))
        with _first(stack, FEW * period):
            few = rehearsal.run(batch_size, _groups(stack, period))
        with _first(stack, MORE * period):
            more = rehearsal.run(batch_size, _groups(stack, period))
    except (DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
        raise RuntimeError(
            f"{type(rehearsal.model).__name__} cannot be estimated: it computes {error}, whose "
            "shape depends on numbers; measure a short fit instead (--trainer.max_steps=3 logs "
            "memory/peak_mb)"
        ) from error
    return _on_lines(count, (FEW, few), (MORE, more))


def largest_batch(
    peaks: Callable[[int], Mapping[Any, Peak]], memory: int, start: int, farthest: int
) -> int:
    """Return the largest micro-batch whose peak is at most ``memory`` bytes; 0 if there is none.

    The peak of each part of a step is about a straight line over the batch size. What the lines
    through the batches that were run say of the answer is proven by running it, or, if it is
    beyond ``farthest``, that; where they were wrong, the new peaks make new lines.

    Args:
        peaks: Of the parts, by the micro-batch.
        memory: What there is, bytes.
        start: A micro-batch to begin with.
        farthest: Larger ones are not run.
    """
    known = {n: peaks(n) for n in (start, 2 * start)}
    farthest = max(farthest, 2 * start)

    def expected(size: int) -> int:
        return highest(known.get(size) or _read(known, size)).total

    while True:
        found = bisect_right(range(1, MOST), memory, key=expected)
        to_run = (max(1, found), found + 1) if found < farthest else (farthest, farthest // 2)
        size = next((n for n in to_run if n not in known), None)
        if size is None:
            return found
        before = expected(size)
        known[size] = peaks(size)
        if expected(size) == before:
            return found


def _read(known: Mapping[int, Mapping[Any, Peak]], size: int) -> dict[Any, Peak]:
    """Return the peaks of a micro-batch from the nearest two that are known."""
    sizes = sorted(known)
    above = min(max(1, bisect_right(sizes, size)), len(sizes) - 1)
    low, high = sizes[above - 1 : above + 1]
    return _on_lines(size, (low, known[low]), (high, known[high]))


def repeated_layers(model: nn.Module) -> tuple[nn.ModuleList, int]:
    """Return the longest list of layers, and after how many of them they repeat."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    stack = max(lists, key=len, default=nn.ModuleList())
    kinds = [_kind(layer) for layer in stack]
    count = len(kinds)
    periods = (p for p in range(1, count) if count % p == 0 and kinds[p:] == kinds[:-p])
    return stack, next(periods, max(1, count))


def _kind(layer: nn.Module) -> Any:
    """All that tells layers apart, but their numbers."""
    plain = (bool, int, float, str, type(None))
    return [
        (
            name,
            type(module),
            {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "layer_idx"},
            [(k, p.shape, p.dtype, p.requires_grad) for k, p in module.named_parameters()],
        )
        for name, module in layer.named_modules()
    ]


def _groups(stack: nn.ModuleList, period: int) -> list[list[nn.Module]]:
    layers = list(stack)
    return [layers[start : start + period] for start in range(0, len(layers), period)]


@contextmanager
def _first(stack: nn.ModuleList, count: int) -> Iterator[None]:
    """Leave out all layers but the first ones."""
    whole = stack._modules
    stack._modules = dict(list(whole.items())[:count])
    try:
        yield
    finally:
        stack._modules = whole


def _on_lines(
    place: int, first: tuple[int, Mapping[Any, Peak]], second: tuple[int, Mapping[Any, Peak]]
) -> dict[Any, Peak]:
    """Return the peaks at a place on the lines through those at two others.

    Places are numbers of layers, or of sequences.
    """
    (start, low), (end, high) = first, second

    def line(one: int, other: int) -> int:
        return one + (other - one) * (place - start) // (end - start)

    def lines(one: dict[Category, int], other: dict[Category, int]) -> dict[Category, int]:
        return {key: line(one[key], other[key]) for key in CATEGORIES}

    return {
        part: Peak(
            line(low[part].total, high[part].total),
            lines(low[part].parts, high[part].parts),
            lines(low[part].largest, high[part].largest),
        )
        for part in low.keys() & high.keys()
    }


def highest(peaks: Mapping[Any, Peak]) -> Peak:
    """Return the highest peak of all parts."""
    return max(peaks.values(), key=lambda peak: peak.total)


def summary(peaks: Mapping[Any, Peak]) -> Estimate:
    """Return what the peaks of the parts say of the whole step."""
    part, peak = max(peaks.items(), key=lambda item: item[1].total)
    largest = {key: max(p.largest[key] for p in peaks.values()) for key in CATEGORIES}
    return Estimate(peak.total, peak.parts, largest, part[0])
