"""Spread a model over devices: decoder layers as units, and what a sharded step needs."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_adapters.adapters import Adapter
from lit_adapters.fingerprint import remember_fingerprint
from lit_adapters.loading_once import Held, Machine, held_by, outside
from lit_adapters.spread import note_pieces, whole

Result = TypeVar("Result")
Fill = Callable[[Sequence[Held]], None]


class Unit(NamedTuple):
    """Parameters that are gathered and freed together."""

    name: str  # of the decoder layer; empty for the rest
    parameters: list[nn.Parameter]


def spread_over_all(strategy: Strategy) -> None:
    """Let FSDP2 share data and weights among all devices; call it before the devices are arranged.

    Lightning's own default is tensor parallelism on the devices of a machine.

    Raises:
        ValueError: if tensor parallelism was asked for, or some of the devices only.
    """
    if not isinstance(strategy, ModelParallelStrategy):
        return
    if strategy._tensor_parallel_size == "auto":
        strategy._tensor_parallel_size = 1
    if strategy._tensor_parallel_size != 1:
        raise ValueError(
            f"ModelParallelStrategy(tensor_parallel_size={strategy._tensor_parallel_size}) would "
            "split single matrices, and there is no plan here for how; leave it out, or say 1: "
            "the weights are then sharded over all devices (FSDP2)"
        )
    devices = strategy.num_nodes * strategy.num_processes
    if strategy._data_parallel_size == "auto":
        strategy._data_parallel_size = devices
    if strategy._data_parallel_size != devices:
        raise ValueError(
            f"ModelParallelStrategy(data_parallel_size={strategy._data_parallel_size}) does not "
            f"use all {devices} devices (nodes x devices); leave it out"
        )


def shard(model: Any, strategy: Strategy | None, machine: Machine | None = None) -> Any:
    """Return ``model``, adapted and initialised, spread over the devices of ``strategy``.

    Each decoder layer is a unit, and the rest is one. Under FSDP2 adapters are sharded with their
    layers. Under FSDP1, which would flatten them together with frozen weights of other dtypes,
    every rank holds them, and `average_gradients` does for them what FSDP does for the rest.

    Args:
        model: Of the same structure on all ranks, with values at least where ``machine`` reads.
        strategy: FSDP or FSDP2; any other leaves the model as it is.
        machine: Gives all ranks the same values, a unit at a time; None if this rank is alone.
    """
    if isinstance(strategy, FSDPStrategy):
        remember_fingerprint(model)
        return _wrap(model, strategy, _filling(machine, strategy))
    if isinstance(strategy, ModelParallelStrategy):
        remember_fingerprint(model)
        fill = _filling(machine, strategy)
        mesh = strategy.device_mesh["data_parallel"]
        layers = [layer for _, layer in decoder_layers(model)]
        rest = outside(model, layers)
        for layer in layers:
            fill(held_by(layer))
            fully_shard(layer, mesh=mesh)
        fill(rest)
        # The head is read after the forward pass, by the loss.
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def _filling(machine: Machine | None, strategy: Strategy) -> Fill:
    if machine is None:
        return lambda held: None
    return partial(machine.fill, device=strategy.root_device)


def is_sharded(strategy: Strategy | None) -> bool:
    """Whether no rank holds the whole model."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def check_optimizer(optimizer: Optimizer, strategy: Strategy) -> None:
    """Raise a ValueError if the state of ``optimizer`` cannot be gathered from shards."""
    kinds = type(optimizer).__mro__
    if is_sharded(strategy) and any(k.__module__.startswith("bitsandbytes") for k in kinds):
        raise ValueError(
            f"{kinds[0].__name__} of bitsandbytes packs its state, so that no checkpoint could "
            f"gather it under {type(strategy).__name__}. Take AdamW, whose state is sharded with "
            "the weights, or DDP"
        )


