"""How the benchmarks measure: turns in shuffled order, peaks by the allocator, saved activations.

Time on a CPU is what the process spent (one thread, so other work on the machine hardly enters),
with the wall clock beside it; on CUDA it is the wall clock around a synchronised step. Ratios are
of one run: of minima, which an identical pair strays from 1.00 least, and of medians.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


@dataclass
class Times:
    """Seconds of each turn of one side."""

    spent: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def least(self) -> float:
        """Of what was spent."""
        return min(self.spent)

    @property
    def median(self) -> float:
        """Of what was spent."""
        return statistics.median(self.spent)

    @property
    def spread(self) -> float:
        """How far the turns lie apart: their middle half, relative to the median."""
        if len(self.spent) < 4:
            return max(self.spent) / min(self.spent) - 1
        first, middle, third = statistics.quantiles(self.spent, n=4)
        return (third - first) / middle

    def add(self, spent: float, wall: float) -> None:
        """Record a turn."""
        self.spent.append(spent)
        self.wall.append(wall)


def on_cuda(device: str) -> bool:
    return device.startswith("cuda")


def timed(step: Step, device: str = "cpu") -> tuple[float, float]:
    """Return the seconds that ``step`` spends, and those of the wall clock."""
    if on_cuda(device):
        torch.cuda.synchronize()
    start, wall = time.process_time(), time.perf_counter()
    step()
    if on_cuda(device):
        torch.cuda.synchronize()
    spent, wall = time.process_time() - start, time.perf_counter() - wall
    return (wall if on_cuda(device) else spent), wall


def race(
    sides: Mapping[str, Step],
    rounds: int,
    device: str = "cpu",
    prepare: Mapping[str, Step] | None = None,
    warm_ups: int = 2,
) -> dict[str, Times]:
    """Run all sides in shuffled turns.

    Args:
        sides: What to time.
        rounds: Turns of each that count.
        device: Where they run.
        prepare: Run before each turn of a side, not timed.
        warm_ups: Turns of each before those.
    """
    times = {name: Times() for name in sides}
    order = list(sides)
    for turn in range(warm_ups + rounds):
        random.shuffle(order)
        for name in order:
            if prepare and name in prepare:
                prepare[name]()
            seconds = timed(sides[name], device)
            if turn >= warm_ups:
                times[name].add(*seconds)
    return times


def against(mine: Times, peer: Times) -> dict[str, float]:
    """Ratios of two sides of a race: of minima, of medians, of the wall clock's medians."""
    return {
        "minima": mine.least / peer.least,
        "medians": mine.median / peer.median,
        "wall": statistics.median(mine.wall) / statistics.median(peer.wall),
    }


def seconds_of(times: Mapping[str, Times]) -> dict[str, Any]:
    """Every turn, for a JSON file, to the microsecond."""
    return {
        name: {kind: [round(s, 6) for s in turns] for kind, turns in asdict(one).items()}
        for name, one in times.items()
    }


def peak_of(step: Step, device: str = "cpu") -> int:
    """Bytes held at most above what was held before: by the allocator, so it does not vary.

    The profiler does not see what was there before and is freed. Counted from an earlier step on,
    which it then does see, peaks were the same.
    """
    if on_cuda(device):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    return most_held(recorded)


def most_held(recorded: Any) -> int:
    """The peak of the allocator's events in a profile."""
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def saved_bytes(model: nn.Module, forward: Step) -> int:
    """Bytes of activations that autograd keeps for the backward pass of ``forward``.

    Each storage counts once, those of weights do not. Layers under gradient checkpointing keep
    what they are called with, and only that counts.
    """
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:  # held, or another would be given its address
            kept[storage.data_ptr()] = (storage.nbytes(), tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(size for size, _ in kept.values())


def exponent(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return ``b`` of the ``y = a x^b`` that fits best in logarithms, and its standard error."""
    u, v = [math.log(x) for x in xs], [math.log(y) for y in ys]
    b, a = statistics.linear_regression(u, v)
    if len(u) < 3:
        return b, math.nan
    residual = sum((y - a - b * x) ** 2 for x, y in zip(u, v, strict=True))
    spread = sum((x - statistics.fmean(u)) ** 2 for x in u)
    return b, math.sqrt(residual / (len(u) - 2) / spread)
