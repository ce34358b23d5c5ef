"""New subspaces: chosen from the gradients of a whole window, entered, and taken back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.optim import Optimizer

from lit_adapters.optim.exchange import share_subspace, whole_gradient
from lit_adapters.optim.projection import Projector, rotate, subspace
from lit_adapters.optim.rows import as_rows_of, own_rows
from lit_adapters.optim.shadow import Shadowed

FIRST_MOMENTS = ("exp_avg", "momentum_buffer")  # linear in the gradient, so they can be rotated


def choose_subspaces(turn: Sequence[Shadowed], optimizer: Optimizer, ranks: int, seed: int) -> None:
    """Choose subspaces from the gradients that are kept, and project these.

    Args:
        turn: As many weights as there are ranks, or fewer; each rank computes one subspace.
        optimizer: Steps their shadows.
        ranks: That train together.
        seed: Of the run.
    """
    rank = dist.get_rank() if ranks > 1 else 0
    for place, one in enumerate(turn):  # all at first: they wait for each other
        gradient = whole_gradient(one, ranks)
        if place == rank:
            mine = gradient
    del gradient
    found = _subspace(turn[rank], mine, seed) if rank < len(turn) else None
    for place, one in enumerate(turn):
        _enter(one, found if ranks == 1 else share_subspace(one, found, place), optimizer)


def take_back(one: Shadowed, optimizer: Optimizer) -> None:
    """Return to the subspace and the optimizer's state from before this window chose one."""
    if one.replaced is not None:
        one.projector, one.age, changed = one.replaced
        if changed is not None:
            optimizer.state[one.shadow] = changed
        one.replaced = None


def _subspace(one: Shadowed, gradient: Tensor, seed: int) -> Projector | None:
    """Return the subspace of a gradient of all rows; None if it is not finite."""
    if not torch.stack(gradient.aminmax()).isfinite().all():  # without temporaries of its size
        return None
    how = one.settings
    generator = torch.Generator().manual_seed(one.seed(seed))
    with torch.autocast(gradient.device.type, enabled=False):
        return subspace(gradient.flatten(1), how.rank, how.side, how.svd, generator)


def _enter(one: Shadowed, new: Projector | None, optimizer: Optimizer) -> None:
    """Change to another subspace, if there is one, and project the gradient that is kept."""
    gradient, one.kept, one.shadow.grad = one.kept, None, None
    assert gradient is not None
    if new is not None:
        old = one.projector
        changed = None if old is None else _carry_over(one, old, new, optimizer)
        one.replaced = (old, one.age, changed)
        one.projector, one.age = new, 0
    if one.projector is not None:
        one.add_gradient(one.projected(gradient))
    else:  # whoever looks at gradients before the step is to see it
        one.add_gradient(torch.full_like(own_rows(one.shadow), torch.nan))


def _carry_over(
    one: Shadowed, old: Projector, new: Projector, optimizer: Optimizer
) -> dict[str, Any] | None:
    """Fit the optimizer's state to another subspace; return what it was if it is changed."""
    state = optimizer.state.get(one.shadow)
    if state is None or one.settings.moments == "keep":
        return None
    if one.settings.moments == "reset":
        return optimizer.state.pop(one.shadow)
    turned = {
        key: as_rows_of(rotate(own_rows(state[key]), old, new).to(state[key].dtype), state[key])
        for key in FIRST_MOMENTS
        if isinstance(state.get(key), Tensor)
    }
    optimizer.state[one.shadow] = {**state, **turned}
    return state