def decoder_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the layers that a model runs one after the other, by name.

    Those of transformers' ``GradientCheckpointingLayer`` that are in no other; in a model without
    any, the children of its first list of several modules of one class.

    Raises:
        ValueError: if there are none.
    """
    named = [(n, m) for n, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {id(m) for _, layer in named for m in layer.modules() if m is not layer}
    outermost: list[tuple[str, nn.Module]] = [
        (name, layer) for name, layer in named if id(layer) not in inner
    ]
    if outermost:
        return outermost
    for name, module in model.named_modules():
        kinds = {type(child) for child in module} if isinstance(module, nn.ModuleList) else set()
        if len(kinds) == 1 and len(module._modules) > 1:
            return [(f"{name}.{key}", child) for key, child in module.named_children()]
    raise ValueError(
        f"{type(model).__name__} has no list of layers that could be sharded one by one; give "
        "FSDPStrategy an auto_wrap_policy"
    )


def units(model: nn.Module, strategy: Strategy | None) -> list[Unit]:
    """Return what `shard` makes of ``model``: its decoder layers, and the rest, which comes last.

    None where nothing is sharded, or where an `auto_wrap_policy` of the user's decides. What FSDP1
    leaves whole is in no unit.
    """
    if not is_sharded(strategy):
        return []
    seen: set[int] = set()
    if isinstance(strategy, FSDPStrategy):
        if strategy.kwargs.get("auto_wrap_policy") is not None:
            return []
        seen = {id(p) for p in replicated(model)}
    found = []
    for name, module in [*decoder_layers(model), ("", model)]:
        own = [p for p in module.parameters() if id(p) not in seen]
        seen |= {id(p) for p in own}
        found.append(Unit(name, own))
    return found


def replicated(model: nn.Module) -> list[nn.Parameter]:
    """Return what every rank holds whole under FSDP1: the parameters of adapters."""
    return [p for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()]


def check_sharding(model: nn.Module, strategy: Strategy | None) -> None:
    """Raise a ValueError if `shard` cannot spread ``model``, adapted and whole."""
    if not isinstance(strategy, FSDPStrategy):
        return
    if strategy._state_dict_type != "full":
        raise ValueError(
            "FSDPStrategy(state_dict_type='sharded') writes a folder that only as many ranks can "
            "read; leave it at 'full': checkpoints hold what is trained and nothing of the frozen "
            "base, so they are small, and resume under any strategy"
        )
    copies = [m for m in model.modules() if isinstance(m, Adapter) and m.stands_in]
    if copies:
        raise ValueError(
            f"{copies[0].spec.name} puts trained copies in the place of a layer's own weights, "
            "where FSDP puts what it has gathered, so they would not be trained. Take FSDP2 "
            "(strategy=ModelParallelStrategy()) or DDP, or leave out bias and modules_to_save"
        )
    for unit in units(model, strategy):
        _check_uniform(unit)


def _check_uniform(unit: Unit) -> None:
    dtypes = sorted({str(p.dtype) for p in unit.parameters})
    if len(dtypes) > 1:
        raise ValueError(
            "FSDP flattens the weights of a unit into one tensor, and those of "
            f"{unit.name or 'the rest of the model'} are of "
            f"{' and '.join(dtypes)}. Take FSDP2 (strategy=ModelParallelStrategy()), which shards "
            "each by itself; for a quantised base also "
            "quantization=BitsAndBytes(storage=...) with the dtype of the other weights"
        )


def _wrap(model: nn.Module, strategy: FSDPStrategy, fill: Fill) -> nn.Module:
    check_sharding(model, strategy)
    for module in model.modules():
        if isinstance(module, Adapter):
            fill(held_by(module))
            module.to(strategy.root_device)  # FSDP moves what it shards
    whole_ones = replicated(model)
    ignored = {id(p) for p in whole_ones}
    # Weights have the dtype they are to be computed in, and rotary frequencies are to stay fp32:
    # what Lightning would have FSDP cast for its precision is left alone.
    options = {"ignored_states": whole_ones, "mixed_precision": strategy.mixed_precision}
    everything = [p for p in model.parameters() if id(p) not in ignored]
    shapes = [p.shape for p in everything]
    by_policy = strategy.kwargs.pop("auto_wrap_policy", None) is not None
    layers = [] if by_policy else decoder_layers(model)
    rest = outside(model, [layer for _, layer in layers])
    for name, layer in layers:
        fill([held for held in held_by(layer) if id(held.tensor) not in ignored])
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._modules[key] = wrap(layer, **options)
    fill([held for held in rest if id(held.tensor) not in ignored])
    wrapped: Any = wrap(model, **options)
    if wrapped.sharding_strategy != ShardingStrategy.NO_SHARD:
        note_pieces(everything, shapes, wrapped.process_group)
    return wrapped


def inside(model: Any, run: Callable[[Any], Result]) -> Result:
    """Return ``run(model)`` computed while the outermost unit of FSDP1 is whole.

    What reads a weight beside the forward pass of ``model`` (the loss reads the head, generation
    calls the model many times) would else find a shard of it. Any other model is just handed over.
    """
    if not isinstance(model, FullyShardedDataParallel):
        return run(model)
    inner: Any = model.module
    forward = inner.forward

    def redirected() -> Result:
        inner.forward = forward
        return run(inner)

    inner.forward = redirected
    try:
        return model()
    finally:
        inner.__dict__.pop("forward", None)


def average_gradients(model: nn.Module) -> None:
    """Average over ranks the gradients that FSDP1 leaves to each; once per optimizer step."""
    if not isinstance(model, FullyShardedDataParallel):
        return
    own = list(dict.fromkeys(_adapter_parameters(model)))
    for p in own:  # a rank whose batches were empty has none
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    gradients = [p.grad for p in own if p.grad is not None]
    for dtype in {g.dtype for g in gradients}:
        some = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in some])
        dist.all_reduce(flat)
        flat.div_(dist.get_world_size())
        for gradient, mean in zip(some, flat.split([g.numel() for g in some]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, Adapter):
            yield from (p for p in module.parameters() if p.requires_grad)


def gradient_norm(model: nn.Module, gradients: Sequence[Tensor]) -> Tensor:
    """Return the norm of all ``gradients`` of ``model``, those on other ranks included."""
    if isinstance(model, FullyShardedDataParallel):
        return model.clip_grad_norm_(math.inf)  # divides by nothing
    norm = nn.utils.get_total_norm(gradients)
    return whole(norm, norm)


def clips_itself(model: nn.Module) -> bool:
    """Whether gradients are clipped by norm through the model: FSDP1."""
    return isinstance(model, FullyShardedDataParallel)
