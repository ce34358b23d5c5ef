"""One product with ``A`` for adapters whose layers read one input: queries, keys and values."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn

from lit_adapters.weights import branch_dtype, is_transformed, narrow_products


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
    source: ref[Tensor]
    state: tuple[Any, ...]


class SharedInput:
    """Computes for all of its members when the first is called; the others take what is theirs.

    Members that turn out to be called with another tensor, or later than their factor has changed,
    get nothing and compute for themselves: sharing saves time and does not change what is computed.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self._ready: dict[Member, Ready] = {}

    def product(self, adapter: Member, x: Tensor) -> Tensor | None:
        """Return ``A x^T`` (r, rows) of a member; None if it is to compute that itself."""
        if is_transformed():
            return None
        state = _state(x)
        if adapter is self.members[0]:
            self._ready = self._computed(x, state)
        ready = self._ready.pop(adapter, None)  # another thread may have put it there
        if ready is None or ready.source() is not x or ready.state != state:
            return None
        unchanged = ready.factor is adapter.lora_A and ready.factor._version == ready.version
        return ready.product if unchanged else None

    def _computed(self, x: Tensor, state: tuple[Any, ...]) -> dict[Member, Ready]:
        members = [m for m in self.members if m.active and not m.pinned and not m.drops(x)]
        if len(members) < 2:
            return {}
        factors = [member.lora_A for member in members]
        parts = zip(narrow_products(x, factors), factors, strict=True)
        source = ref(x)
        ready = [Ready(product, A, A._version, source, state) for product, A in parts]
        return dict(zip(members, ready, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        """Copy and pickle the members, not what is on its way between them."""
        return {**self.__dict__, "_ready": {}}


def _state(x: Tensor) -> tuple[Any, ...]:
    """What a product depends on beside the factor: whether ``x`` was written to, and the mode."""
    version = None if x.is_inference() else x._version
    return version, torch.is_inference_mode_enabled(), branch_dtype(x, x)
