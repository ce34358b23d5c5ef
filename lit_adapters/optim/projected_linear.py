"""Linear layers whose weight gradient is projected before it is there.

For ``y = x W^T`` the gradient is ``G = dY^T X``, over all tokens, and its projection
``(dY P_left)^T (X P_right^T)``: T r (m + n) products instead of (T + r) m n, and nothing as large
as the weight.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_adapters.optim.projection import Projector

SHADOW = "galore"  # what the shadow of ``layer.weight`` is called in its layer

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


class ProjectedLinear(nn.Linear):
    """A linear layer with a shadow, which gets the gradient of the weight, projected."""

    # A class, and not a forward of each layer's own, of which torch.compile would compile each.
    subspace: Subspace

    def forward(self, input: Tensor) -> Tensor:
        """As ever, also compiled; there, and without a subspace, the weight gets its gradient."""
        trains = torch.is_grad_enabled() and self.weight.requires_grad
        if torch.compiler.is_compiling() or not trains or self.subspace() is None:
            return super().forward(input)
        # As a matrix: of more dimensions it would be a view, which could not be changed in place.
        rows, shadow = input.reshape(-1, input.shape[-1]), self._parameters[SHADOW]
        y: Tensor = _Linear.apply(rows, self.weight, self.bias, shadow, self.subspace)
        return y.view(*input.shape[:-1], y.shape[-1])


def divert(layer: nn.Module, rank: int, ask: Ask) -> None:
    """Send the gradient of the weight to the shadow, projected, while ``ask`` gives a subspace.

    Args:
        layer: Any; left alone unless it is linear and large enough to gain.
        rank: Of the shadow.
        ask: Called in the forward and in the backward pass; with None the weight gets its gradient.
    """
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return
    if rank * (layer.out_features + layer.in_features) > layer.weight.numel():
        return
    diverted = cast(ProjectedLinear, layer)
    diverted.__class__ = ProjectedLinear
    diverted.subspace = Subspace(ask)


def restore(layer: nn.Module) -> None:
    """Take back `divert`, if it did something."""
    if type(layer) is ProjectedLinear:
        del layer.subspace
        cast(nn.Module, layer).__class__ = nn.Linear


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
