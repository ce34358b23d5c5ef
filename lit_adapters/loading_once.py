"""A model that is to be sharded: read by one rank of each machine, and the same on all ranks."""

import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch import distributed as dist
from torch.utils import swap_tensors

from lit_adapters.adapters import Adapter
from lit_adapters.weights import side_tensors

FIRST = 0  # the rank whose values of what is trained are those of all machines


class Held(NamedTuple):
    """A tensor of a model, and whether training changes it, or it is where training started."""

    tensor: Tensor
    is_adapter: bool


@dataclass(frozen=True)
class Machine:
    """The ranks that share a host's memory; one of them reads what all of them shard.

    Args:
        reader: That one, by its number among all ranks.
        size: How many they are.
        group: The ranks of this machine; None if there is no other machine.
    """

    reader: int
    size: int
    group: Any = None

    @property
    def reads(self) -> bool:
        """Whether this rank is the one."""
        return dist.get_rank() == self.reader

    def tell(self, thing: Any) -> Any:
        """Return what the reader passes in."""
        told = [thing]
        dist.broadcast_object_list(told, self.reader, group=self.group)
        return told[0]

    def explain(self, obstacle: str) -> None:
        """Say why every rank reads, if there are several."""
        if self.size > 1:
            rank_zero_info(f"Every rank holds the whole base until it is sharded: {obstacle}.")

    @torch.no_grad()
    def fill(self, held: Sequence[Held], device: torch.device) -> None:
        """Give every rank of the machine the values of its reader; adapters, those of rank 0.

        Tensors without memory get it on ``device``; others stay where they are.
        """
        for tensor, is_adapter in held:
            source, group = (FIRST, None) if is_adapter else (self.reader, self.group)
            here = dist.get_rank() == source
            if tensor.is_meta and here:
                raise ValueError(
                    "the base is on the meta device, without values, so there is nothing to shard; "
                    "pass a folder or hub id as the base, or a model that is loaded"
                )
            is_new = tensor.is_meta
            if is_new:
                _give_memory(tensor, device)
            if not tensor.numel():
                continue
            # What has values is mapped from a file, it may be: ranks share that until they write.
            sent = tensor.data.to(device, copy=not (is_new or here)).contiguous()
            dist.broadcast(sent.view(-1).view(torch.uint8), source, group=group)
            if not here and not sent.equal(tensor.data.to(device)):
                tensor.data.copy_(sent)


def machine_of(strategy: Strategy | None) -> Machine | None:
    """Return the machine of this rank if ``strategy`` shards; None if there is one rank in all."""
    if not isinstance(strategy, FSDPStrategy | ModelParallelStrategy):
        return None
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    size = strategy.num_processes
    reader = dist.get_rank() // size * size
    alone = size == dist.get_world_size()
    if alone:
        return Machine(reader, size)
    # Others wait in this group while the reader reads, however long the user lets them.
    timeout = strategy._timeout
    return Machine(reader, size, dist.new_subgroups(group_size=size, timeout=timeout)[0])


def held_by(module: nn.Module) -> list[Held]:
    """Return every tensor of ``module`` once, in the same order on all ranks."""
    adapters = {
        id(tensor)
        for inner in module.modules()
        if isinstance(inner, Adapter)
        for tensor in (*inner.parameters(), *inner.buffers())
    }
    tensors = [*module.parameters(), *module.buffers()]
    found = [Held(t, t.requires_grad or id(t) in adapters) for t in tensors]
    return found + [Held(t, False) for layer in module.modules() for t in side_tensors(layer)]


def outside(module: nn.Module, layers: Sequence[nn.Module]) -> list[Held]:
    """Return the tensors of ``module`` that are in none of its ``layers``."""
    inside = {id(held.tensor) for layer in layers for held in held_by(layer)}
    return [held for held in held_by(module) if id(held.tensor) not in inside]


class _Told(NamedTuple):
    """What a reader tells the other ranks of its machine: one of three."""

    structure: bytes | None = None  # of what it has built
    obstacle: str = ""  # why that cannot be told
    failure: str = ""  # why there is nothing


def build_once(
    machine: Machine | None, build: Callable[[], dict[str, Any]], obstacle: Callable[[], str | None]
) -> dict[str, Any]:
    """Return what ``build`` makes, models among it; one rank of each machine calls it.

    The others get a copy whose parameters are on the meta device, until `Machine.fill`; buffers
    are small and have their values.

    Args:
        machine: Of this rank; None if it is alone.
        build: Takes no part in what ranks do together.
        obstacle: Returns why every rank has to build, if it has to; the same on all ranks.

    Raises:
        RuntimeError: if the rank that reads has failed, which raises what went wrong.
    """
    if machine is None:
        return build()
    if (reason := obstacle()) is not None:
        machine.explain(reason)
        return build()
    made: dict[str, Any] = {}
    told, failure = _Told(), None
    if machine.reads:
        try:
            made = build()
            told = _structure_of(made)
        except Exception as error:
            failure, told = error, _Told(failure=f"{type(error).__name__}: {error}")
    told = machine.tell(told)
    if failure is not None:
        raise failure
    if told.failure:
        raise RuntimeError(
            f"rank {machine.reader}, which reads the base for all ranks of this machine, failed "
            f"with {told.failure}"
        )
    if told.structure is None:
        machine.explain(told.obstacle)
        return made or build()
    if machine.reads:
        return made
    # Not from a file: from a rank of this run. Else the class of a model could not be told.
    found: dict[str, Any] = torch.load(io.BytesIO(told.structure), "cpu", weights_only=False)
    return found


def obstacle_of(module: Any) -> str | None:
    """Return why every rank has to build the model of an `AdapterFineTuneModule`, or None."""
    if module.base is None:
        return "it was passed in as a model, which every rank has built"
    if module.quantization is not None:
        return "it is quantised on the device of each rank while it is loaded"
    strategy = module.trainer.strategy
    if isinstance(strategy, FSDPStrategy) and strategy.kwargs.get("auto_wrap_policy") is not None:
        return "the auto_wrap_policy of FSDPStrategy takes a model that is whole on every rank"
    for callback in module.trainer.callbacks:
        start = getattr(callback, "initialiser", None)  # of InitAdapters
        if getattr(start, "reads_gradient", False):
            return f"{type(start).__name__} takes gradients on every rank"
    return None


def _structure_of(made: dict[str, Any]) -> _Told:
    models = [value for value in made.values() if isinstance(value, nn.Module)]
    memo: dict[int, Any] = {id(p): _empty(p, "meta") for m in models for p in m.parameters()}
    file = io.BytesIO()
    try:
        torch.save(copy.deepcopy(made, memo), file)
    except Exception as error:  # whatever a user's model holds
        return _Told(obstacle=f"its structure cannot be told: {type(error).__name__}: {error}")
    return _Told(file.getvalue())


def _empty(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor of the same class, attributes and shape, without values."""
    data = torch.empty_like(tensor.data, device=device)
    new: Tensor = Tensor._make_subclass(type(tensor), data, tensor.requires_grad)
    vars(new).update(vars(tensor))
    return new


def _give_memory(tensor: Tensor, device: torch.device) -> None:
    """Let ``tensor`` itself, which others may refer to, have memory."""
    swap_tensors(tensor, _empty(tensor, device))
