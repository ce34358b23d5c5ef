"""Data types of the base: which it is loaded in, and which of its tensors a cast leaves alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from lit_adapters.base_model import Dtype
from lit_adapters.weights import is_plain

Apply = Callable[[Tensor], Tensor]


def base_dtype(asked: Dtype, precision: str) -> torch.dtype:
    """Return what the base is loaded in; auto follows the ``precision`` of a trainer."""
    if asked != "auto":
        return cast(torch.dtype, getattr(torch, asked))
    return {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision, torch.float32)


def compute_dtype(asked: Dtype, precision: str) -> torch.dtype:
    """Return what quantised layers multiply in."""
    if asked != "auto":
        return base_dtype(asked, precision)
    kind = precision.partition("-")[0]
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(kind, torch.float32)


@contextmanager
def careful(module: nn.Module, fn: Apply) -> Iterator[Apply]:
    """Give what to apply to ``module`` so that ``fn`` spares what is packed and fp32 buffers.

    fp32 buffers are rotary frequencies; packed weights may be bytes in a float's clothes.
    """
    packed = {
        id(parameter)
        for layer in module.modules()
        if not is_plain(layer)
        for name, parameter in layer.named_parameters(recurse=False)
        if name == "weight"
    }

    def apply(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        changed = id(tensor) in packed and moved.dtype != tensor.dtype
        return tensor.to(moved.device) if changed else moved

    kept = [
        (layer, name, buffer)
        for layer in module.modules()
        for name, buffer in layer._buffers.items()
        if buffer is not None and buffer.dtype == torch.float32
    ]
    yield apply
    for layer, name, buffer in kept:
        moved = layer._buffers[name]
        assert moved is not None
        if moved.dtype != torch.float32:
            layer._buffers[name] = buffer.to(moved.device)
