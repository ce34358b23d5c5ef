"""The product with ``A`` (r, in), keeping for the backward pass no copy of what goes into it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.nn import functional as F

from lit_adapters.weights.applied import applied
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
    product: Tensor = applied(_ThinProduct, x, keep, growth(dropout), A)
    return product


def thin_products(x: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return `thin_product` with each of several factors, computed as one product."""
    products: tuple[Tensor, ...] = applied(_ThinProducts, x, *factors)
    return products


class _ThinProduct(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, keep: Tensor | None, growth: float, A: Tensor) -> Tensor:
        product = F.linear(kept(x, keep).to(A.dtype), A)  # autocast may have a dtype of its own
        return product if keep is None else product * growth  # the thinnest place for it

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, keep, ctx.growth, A = inputs
        ctx.save_for_backward(x, keep, A)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, keep, A = ctx.saved_tensors
        if keep is not None:
            slope = slope * ctx.growth
        to_x = _to_input(slope, A, x, keep) if ctx.needs_input_grad[0] else None
        to_A = _to_factor(slope, A, x, keep) if ctx.needs_input_grad[3] else None
        return to_x, None, None, to_A


class _ThinProducts(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        A = torch.cat(factors)
        return F.linear(x.to(A.dtype), A).split([len(factor) for factor in factors], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)  # a product that nobody used gives its factor no gradient
        ctx.save_for_backward(*inputs)  # and not what `cat` makes, which would be a copy

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *factors = ctx.saved_tensors
        used = {i: slope for i, slope in enumerate(slopes) if slope is not None}
        to_factors: list[Tensor | None] = [None] * len(factors)
        if not used:
            return None, *to_factors
        slope, A = torch.cat(list(used.values()), -1), torch.cat([factors[i] for i in used])
        to_x = _to_input(slope, A, x) if ctx.needs_input_grad[0] else None
        if any(ctx.needs_input_grad[1:]):
            parts = _to_factor(slope, A, x).split([len(factors[i]) for i in used])
            for i, part in zip(used, parts, strict=True):
                to_factors[i] = part
        return to_x, *to_factors


def _to_input(slope: Tensor, A: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The gradient of what went in, from that of the product."""
    return kept(slope @ A.to(slope.dtype), keep).to(x.dtype)


def _to_factor(slope: Tensor, A: Tensor, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """The gradient of ``A``, from that of the product."""
    rows = kept(x, keep).to(slope.dtype).reshape(-1, x.shape[-1])
    return (slope.reshape(-1, len(A)).T @ rows).to(A.dtype)
