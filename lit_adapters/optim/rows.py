"""Matrices of which each rank holds some rows, as FSDP2 cuts them."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def is_cut(tensor: Tensor) -> bool:
    """Whether each rank holds some rows of ``tensor``.

    Raises:
        ValueError: if it is cut in another way.
    """
    if not isinstance(tensor, DTensor):
        return False
    if tuple(tensor.placements) != (Shard(0),):
        raise ValueError(
            f"a weight of shape {tuple(tensor.shape)} is placed as {tensor.placements} on a mesh "
            f"of {tuple(tensor.device_mesh.shape)} ranks; GaLore understands rows over one "
            "dimension, as fully_shard(model, mesh=mesh['data_parallel']) cuts them"
        )
    return True


def own_rows(tensor: Tensor) -> Tensor:
    """Return what this rank holds; what is written there is written to ``tensor``."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_rows_of(rows: Tensor, like: Tensor) -> Tensor:
    """Return this rank's ``rows`` as its part of a tensor that is cut as ``like``, if that is.

    Args:
        rows: Contiguous; may have other columns than ``like``.
        like: (m, ...).
    """
    if not isinstance(like, DTensor):
        return rows
    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placed = like.device_mesh, like.placements
    return DTensor.from_local(rows, mesh, placed, run_check=False, shape=shape, stride=stride)


def all_rows(tensor: Tensor) -> Tensor:
    """Return the whole of what may be cut; every rank calls it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def place_of_rows(tensor: Tensor) -> int:
    """Return the number of this rank among those that hold rows; 0 if ``tensor`` is not cut."""
    return tensor.device_mesh.get_local_rank() if isinstance(tensor, DTensor) else 0


@torch.no_grad()
def keep_own_gradient(parameter: Tensor) -> None:
    """Copy a gradient out of the buffer of all gradients of its unit, which it would keep alive.

    FSDP2 reduces them into one. Those that are projected are not needed any longer.
    """
    gradient = parameter.grad
    if gradient is None:
        return
    local = own_rows(gradient)
    if local.untyped_storage().nbytes() > local.nbytes:
        parameter.grad = gradient.clone()
