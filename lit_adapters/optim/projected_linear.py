"""Linear layers whose weight gradient is projected before it is there.

For ``y = x W^T`` the gradient is ``G = dY^T X``, over all tokens, and its projection
``(dY P_left)^T (X P_right^T)``: T r (m + n) products instead of (T + r) m n, and nothing as large
as the weight.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.optim.projection import Projector

Ask = Callable[[], Projector | None]


class Subspace:
    """Says what to project on, or None for whole gradients: always None in copies of a model."""

    def __init__(self, ask: Ask | None = None) -> None:
        self.ask = ask

    def __call__(self) -> Projector | None:
        """Return the present subspace."""
        return self.ask() if self.ask else None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, and deepcopy, as one that asks nobody."""
        return Subspace, ()


def suits(layer: nn.Module, rank: int) -> bool:
    """Whether ``layer`` computes ``x W^T + b`` and nothing else, and is large enough to gain."""
    if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__:
        return False
    rows, columns = layer.get_parameter("weight").shape
    return rank * (rows + columns) <= rows * columns


def divert(layer: nn.Module, shadow: nn.Parameter, ask: Ask) -> None:
    """Send the gradient of the weight to ``shadow``, projected, while ``ask`` gives a subspace.

    Args:
        layer: One that `suits`.
        shadow: A parameter of the layer, of the projected shape.
        ask: Called in the forward and in the backward pass; with None the weight gets its gradient.
    """
    layer.forward = partial(_forward, layer, shadow, Subspace(ask))


def restore(layer: nn.Module) -> None:
    """Take back `divert`, if there was one."""
    if getattr(layer.__dict__.get("forward"), "func", None) is _forward:
        del layer.forward


def _forward(layer: nn.Module, shadow: nn.Parameter, subspace: Subspace, x: Tensor) -> Tensor:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    assert weight is not None
    wanted = torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
    if not wanted or subspace() is None:
        return F.linear(x, weight, bias)
    # As a matrix: of more dimensions the result would be a view, which could not change in place.
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, shadow, subspace)
    return y.view(*x.shape[:-1], y.shape[-1])


class _Linear(torch.autograd.Function):
    """A linear layer that gives its weight the gradient, or its shadow the projected one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (T, n)
        weight: Tensor,  # (m, n)
        bias: Tensor | None,  # (m,)
        shadow: Tensor,  # (m, r), (r, n) or (r, r)
        subspace: Subspace,
    ) -> Tensor:
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[0] else None)
        ctx.subspace = subspace
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None, shadow.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """In the output's dtype, as torch does; autocast has no part in it."""
        (dY,), (x, W) = gradients, ctx.saved_tensors
        of_weight, of_bias, of_shadow = ctx.dtypes
        dX = dW = db = dR = None
        with torch.autocast(dY.device.type, enabled=False):
            if W is not None:
                dX = (dY @ W.to(dY.dtype)).to(x.dtype)
            if ctx.needs_input_grad[2]:
                db = dY.sum(0).to(of_bias)
            to = ctx.subspace()
            if to is None:
                dW = (dY.T @ x.to(dY.dtype)).to(of_weight)
            else:
                dR = _product(dY, x.to(dY.dtype), to).to(of_shadow)
        return dX, dW, db, dR, None


def _product(left: Tensor, right: Tensor, to: Projector) -> Tensor:
    """Return the projection of ``left^T right`` (T, m) and (T, n)."""
    if to.left is not None:
        left = left @ to.left.to(left.dtype)
    if to.right is not None:
        right = right @ to.right.to(right.dtype).T
    return left.T @ right
