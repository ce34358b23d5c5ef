"""The product with ``B`` (out, r), added to what a layer returned: in place, where that is safe."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.modules import module as modules
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.pytorch_utils import Conv1D

# Their outputs are new at every call, and no backward pass reads them.
FRESH = (nn.Linear.forward, Conv1D.forward)


def add_scaled(layer: nn.Module, output: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
    """``output + scale * hidden B^T``, cast to the dtype of ``output``.

    Args:
        layer: What returned the output.
        output: (..., out); it is written to if nobody else can have it.
        hidden: (..., r), in the dtype to compute in.
        B: (out, r).
        scale: Of the product.
    """
    if output.dtype != hidden.dtype:
        columns = B.T.contiguous()  # from which a processor computes B's gradient twice as fast
        return output + ((hidden * scale) @ columns).to(output.dtype)
    if is_ours_alone(layer, output):
        whole = output if output._base is None else output._base  # with a bias it is a view
        added: Tensor = _AddedInPlace.apply(whole, hidden, B, scale)
        return added.view(output.shape)
    # Scaling and addition are folded into the product: no temporary of the output's size.
    sums = torch.addmm(_rows(output), _rows(hidden), B.T, alpha=scale)
    return sums.view(output.shape)


def is_ours_alone(layer: nn.Module, output: Tensor) -> bool:
    """Whether what ``layer`` returned may be overwritten: nobody kept it, no gradient needs it."""
    hooks = len(layer._forward_hooks) + len(modules._global_forward_hooks)
    return (
        hooks <= 1  # the one that calls adapters
        and type(layer).forward in FRESH
        and "forward" not in layer.__dict__
        and type(output) is Tensor
        and output.is_contiguous()
        and not _is_recorded()
    )


def _is_recorded() -> bool:
    """Whether somebody sees every operator: selective checkpointing keeps what they return."""
    return (
        is_in_torch_dispatch_mode()
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


class _AddedInPlace(Function):
    @staticmethod
    def forward(output: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
        _rows(output).addmm_(_rows(hidden), B.T.to(output.dtype), alpha=scale)
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        written, hidden, B, ctx.scale = inputs
        ctx.mark_dirty(written)
        ctx.save_for_backward(hidden, B)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        hidden, B = ctx.saved_tensors
        rows, to_hidden, to_B = _rows(slope), None, None
        if ctx.needs_input_grad[1]:
            to_hidden = (rows @ B.to(rows.dtype) * ctx.scale).view(hidden.shape)
        if ctx.needs_input_grad[2]:  # (out, r) by way of (r, out), which takes half the time
            to_B = (_rows(hidden).T @ rows * ctx.scale).T.to(B.dtype)
        return slope, to_hidden, to_B, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
