"""One product with ``A`` for adapters whose layers read one input: queries, keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from lit_adapters.weights import thin_products


class Member(Protocol):
    """An adapter with LoRA's factors."""

    lora_A: nn.Parameter  # (r, in)
    active: bool

    @property
    def pinned(self) -> bool: ...  # noqa: D102 - as `LoRAAdapter`

    def drops(self, x: Tensor) -> bool: ...  # noqa: D102


class Ready(NamedTuple):
    """What was computed for an adapter, and from what."""

    product: Tensor
    factor: nn.Parameter
    version: int


class SharedInput:
    """Computes for all of its members when the first is called; the others take what is theirs.

    Members that turn out to be called with another tensor, or later than their factor has changed,
    get nothing and compute for themselves: sharing saves time and does not change what is computed.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._ready: dict[Member, Ready] = {}
        self._source: tuple[Any, ...] = ()

    def product(self, adapter: Member, x: Tensor) -> Tensor | None:
        """Return ``x A^T`` (..., r) of a member; None if it is to compute that itself."""
        if torch.compiler.is_compiling():
            return None
        if adapter is self.members[0]:
            self._compute(x)
        ready = self._ready.pop(adapter, None)
        if ready is None or not self._is_source(x):
            return None
        unchanged = ready.factor is adapter.lora_A and ready.version == adapter.lora_A._version
        return ready.product if unchanged else None

    def _compute(self, x: Tensor) -> None:
        members = [m for m in self.members if m.active and not m.pinned and not m.drops(x)]
        factors = [member.lora_A for member in members]
        self._ready, self._source = {}, (ref(x), *_state(x))
        if len(members) > 1:
            for member, product in zip(members, thin_products(x, factors), strict=True):
                self._ready[member] = Ready(product, member.lora_A, member.lora_A._version)

    def _is_source(self, x: Tensor) -> bool:
        source, *state = self._source
        return source() is x and tuple(state) == _state(x)

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the members, not what is on its way between them."""
        return {"members": self.members, "_ready": {}, "_source": ()}


def _state(x: Tensor) -> tuple[Any, ...]:
    """What a product depends on beside the factor: whether ``x`` was written to, and the mode."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return None if x.is_inference() else x._version, torch.is_grad_enabled(), autocast
