"""Tensors that are spread over ranks: the whole from all parts, and a rank's part of a whole."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

WRAPPER = "_fsdp_wrapped_module"  # what FSDP1 puts into the names of what it wraps


class Pieces(NamedTuple):
    """How FSDP1 cuts a parameter: consecutive elements, each rank's after those of the one below.

    `note_pieces` keeps it on the parameter, which FSDP1 makes one-dimensional.
    """

    shape: torch.Size  # of the whole
    counts: list[int]  # elements of each rank
    group: Any


def plain_name(name: str) -> str:
    """The name of a parameter or module as it was before FSDP1 wrapped anything."""
    if WRAPPER not in name:
        return name
    return ".".join(part for part in name.split(".") if part != WRAPPER)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter on one device."""
    pieces = pieces_of(parameter)
    return parameter.shape if pieces is None else pieces.shape


def pieces_of(parameter: Tensor) -> Pieces | None:
    """How FSDP1 cut ``parameter``; None if it did not."""
    return getattr(parameter, "pieces", None)


def note_pieces(
    parameters: Sequence[nn.Parameter], shapes: Sequence[torch.Size], group: Any
) -> None:
    """Keep on ``parameters``, which FSDP1 has cut, what they were; on all ranks of ``group``."""
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, [p.numel() for p in parameters], group=group)
    for number, (parameter, shape) in enumerate(zip(parameters, shapes, strict=True)):
        mine = [of_rank[number] for of_rank in counts]
        parameter.pieces = Pieces(shape, mine, group)  # type: ignore[attr-defined]
        parameter.whole_ndim = len(shape)  # type: ignore[attr-defined]


def whole(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return all of what every rank holds a part of; every rank calls it.

    Args:
        tensor: ``parameter`` itself, or a tensor that is cut as it is, such as a moment of it; any
            other is returned as it is.
        parameter: Of the model.
    """
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    pieces = pieces_of(parameter)
    if pieces is None or tensor.shape != parameter.shape:
        return tensor
    most = max(pieces.counts)
    padded = tensor.new_zeros(most)
    padded[: tensor.numel()] = tensor
    every = tensor.new_empty(len(pieces.counts) * most)
    dist.all_gather_into_tensor(every, padded, group=pieces.group)
    rows = every.view(-1, most)
    cut = [row[:count] for row, count in zip(rows, pieces.counts, strict=True)]
    return torch.cat(cut).view(pieces.shape)


def part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return what this rank holds of a whole ``tensor``, if it has the shape of ``parameter``.

    Any other tensor is returned as it is. Every rank has the same whole.
    """
    if tensor.shape != whole_shape(parameter):
        return tensor
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        placed = tensor.to(mesh.device_type)
        return distribute_tensor(placed, mesh, parameter.placements)
    pieces = pieces_of(parameter)
    if pieces is None:
        return tensor
    start = sum(pieces.counts[: dist.get_rank(pieces.group)])
    return tensor.flatten()[start : start + parameter.numel()]


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module as it was before it became a unit."""
    if isinstance(module, FullyShardedDataParallel):
        return type(module.module)
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def is_spread(model: nn.Module) -> bool:
    """Whether every rank must take part whenever ``model`` computes."""
    kinds = (FSDPModule, FullyShardedDataParallel)
    return any(isinstance(module, kinds) for module in model.modules())


def most_of_all(count: int, device: torch.device) -> int:
    """Return the largest ``count`` of any rank; every rank calls it."""
    largest = torch.tensor(count, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


@contextmanager
def gathered(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let ``modules`` hold whole parameters of their own, not shards, within the block.

    Every rank enters it. Nothing is computed meanwhile, and what is written is lost.
    """
    held = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if isinstance(parameter, DTensor) or (parameter is not None and pieces_of(parameter))
    ]
    once: dict[int, nn.Parameter] = {}  # tied ones
    for _, _, parameter in held:
        if id(parameter) not in once:
            copy = whole(parameter, parameter).cpu()
            once[id(parameter)] = nn.Parameter(copy, parameter.requires_grad)
    try:
        for module, name, parameter in held:
            module._parameters[name] = once[id(parameter)]
        yield
    finally:
        for module, name, parameter in held:
            module._parameters[name] = parameter
