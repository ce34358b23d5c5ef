"""Which adapted layers read one input, found out by watching a forward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lit_adapters.adapters.low_rank import LoRAAdapter
from lit_adapters.adapters.shared_input import SharedInput
from lit_adapters.attachment import adapted_layers
from lit_adapters.weights import multiplies_rows


@contextmanager
def finding_shared_inputs(model: nn.Module) -> Iterator[None]:
    """Watch which adapted layers a forward pass within a ``with`` block calls with one tensor.

    From then on their adapters share products with it. For a model that is not sharded: the
    factors of all members are read when the first is called.
    """
    groups: list[list[LoRAAdapter]] = []  # that were called with one tensor
    last: list[Tensor] = []  # not all of them, which would keep every activation

    def watch(adapter: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(adapter, LoRAAdapter)
        layer, inputs, *_ = args
        if not inputs or not multiplies_rows(layer):
            return
        if last and last[0] is inputs[0]:
            groups[-1].append(adapter)
        else:
            last[:] = [inputs[0]]
            groups.append([adapter])

    adapters = [one for *_, one in adapted_layers(model) if isinstance(one, LoRAAdapter)]
    handles = [adapter.register_forward_pre_hook(watch) for adapter in adapters]
    compute_apart(model)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for members in groups:
        if len(members) > 1 and len(set(members)) == len(members):
            shared = SharedInput(members)
            for member in members:
                member.shared_input = shared


def compute_apart(model: nn.Module) -> None:
    """Let every adapter compute its own products again; shards must."""
    for *_, adapter in adapted_layers(model):
        if isinstance(adapter, LoRAAdapter):
            adapter.shared_input = None
