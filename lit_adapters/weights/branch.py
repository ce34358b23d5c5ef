"""The low-rank branch of a layer that multiplies rows, added to what the layer returned.

One Function for all of it. Thin matrices lie as (r, rows): of rank 8, a processor takes a quarter
of the time for ``B^T s^T`` that it takes for ``s B``.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.nn import functional as F

from lit_adapters.weights.base_product import (
    frozen_matrix,
    is_ordinary,
    is_product_alone,
    is_watched,
)
from lit_adapters.weights.dropout import dropout as drop
from lit_adapters.weights.dropout import growth, keep_mask, kept
from lit_adapters.weights.recipes import recipe_of

THIN = 16  # ranks below it are multiplied faster lying


def add_branch(
    layer: nn.Module,
    output: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
    hidden: Tensor | None = None,
) -> Tensor:
    """``output + scale * dropout(x) A^T B^T``, computed in `branch_dtype`, cast to the output's.

    Kept for the backward pass are ``x`` itself (or the ingredients of its `Recipe`), which layers
    of one input share, the narrow product, and one byte an element of dropout's mask.

    Args:
        layer: What returned ``output``. If that is no more than a product with frozen numbers, the
            gradient of ``x`` is summed where that product's arises, without a second of its size.
        output: (..., out); it may be overwritten.
        x: (..., in), floating point.
        A: (r, in).
        B: (out, r).
        scale: Of the product.
        dropout: Share of the elements of ``x`` that are zeroed in the branch; the others grow by
            ``1 / (1 - dropout)``.
        hidden: What `narrow_products` returned for ``A``, if that is there already.
    """
    if is_transformed():
        dropped = drop(x, dropout) if dropout else x
        return add_product(output, F.linear(dropped.to(A.dtype), A), B, scale)
    keep = keep_mask(x, dropout) if dropout else None
    factor = scale * growth(dropout) if dropout else scale
    dtype = branch_dtype(x, A)
    matrix = frozen_matrix(layer)
    whole = (
        matrix is not None
        and matrix.dtype == output.dtype  # autocast has cast it otherwise
        and is_product_alone(layer, output, x)
    )
    written = output.detach() if whole else output
    in_place = output.dtype == dtype and _takes_writes(written)
    if in_place and written._base is not None:  # with a bias it is a view
        written = written._base
    plan = Plan(factor, dtype, in_place, whole)
    added: Tensor = _Branch.apply(written, x, A, B, keep, hidden, matrix, plan)
    return added if added.shape == output.shape else added.view(output.shape)


def add_product(output: Tensor, hidden: Tensor, B: Tensor, scale: float) -> Tensor:
    """``output + scale * hidden B^T``, cast to the dtype of ``output``; in torch's own operations.

    Args:
        output: (..., out).
        hidden: (..., r), in the dtype to compute in.
        B: (out, r).
        scale: Of the product.
    """
    if output.dtype != hidden.dtype:
        return output + ((hidden * scale) @ B.T).to(output.dtype)
    # Scaling and addition are folded into the product: no temporary of the output's size.
    sums = torch.addmm(_rows(output), _rows(hidden), B.T, alpha=scale)
    return sums.view(output.shape).to(output.dtype)  # which autocast may have changed


@torch.no_grad()
def narrow_products(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return ``A x^T`` (r, rows) for each of some ``A`` (r, in), computed as one product."""
    A = torch.cat(list(factors))
    dtype = branch_dtype(x, A)
    return _narrow(x, A, None, dtype).split([len(factor) for factor in factors])


def branch_dtype(x: Tensor, A: Tensor) -> torch.dtype:
    """What the branch is computed in: the dtype of ``A``, or autocast's."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return A.dtype
    return torch.get_autocast_dtype(device)


def is_transformed() -> bool:
    """Whether somebody is to see single operations: a compiler, a trace, a transform."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class Plan(NamedTuple):
    """How a branch is computed."""

    factor: float  # of the product
    dtype: torch.dtype
    in_place: bool
    whole: bool  # the gradient through the layer's own product is computed here, too


class _Branch(Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        keep: Tensor | None,
        hidden: Tensor | None,
        matrix: Tensor | None,
        plan: Plan,
    ) -> Tensor:
        factor, dtype, in_place, _ = ctx.plan = plan
        scaled = (_narrow(x, A, keep, dtype) if hidden is None else hidden) * factor
        ctx.make, ingredients, _ = recipe_of(x)
        # The matrix always: recomputed layers shall keep as many tensors as at first.
        ctx.save_for_backward(A, B, keep, scaled, matrix, *ingredients)
        if in_place:
            rows = _rows(output)  # not `addmm_`, which torch's counter of operations does not know
            torch.addmm(rows, scaled.T, _cast(B, dtype).T, out=rows)
            ctx.mark_dirty(output)
            return output
        branch = (scaled.T @ _cast(B, dtype).T).view(output.shape)
        return output + _cast(branch, output.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        A, B, keep, scaled, matrix, *ingredients = ctx.saved_tensors
        x = ctx.make(*ingredients)
        factor, dtype, _, whole = ctx.plan
        for_output, for_x, for_A, for_B, *_ = ctx.needs_input_grad
        rows = _rows(slope)
        wide = _cast(rows, dtype)
        to_x, to_A, to_B = None, None, None
        if for_x or for_A:
            narrow = _through(_cast(B, dtype), wide, factor)
        if for_x:
            through_base = rows @ matrix if whole else None
            to_x = _to_input(narrow, _cast(A, dtype), x, keep, through_base)
        if for_A:
            to_A = _cast(narrow @ _cast(_rows(kept(x, keep)), dtype), A.dtype)
        if for_B:
            if torch.is_grad_enabled():  # for second derivatives, which pass through it
                scaled = _narrow(x, A, keep, dtype) * factor
            to_B = _cast((scaled @ wide).T, B.dtype)
        return slope if for_output else None, to_x, to_A, to_B, None, None, None, None


def _narrow(x: Tensor, A: Tensor, keep: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``A x^T`` (r, rows)."""
    return F.linear(_cast(A, dtype), _cast(_rows(kept(x, keep)), dtype))


def _through(B: Tensor, slope: Tensor, factor: float) -> Tensor:
    """``factor * B^T s^T`` (r, rows)."""
    if B.shape[1] < THIN:
        return F.linear(B.T.contiguous() * factor, slope)
    return (slope @ (B * factor)).T  # as fast, without a turned copy


def _to_input(
    narrow: Tensor, A: Tensor, x: Tensor, keep: Tensor | None, through_base: Tensor | None
) -> Tensor:
    """The gradient of ``x``; that ``through_base`` (rows, in) may be overwritten."""
    if through_base is None:
        return _cast(kept((narrow.T @ A).view(x.shape), keep), x.dtype)
    if keep is None and through_base.dtype == A.dtype:
        out = None if torch.is_grad_enabled() or _is_batched(through_base) else through_base
        return torch.addmm(through_base, narrow.T, A, out=out).view(x.shape)
    return through_base.view(x.shape).add_(kept((narrow.T @ A).view(x.shape), keep))


def _is_batched(gradient: Tensor) -> bool:
    """Whether it stands for many, of which torch writes none to an ``out``."""
    many: bool = torch._C._functorch.is_legacy_batchedtensor(gradient)  # by `is_grads_batched`
    return many or torch._C._are_functorch_transforms_active()


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, which takes a microsecond where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def _takes_writes(output: Tensor) -> bool:
    """Whether ``output`` is a tensor like any other."""
    return (
        is_ordinary(output)
        and output.is_contiguous()
        and not is_watched(output)
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


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
