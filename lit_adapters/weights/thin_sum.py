"""The product with ``B`` (out, r), added to what a layer returned: in place, where that can be."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import Function

from lit_adapters.weights.applied import applied


def add_scaled(output: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
    """``output + scale * hidden B^T``, cast to the dtype of ``output``.

    Args:
        output: (..., out); it may be overwritten.
        hidden: (..., r), in the dtype to compute in.
        B: (out, r).
        scale: Of the product.
    """
    if output.dtype != hidden.dtype:
        columns = B.T.contiguous()  # from which a processor computes B's gradient twice as fast
        return output + ((hidden * scale) @ columns).to(output.dtype)
    if _takes_writes(output):
        whole = output if output._base is None else output._base  # with a bias it is a view
        added: Tensor = applied(_AddedInPlace, whole, hidden, B, scale)
        return added.view(output.shape)
    # Scaling and addition are folded into the product: no temporary of the output's size.
    sums = torch.addmm(_rows(output), _rows(hidden), B.T, alpha=scale)
    return sums.view(output.shape).to(output.dtype)  # which autocast may have changed


def _takes_writes(output: Tensor) -> bool:
    """Whether ``output`` is a tensor like any other, and nobody transforms what computes it."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and type(output) is Tensor
        and output.is_contiguous()
        and (output._base is None or _is_view_of_all(output, output._base))
        and not (output.is_leaf and output.requires_grad)
        and (not output.is_inference() or torch.is_inference_mode_enabled())
    )


def _is_view_of_all(output: Tensor, base: Tensor) -> bool:
    """Whether ``base`` has the same rows, and gradients pass through it.

    They do not where a Function made the view; rows are others where that is a transpose.
    """
    same_rows = base.is_contiguous() and base.shape[-1:] == output.shape[-1:]
    passes = output.grad_fn is None or output.grad_fn.next_functions[0][0] is base.grad_fn
    return (
        same_rows
        and base.numel() == output.numel()
        and base.requires_grad == output.requires_grad
        and passes
    )


class _AddedInPlace(Function):
    @staticmethod
    def forward(output: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
        rows = _rows(output)  # not `addmm_`, which torch's counter of operations does not know
        torch.addmm(rows, _rows(hidden), B.T.to(rows.dtype), alpha=scale, out=rows)
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
            to_B = ((_rows(hidden) * ctx.scale).T @ rows).T.to(B.dtype)
        return slope, to_hidden, to_B, None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
