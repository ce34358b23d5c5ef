"""How much memory a training step takes, and how large a micro-batch may be."""

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
LEAP = 64  # how far beyond the batches that were run the next may be


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
    return _extrapolated(few, more, count)


def largest_batch(peaks: Callable[[int], Mapping[Any, Peak]], memory: int, start: int) -> int:
    """Return the largest micro-batch whose peak is at most ``memory`` bytes; 0 if there is none.

    The peak of each part of a step is about a straight line over the batch size. A guess is where
    the first of these lines leaves the memory; the answer is one that was run and fits, while the
    next one was run and does not.

    Args:
        peaks: Of the parts, by the micro-batch.
        memory: What there is, bytes.
        start: A micro-batch to begin with.
    """
    known = {n: peaks(n) for n in (max(2, start) // 2, max(2, start))}
    while True:
        fits = max((n for n, p in known.items() if highest(p).total <= memory), default=0)
        over = min((n for n, p in known.items() if highest(p).total > memory), default=None)
        if over == fits + 1:
            return fits
        sizes = sorted(known)
        low, high = (fits, over) if fits and over else sizes[-2:] if fits else sizes[:2]
        farthest = over - 1 if over else LEAP * sizes[-1]
        guess = min(
            (
                low + (memory - part.total) * (high - low) // slope
                for key, part in known[low].items()
                if (slope := known[high][key].total - part.total) > 0
            ),
            default=farthest,
        )
        guess = min(max(guess, fits + 1), farthest)
        known[guess] = peaks(guess)


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


def _extrapolated(few: dict[Any, Peak], more: dict[Any, Peak], groups: int) -> dict[Any, Peak]:
    """Return the peaks of all layers from those of `FEW` and `MORE` groups of them."""

    def line(first: int, second: int) -> int:
        return first + (second - first) // (MORE - FEW) * (groups - FEW)

    def lines(first: dict[Category, int], second: dict[Category, int]) -> dict[Category, int]:
        return {key: line(first[key], second[key]) for key in CATEGORIES}

    return {
        part: Peak(
            line(few[part].total, more[part].total),
            lines(few[part].parts, more[part].parts),
            lines(few[part].largest, more[part].largest),
        )
        for part in few.keys() & more.keys()
    }


def highest(peaks: Mapping[Any, Peak]) -> Peak:
    """Return the highest peak of all parts."""
    return max(peaks.values(), key=lambda peak: peak.total)


def summary(peaks: Mapping[Any, Peak]) -> Estimate:
    """Return what the peaks of the parts say of the whole step."""
    part, peak = max(peaks.items(), key=lambda item: item[1].total)
    largest = {key: max(p.largest[key] for p in peaks.values()) for key in CATEGORIES}
    return Estimate(peak.total, peak.parts, largest, part[0])
