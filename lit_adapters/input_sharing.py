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
    readers: list[tuple[Tensor, list[LoRAAdapter]]] = []  # of each input, as they were called

    def watch(adapter: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(adapter, LoRAAdapter)
        layer, inputs, *_ = args
        if not inputs or not multiplies_rows(layer):
            return
        if readers and readers[-1][0] is inputs[0]:
            readers[-1][1].append(adapter)
        else:
            readers.append((inputs[0], [adapter]))

    adapters = [one for *_, one in adapted_layers(model) if isinstance(one, LoRAAdapter)]
    handles = [adapter.register_forward_pre_hook(watch) for adapter in adapters]
    for adapter in adapters:
        adapter.shared_input = None
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for _, members in readers:
        if len(members) > 1 and len(set(members)) == len(members):
            shared = SharedInput(members)
            for member in members:
                member.shared_input = shared
