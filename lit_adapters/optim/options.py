"""Settings of an optimizer that a resumed run may change; the rest is state of the earlier run."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.optim import Optimizer

# OneCycleLR keeps its bounds in the groups, and steps between them.
OPTIONS = (
    "initial_lr",
    "max_lr",
    "min_lr",
    "lr_ratio",
    "absolute_lr",
    "weight_decay",
    "betas",
    "eps",
    "momentum",
)
CYCLED = ("betas", "momentum")  # by some schedules, which know where they stand


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings of each parameter group; take them before a checkpoint is loaded."""
    return [{key: group.get(key) for key in OPTIONS} for group in optimizer.param_groups]


def set_options(
    optimizer: Optimizer, chosen: Sequence[dict[str, Any]], schedulers: Iterable[Any]
) -> None:
    """Let ``chosen``, from `options_of`, win over what a checkpoint restored.

    The position in the schedule stays: the present rate is scaled as the initial one is, and
    momenta that a schedule moves are left to it.
    """
    every = list(_with_inner(schedulers))
    cycled = CYCLED if any(getattr(one, "cycle_momentum", False) for one in every) else ()
    for group, options in zip(optimizer.param_groups, chosen, strict=True):
        before = group.get("initial_lr")
        group.update(
            {k: value for k, value in options.items() if value is not None and k not in cycled}
        )
        if before and group["initial_lr"] != before:
            group["lr"] *= group["initial_lr"] / before
    _begin_from_initial(optimizer, every)


def _with_inner(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Schedulers, and those that they are made of."""
    for scheduler in schedulers:
        yield scheduler
        yield from _with_inner(getattr(scheduler, "_schedulers", ()))


def _begin_from_initial(optimizer: Optimizer, schedulers: Iterable[Any]) -> None:
    for scheduler in schedulers:
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]


def set_rate(optimizer: Optimizer, rate: float) -> None:
    """Give the first group this learning rate, and the others theirs in proportion.

    Raises:
        ValueError: if it is negative, which optimizers check only when they are built.
    """
    if not rate >= 0:
        raise ValueError(f"learning_rate must not be negative, got {rate}")
    first = optimizer.param_groups[0]["lr"]
    for group in optimizer.param_groups:
        group["lr"] = rate * (group["lr"] / first) if first else rate


def take_rate(optimizer: Optimizer, rate: float, schedulers: Iterable[Any]) -> None:
    """Go on from another initial rate of the first group, where the schedules stand."""
    first = optimizer.param_groups[0]["initial_lr"]
    for scheduler in schedulers:
        for group, last in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate * (last / first)
            group["initial_lr"] = rate * (group["initial_lr"] / first)
            if "absolute_lr" in group:  # whatever the rate of the others
                group["lr"] *= group["absolute_lr"] / group["initial_lr"]
                group["initial_lr"] = group["absolute_lr"]
                group["lr_ratio"] = group["absolute_lr"] / rate
        _begin_from_initial(optimizer, _with_inner([scheduler]))
