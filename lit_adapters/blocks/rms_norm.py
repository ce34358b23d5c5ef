"""RMS norms that keep their input and one number a row for the backward pass (arXiv 1910.07467)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from lit_adapters.weights import is_ordinary, is_transformed


def stock(self: Any, hidden_states: Tensor) -> Tensor:
    """What Llama and its relatives compute, in their words."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def fits(norm: Any) -> bool:
    """Every module of that code does."""
    return True


def lean(norm: Any, hidden_states: Tensor) -> Tensor:
    """Compute as `stock`; gradients of the input by one formula instead of seven."""
    x, weight = hidden_states, norm.weight
    if (
        not is_ordinary(x)
        or not x.requires_grad
        or not torch.is_grad_enabled()
        or weight.requires_grad
        or is_transformed()
    ):
        return stock(norm, x)
    normed: Tensor = _Normed.apply(x, weight, norm.variance_epsilon)
    return normed


class _Normed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        inverse = _inverse_root(wide, epsilon)
        ctx.epsilon = epsilon
        ctx.save_for_backward(x, weight, inverse)
        return weight * (wide * inverse).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        wide, again = x.float(), torch.is_grad_enabled()
        if again:  # for second derivatives, which pass through it
            inverse = _inverse_root(wide, ctx.epsilon)
        # Of x / r, where r is the root: (g - x <g, x> / (n r^2)) / r.
        onto = (slope * weight).to(x.dtype).float()
        share = (onto * wide).mean(-1, keepdim=True) * inverse.square()
        across = torch.addcmul(onto, wide, share, value=-1)
        to_x = across * inverse if again else across.mul_(inverse)
        return to_x.to(x.dtype), None, None


def _inverse_root(wide: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
