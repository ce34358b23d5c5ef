"""The product with ``A`` (r, in), keeping for the backward pass no copy of what goes into it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional as F

from lit_adapters.weights.dropout import growth, keep_mask, kept


def thin_product(x: Tensor, A: Tensor, dropout: float = 0.0) -> Tensor:
    """``F.linear(dropout(x, dropout).to(A.dtype), A)`` with the `dropout` of this package.

    Autograd would keep a dropped or cast copy of ``x`` (..., in) for every layer that reads it.
    Kept are ``x`` itself, which layers of one input share, and one byte an element of the mask.

    Args:
        x: (..., in), floating point.
        A: (r, in).
        dropout: Share of the elements of ``x`` that are zeroed; the others grow by
            ``1 / (1 - dropout)``.
    """
    if not dropout and (x.dtype == A.dtype or not torch.is_grad_enabled()):
        return F.linear(x.to(A.dtype), A)
    keep = keep_mask(x, dropout) if dropout else None
    product: Tensor = _ThinProduct.apply(x, keep, growth(dropout), A)
    return product


def thin_products(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return `thin_product` with each of several factors, computed as one product."""
    products: Tensor = _ThinProduct.apply(x, None, 1.0, *factors)
    return products.split([len(A) for A in factors], -1)


class _ThinProduct(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, keep: Tensor | None, growth: float, *factors: Tensor) -> Tensor:
        A = _stacked(factors)
        product = F.linear(kept(x, keep).to(A.dtype), A)  # autocast may have a dtype of its own
        return product if keep is None else product * growth  # the thinnest place for it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, keep, ctx.growth, *factors = inputs
        ctx.save_for_backward(x, keep, *factors)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, *factors = ctx.saved_tensors
        A = _stacked(factors)
        to_x, to_factors = None, [None] * len(factors)
        if keep is not None:
            slope = slope * ctx.growth
        if ctx.needs_input_grad[0]:
            to_x = slope @ A.to(slope.dtype)
            to_x = kept(to_x, keep).to(x.dtype)
        if any(ctx.needs_input_grad[3:]):
            rows = kept(x, keep).to(slope.dtype).reshape(-1, x.shape[-1])
            to_A = (slope.reshape(-1, len(A)).T @ rows).to(A.dtype)
            to_factors = list(to_A.split([len(factor) for factor in factors]))
        return to_x, None, None, *to_factors


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """One matrix of all rows; not saved, for it would be a copy."""
    return factors[0] if len(factors) == 1 else torch.cat(list(factors))
