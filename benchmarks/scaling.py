"""How time and memory grow with rank, layers, length of sequences, and adapters held at a time.

    python benchmarks/scaling.py [--axes rank layers tokens adapters --rounds 5 --hidden 256 --json]

For each axis LoRA takes training steps at several points, ours and PEFT's, all in shuffled turns of
one thread. The exponent is ``b`` of ``y = a x^b``, fitted in logarithms to all points, with its
standard error. For the rank it is that of what comes on top of the frozen base, whose own step is
raced along, since a LoRA of rank 0 is not free; for the others it is that of the whole. "peak" is
above weights and optimizer state in one step; "held" are the bytes of all adapters, one of which is
trained; "switch" is putting another one on the model.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import peft
import torch
from measuring import Step, Times, exponent, peak_of, race, seconds_of
from reporting import Row, parser, publish
from rivals import TARGETS, llama, sharing, token_ids, trained, with_peft
from step import bound_loss, stock_loss
from torch import Tensor, nn
from torch.optim import AdamW

from lit_adapters import AdapterSet, LoRA, attach
from lit_adapters.blocks import make_lean

POINTS = {
    "rank": [4, 8, 16, 32, 64, 128],
    "layers": [1, 2, 4, 8],
    "tokens": [64, 128, 256, 512, 1024],
    "adapters": [1, 2, 4, 8, 16],
}
OURS, PEFT, BOUND = "ours", "PEFT", "frozen base"


@dataclass
class Side:
    """A point of one side: what is timed, and what was counted."""

    step: Step
    peak: int
    switch: Step | None = None
    held: int = 0


def stepper(model: nn.Module, ids: Tensor, loss: Callable[..., Tensor] = stock_loss) -> Step:
    parameters = trained(model)
    optimizer = AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> None:
        loss(model, ids).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    step()  # makes the optimizer's state
    return step


def config(rank: int) -> Any:
    return peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)


def our_many(model: nn.Module, rank: int, count: int) -> tuple[Step, int]:
    """Hold ``count`` adapters; return a switch, and the bytes that they take."""
    adapters = AdapterSet(model)
    for number in range(count):
        adapters.add(f"a{number}", LoRA(rank, 2 * rank, targets=TARGETS), seed=number)
    held = {
        id(p): p.nbytes
        for one in adapters._adapters.values()
        for a in one
        for p in a[2].parameters()
    }
    names = cycle(adapters.names)
    return lambda: adapters.activate(next(names)), sum(held.values())


def peft_many(model: Any, rank: int, count: int) -> tuple[nn.Module, Step, int]:
    adapted: Any = with_peft(model, config(rank))
    for number in range(1, count):
        adapted.add_adapter(f"a{number}", config(rank))
    adapted.set_adapter("default")
    held = sum(p.nbytes for n, p in adapted.named_parameters() if "lora_" in n)
    names = cycle(adapted.peft_config)
    return adapted, lambda: adapted.set_adapter(next(names)), held


def point(axis: str, value: int, options: argparse.Namespace) -> dict[str, Side]:
    """All sides of one point; PEFT's shares the frozen weights of ours."""
    sizes = {"rank": options.rank, "layers": options.layers, "tokens": options.tokens}
    sizes = {**sizes, "adapters": 1, axis: value}
    bare = llama(options.hidden, sizes["layers"], options.vocabulary).requires_grad_(False)
    ids = token_ids(options.vocabulary, 1, sizes["tokens"])
    rank = sizes["rank"]
    mine = sharing(bare)
    if axis == "adapters":
        switch, held = our_many(mine, rank, value)
        theirs, their_switch, their_held = peft_many(sharing(bare), rank, value)
    else:
        attach(mine, LoRA(rank, 2 * rank, targets=TARGETS), seed=0)
        theirs = with_peft(sharing(bare), config(rank))
        switch = their_switch = None
        held = their_held = 0
    make_lean(mine)
    found = {}
    for name, model, change, size in (
        (OURS, mine, switch, held),
        (PEFT, theirs, their_switch, their_held),
    ):
        step = stepper(model, ids)
        found[name] = Side(step, peak_of(step), change, size)
    if axis == "rank":
        step = stepper(bare, ids, bound_loss)
        found[BOUND] = Side(step, peak_of(step))
    return found


def measure(
    axis: str, options: argparse.Namespace
) -> tuple[list[Row], list[Row], dict[str, Times]]:
    """The exponents and the points of one axis, and every turn."""
    values = options.points or POINTS[axis]
    points = {value: point(axis, value, options) for value in values}
    steps = {f"{v} {n}": side.step for v, all_ in points.items() for n, side in all_.items()}
    times = race(steps, options.rounds, warm_ups=1)
    ys: dict[tuple[str, str], list[float]] = {}
    rows: list[Row] = []
    switches = {
        f"{v} {n}": side.switch
        for v, all_ in points.items()
        for n, side in all_.items()
        if side.switch is not None
    }
    switching = race(switches, options.rounds, warm_ups=1)
    for value, all_sides in points.items():
        row: dict[str, Any] = {"axis": axis, "at": value}
        for name, side in all_sides.items():
            seconds, peak = times[f"{value} {name}"].least, float(side.peak)
            row |= {f"{name}, ms": seconds * 1e3, f"{name}, peak MB": peak / 1e6}
            if axis == "rank" and name != BOUND:
                seconds -= times[f"{value} {BOUND}"].least
                peak -= all_sides[BOUND].peak
            if name != BOUND:
                ys.setdefault(("time of a step", name), []).append(seconds)
                ys.setdefault(("peak of a step", name), []).append(peak)
            if side.switch is not None:
                changed = switching[f"{value} {name}"].least
                row |= {f"{name}, switch ms": changed * 1e3, f"{name}, held MB": side.held / 1e6}
                ys.setdefault(("time of a switch", name), []).append(changed)
                ys.setdefault(("bytes of all adapters", name), []).append(float(side.held))
        rows.append(row)
    return (
        exponents(axis, values, ys),
        rows,
        {**times, **{f"{n} switch": t for n, t in switching.items()}},
    )


def exponents(
    axis: str, values: Sequence[int], ys: dict[tuple[str, str], list[float]]
) -> list[Row]:
    found: list[Row] = []
    for what in dict.fromkeys(what for what, _ in ys):
        row: dict[str, Any] = {"axis": axis, "of": what + (" above frozen base" * (axis == "rank"))}
        for name in (OURS, PEFT):
            series = ys[what, name]
            if min(series) > 0:
                row[name], row[f"{name}, +-"] = exponent(values, series)
            else:  # a difference of two times that is lost in their noise
                row[name], row[f"{name}, +-"] = "below noise", None
        found.append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "scaling")
    sizes = {"hidden": 256, "layers": 2, "vocabulary": 1024, "tokens": 128, "rank": 8, "rounds": 5}
    for name, value in sizes.items():
        made.add_argument(f"--{name}", type=int, default=value)
    made.add_argument("--axes", nargs="+", default=list(POINTS), choices=list(POINTS))
    made.add_argument("--points", nargs="*", type=int, default=[], help="on every axis")
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    fits: list[Row] = []
    tables: dict[str, list[Row]] = {"Exponents": fits}
    seconds = {}
    for axis in options.axes:
        more, tables[f"Points: {axis}"], times = measure(axis, options)
        fits += more
        seconds[axis] = seconds_of(times)
    notes = "Process time of one thread; minima."
    publish(options, ("transformers", "peft"), tables, notes, seconds=seconds)


if __name__ == "__main__":
    main()
