"""GaLore beside galore-torch: a step, a step that chooses new subspaces, the peak, same weights.

    python benchmarks/galore.py [--hidden 512 1024 --layers 4 8 --rank 64 64 --rounds 5 3 --json]

Random Llamas trained whole on random tokens, all linear layers projected; one thread, shuffled
turns of whole steps: forward, backward, optimizer. Both sides wrap AdamW; ours is fused. The peak
is of two steps from nothing (optimizer state, subspaces, gradients, activations), above the model;
what has to be there, whoever steps the weights, is that of a backward pass whose gradients are
freed as they come. At the first size ours chooses exactly too, by the same call of torch as theirs.
Before that both train a few steps in exact subspaces from the same weights on the same batches, and
the difference of their weights is told as a share of the distance they moved. (A second choice
would tell nothing: signs of singular vectors hang on the last bits of a gradient.)
"""

import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from measuring import Times, against, peak_of, race, seconds_of
from reporting import Row, parser, publish
from rivals import TARGETS, llama, token_ids
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lit_adapters.optim import GaLoreEngine, Projection
from lit_adapters.optim.projection import SVD

NEVER, ALWAYS = 1_000_000, 1  # steps between two choices of the subspaces; the first step chooses
SIZES = {
    "hidden": [512, 1024],
    "layers": [4, 8],
    "vocabulary": [4096, 1024],
    "batch": [1, 1],
    "tokens": [128, 128],
    "rank": [64, 64],
    "rounds": [5, 3],
}
LR, EPS = 1e-4, 1e-12  # the two add eps at different places
Step = Callable[[], None]
Make = Callable[[nn.Module], Optimizer]


def projected(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if n.endswith(tuple(TARGETS))}


def ours(rank: int, gap: int, svd: SVD) -> Make:
    def make(model: nn.Module) -> Optimizer:
        optimizer = AdamW(model.parameters(), lr=LR, eps=EPS, weight_decay=0.0, fused=True)
        GaLoreEngine(projected(model), optimizer, Projection(rank, gap, svd=svd), seed=0)
        return optimizer

    return make


def theirs(rank: int, gap: int) -> Make:
    from galore_torch import GaLoreAdamW

    def make(model: nn.Module) -> Optimizer:
        inside = [layer.get_parameter("weight") for layer in projected(model).values()]
        known = {id(p) for p in inside}
        how = {"rank": rank, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}
        groups = [
            {"params": [p for p in model.parameters() if id(p) not in known]},
            {"params": inside, **how},
        ]
        made: Optimizer = GaLoreAdamW(groups, lr=LR, eps=EPS, no_deprecation_warning=True)
        return made

    return make


def whole(model: nn.Module) -> Optimizer:
    return AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)


def freeing(model: nn.Module) -> Optimizer:
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    return SGD(model.parameters())


def sides(rank: int, exact: bool) -> dict[str, tuple[Make | None, str | None]]:
    """What steps the weights, and the side it is compared with."""
    kept, new = "galore-torch", "galore-torch, new subspaces"
    found: dict[str, tuple[Make | None, str | None]] = {
        "forward and backward alone": (None, None),
        "forward and backward, gradients freed": (freeing, None),
        "AdamW, fused": (whole, kept),
        "ours": (ours(rank, NEVER, "randomised"), kept),
        "ours again (A/A)": (ours(rank, NEVER, "randomised"), "ours"),
        kept: (theirs(rank, NEVER), None),
        "ours, new subspaces (randomised)": (ours(rank, ALWAYS, "randomised"), new),
        "ours, new subspaces (exact)": (ours(rank, ALWAYS, "exact"), new),
        new: (theirs(rank, ALWAYS), None),
    }
    return {name: side for name, side in found.items() if exact or "exact" not in name}


def stepper(model: Any, make: Make | None, ids: Tensor) -> Step:
    optimizer = make(model) if make else None

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()

    return step


def moved(bare: nn.Module, model: nn.Module) -> Tensor:
    """How far the projected weights are from where they began."""
    layers, start = projected(model), projected(bare)
    return torch.cat(
        [
            (layer.get_parameter("weight") - start[name].get_parameter("weight")).detach().flatten()
            for name, layer in layers.items()
        ]
    )


def apart(new: Callable[[], nn.Module], rank: int, ids: Tensor, steps: int = 4) -> float:
    """How far both sides' weights are apart after some steps, as a share of what they moved."""
    ways = []
    for make in (ours(rank, NEVER, "exact"), theirs(rank, NEVER)):
        model = new()
        step = stepper(model, make, ids)
        for _ in range(steps):
            step()
        ways.append(moved(new(), model))
    return float((ways[0] - ways[1]).norm() / ways[1].norm())


def measure(size: dict[str, int], exact: bool) -> tuple[list[Row], float, dict[str, Times]]:
    def new() -> nn.Module:
        return llama(size["hidden"], size["layers"], size["vocabulary"])

    ids = token_ids(size["vocabulary"], size["batch"], size["tokens"])
    difference = apart(new, size["rank"], ids)
    all_sides = sides(size["rank"], exact)
    peaks, steps = {}, {}
    for name, (make, _) in all_sides.items():
        model = new()

        def two(model: nn.Module = model, name: str = name, make: Make | None = make) -> None:
            steps[name] = stepper(model, make, ids)
            steps[name]()
            steps[name]()

        peaks[name] = peak_of(two)
    times = race(steps, size["rounds"], warm_ups=0)
    floor = times["forward and backward alone"].median
    rows = []
    for name, (_, peer) in all_sides.items():
        ratio = against(times[name], times[peer]) if peer else {}
        rows.append(
            {
                "step": name,
                "ms": times[name].median * 1e3,
                "beyond backward, ms": (times[name].median - floor) * 1e3,
                "compared with": peer or "",
                "time, minima": ratio.get("minima"),
                "medians": ratio.get("medians"),
                "spread": times[name].spread,
                "peak, MB": peaks[name] / 1e6,
                "peak / peer": peaks[name] / peaks[peer] if peer else None,
            }
        )
    return rows, difference, times


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, "galore")
    for name, values in SIZES.items():
        made.add_argument(f"--{name}", type=int, nargs="+", default=values)
    options = made.parse_args(arguments)
    torch.set_num_threads(1)
    random.seed(0)
    warnings.filterwarnings("ignore", "This implementation of AdamW", FutureWarning)
    tables, differences, seconds = {}, {}, {}
    given = (getattr(options, name) for name in SIZES)
    for index, values in enumerate(zip(*given, strict=False)):  # as many as all options have
        size = dict(zip(SIZES, values, strict=True))
        title = f"All linear layers of {size['layers']} x {size['hidden']}, rank {size['rank']}"
        tables[title], differences[title], times = measure(size, exact=index == 0)
        seconds[title] = seconds_of(times)
    most = max(differences.values())
    notes = (
        "Process time of one thread. After four steps with one choice of exact subspaces the "
        f"weights of both sides are apart by {most:.0e} of the distance they moved, or less."
    )
    publish(
        options,
        ("transformers", "galore-torch"),
        tables,
        notes,
        weights_apart=differences,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
