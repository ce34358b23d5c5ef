"""What a rank holds of a model under a strategy, from shapes alone."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.fsdp import ShardingStrategy

from lit_adapters.adapters import Adapter
from lit_adapters.estimate.memory_trace import Category, Peak
from lit_adapters.sharding import Unit, replicated, units
from lit_adapters.weights import side_tensors

AT_ONCE = 2  # layers that are gathered: that which computes, and the next


@dataclass(frozen=True)
class Share:
    """Bytes of a rank.

    Attributes:
        base: Of frozen weights, with the scales of quantised ones, which every rank holds.
        adapter: What is trained, and origins.
        trained: Of all trained parameters, the part that this rank steps (0 to 1): so much of
            gradients and optimizer state is here.
        exchange: Most that is held for other ranks at a time: gathered units, their gradients, the
            buckets of DDP.
    """

    base: int
    adapter: int
    trained: float
    exchange: int


def share_of(
    model: nn.Module, strategy: Strategy, ranks: int, alone: Iterable[Tensor] = ()
) -> Share:
    """Return what the rank that holds most has of ``model``, adapted and whole.

    Args:
        model: With shapes at least.
        strategy: Of its fit.
        ranks: How many share it.
        alone: Trained weights whose gradients DDP does not average, since GaLore does.
    """
    parts = {id(p): held(p, strategy, ranks) for p in model.parameters()}
    for p in replicated(model) if isinstance(strategy, FSDPStrategy) else ():
        parts[id(p)] = p.nbytes
    own = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    adapter = [p for p in model.parameters() if p.requires_grad or id(p) in own]
    trained = [p for p in adapter if p.requires_grad]
    left_out = {id(p) for p in alone} if isinstance(strategy, DDPStrategy) else set()
    averaged = [p for p in trained if id(p) not in left_out]
    sides = sum(t.nbytes for layer in model.modules() for t in side_tensors(layer))
    of_adapter = sum(parts[id(p)] for p in adapter)
    return Share(
        base=sum(parts.values()) - of_adapter + sides,
        adapter=of_adapter,
        trained=sum(parts[id(p)] for p in trained) / max(1, size(trained)),
        exchange=exchanged(units(model, strategy), averaged, strategy, ranks),
    )


def held(parameter: Tensor, strategy: Strategy, ranks: int) -> int:
    """Return the bytes of ``parameter`` on the rank that holds most of it."""
    if isinstance(strategy, ModelParallelStrategy):  # whole rows
        rows = parameter.shape[0] if parameter.ndim else 1
        return ceil(rows / ranks) * prod(parameter.shape[1:]) * parameter.element_size()
    if isinstance(strategy, FSDPStrategy):  # consecutive elements of the unit
        return ceil(parameter.numel() / _shards(strategy, ranks)) * parameter.element_size()
    return parameter.nbytes


def _shards(strategy: FSDPStrategy, ranks: int) -> int:
    if strategy.sharding_strategy == ShardingStrategy.NO_SHARD:
        return 1
    within = {ShardingStrategy.HYBRID_SHARD, ShardingStrategy._HYBRID_SHARD_ZERO2}
    return strategy.num_processes if strategy.sharding_strategy in within else ranks


def exchanged(found: list[Unit], trained: Iterable[Tensor], strategy: Strategy, ranks: int) -> int:
    """Return the bytes that are on a rank for the sake of others, beside its own share."""
    if ranks == 1:
        return 0
    ids = {id(p) for p in trained}
    if isinstance(strategy, DDPStrategy):
        return size(trained)  # the buckets, as large as the gradients
    *layers, rest = [
        (size(u.parameters), size(p for p in u.parameters if id(p) in ids)) for u in found
    ] or [(0, 0)]
    keeps = isinstance(strategy, FSDPStrategy) and strategy.sharding_strategy in (
        ShardingStrategy.SHARD_GRAD_OP,
        ShardingStrategy._HYBRID_SHARD_ZERO2,
    )
    gathered = (
        sum(w for w, _ in layers) if keeps else AT_ONCE * max((w for w, _ in layers), default=0)
    )
    gradients = max((g for _, g in layers), default=0)
    return gathered + gradients + sum(rest)


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all."""
    return sum(t.nbytes for t in tensors)


def rank_bytes(peaks: Mapping[Any, Peak], share: Share) -> dict[str, int]:
    """Return what a rank holds, kind by kind, and ``peak``, the most at one time.

    Args:
        peaks: Of the parts of a step on one device (`lit_adapters.estimate`).
        share: Of this rank.
    """

    def on_rank(parts: Mapping[Category, int]) -> dict[str, int]:
        found: dict[str, int] = {**parts}  # type: ignore[dict-item]
        found |= {k: ceil(found[k] * share.trained) for k in ("gradients", "optimizer")}
        return {**found, "base": share.base, "adapter": share.adapter}

    kinds: dict[str, int] = {}
    for peak in peaks.values():
        for kind, most in on_rank(peak.largest).items():
            kinds[kind] = max(kinds.get(kind, 0), most)
    most = max(sum(on_rank(peak.parts).values()) for peak in peaks.values())
    return {**kinds, "exchange": share.exchange, "peak": most + share.exchange}
