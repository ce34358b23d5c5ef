"""What ranks that train one model tell each other about projected gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist

from lit_adapters.optim.projection import Projector
from lit_adapters.optim.rows import all_rows, as_rows_of
from lit_adapters.optim.shadow import Shadowed


def average_projected(projected: Sequence[Shadowed]) -> bool:
    """Average the low-rank gradients of weights that every rank holds, in one exchange.

    A weight that some ranks alone used counts as zero on the others. A gradient that is to choose a
    subspace is left as it is, to `whole_gradient`; that of a rank without one becomes zero.

    Returns:
        Whether any rank has a gradient of such a weight.
    """
    replicas = [one for one in projected if not one.is_cut]
    if not replicas:
        return False
    ready = [one for one in replicas if not one.due]
    has = torch.tensor([one.shadow.grad is not None for one in replicas])
    mine = [torch.zeros_like(o.shadow) if o.shadow.grad is None else o.shadow.grad for o in ready]
    flat = torch.cat([has.to(replicas[0].shadow), *(R.flatten() for R in mine)])
    dist.all_reduce(flat)
    counts, *sums = flat.split([len(replicas), *(R.numel() for R in mine)])
    means = {
        id(one): total.view_as(one.shadow).to(one.shadow.dtype) / dist.get_world_size()
        for one, total in zip(ready, sums, strict=True)
    }
    used = [one for one, count in zip(replicas, counts.tolist(), strict=True) if count]
    for one in used:
        if one.due and one.shadow.grad is None:
            one.kept, one.shadow.grad = torch.zeros_like(one.weight), torch.zeros_like(one.shadow)
        elif not one.due:
            one.shadow.grad = means[id(one)]
    return bool(used)


def whole_gradient(one: Shadowed, ranks: int) -> Tensor:
    """Return the gradient kept for a subspace, of all rows and all ranks; every rank calls it.

    That of a weight that every rank holds is averaged in place.
    """
    assert one.kept is not None
    if one.is_cut:
        return all_rows(as_rows_of(one.kept, one.weight))
    if ranks > 1:
        one.kept = one.kept.contiguous()
        dist.all_reduce(one.kept)
        one.kept /= ranks
    return one.kept


def share_subspace(one: Shadowed, found: Projector | None, source: int) -> Projector | None:
    """Return what rank ``source`` found, None included; every rank calls it.

    Each then has the same numbers, whatever its device makes of a decomposition.
    """
    received = {}
    for side, shape in one.bases().items():
        basis = torch.full(shape, torch.nan, dtype=one.weight.dtype, device=one.weight.device)
        mine = None if found is None else getattr(found, side)
        if mine is not None and dist.get_rank() == source:
            basis = mine
        dist.broadcast(basis, source)
        received[side] = basis
    if not all(basis.isfinite().all() for basis in received.values()):
        return None
    return Projector(received.get("left"), received.get("right"))
