"""Whether somebody else holds what a layer has just returned, told by counts of references."""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_held_elsewhere(output: Any) -> bool:
    """Whether anybody but the call of a layer, which is about to end, has its ``output``.

    To be called in a forward hook of the layer, by a function that holds the output itself. Another
    hook may have kept it; an operator or function mode, as selective checkpointing has; a backward
    pass may need it: each holds the Python object, or memory of the tensor.
    """
    if (
        torch.compiler.is_compiling()
        or type(output) is not Tensor
        or torch._C._are_functorch_transforms_active()  # whose tensors have no memory
    ):
        return False
    objects, memory = _holders(output)
    whole = output._base is not None  # which holds the memory, too
    return objects > ALONE[0] or memory > ALONE[1] + whole


def _holders(output: Tensor) -> tuple[int, int]:
    """References to the Python object, and to its memory."""
    storage = output.untyped_storage()
    return sys.getrefcount(output), torch._C._storage_Use_Count(storage._cdata)


def _in_a_hook() -> tuple[int, int]:
    """What is counted when nobody else has an output; other versions of Python count otherwise."""
    found: list[tuple[int, int]] = []

    def below(output: Tensor) -> tuple[int, int]:  # in the place of `is_held_elsewhere`
        return _holders(output)

    def look(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        found.append(below(output))

    layer = nn.Linear(1, 1, bias=False, device="cpu")
    layer.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        layer(torch.zeros(1, 1, device="cpu"))
    return found[0]


ALONE = _in_a_hook()
