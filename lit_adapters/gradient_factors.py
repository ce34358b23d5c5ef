"""The two factors of a layer's weight gradient, instead of their product."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils.hooks import RemovableHandle

from lit_adapters.initialisers import Factored, is_smaller
from lit_adapters.weights import matrix_shape

Take = Callable[[Factored], None]


def take_factors(
    layer: nn.Module, leaf: nn.Parameter, take: Take
) -> tuple[RemovableHandle, RemovableHandle]:
    """Let each call of ``layer`` hand over its gradient when that appears, if factors are smaller.

    ``leaf`` then gets no gradient of this call, but still of whatever else uses it.

    Args:
        layer: Multiplies rows by a matrix.
        leaf: Its weight.
        take: Gets the factors of the gradient (out, in): of what came out, and what went in.

    Returns:
        Handles that end it.
    """
    frozen = nn.Parameter(leaf.detach(), requires_grad=False)
    wanted = torch.empty(0, requires_grad=True)  # makes autograd pass here, whatever x is

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs)
        if is_smaller(x.numel() // x.shape[-1], matrix_shape(layer)):
            layer._parameters["weight"] = frozen

    def after(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if layer._parameters["weight"] is leaf:
            return output
        layer._parameters["weight"] = leaf
        watched: Tensor = _Watched.apply(output, _input(args, kwargs), wanted, take)
        return watched

    return (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True, prepend=True),
    )


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


class _Watched(Function):
    """A layer's output as it is."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, wanted: Tensor, take: Take) -> Tensor:
        ctx.save_for_backward(x)
        ctx.take = take
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        left, right = (rows.detach().flatten(0, -2).float() for rows in (slope, x))
        ctx.take(Factored(left, right))
        return slope, None, None, None
