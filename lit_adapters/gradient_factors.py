"""The two factors of a layer's weight gradient, instead of their product."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.utils.hooks import RemovableHandle

from lit_adapters.initialisers import Factored, is_smaller
from lit_adapters.weights import matrix_shape

Take = Callable[[Tensor | Factored], None]


def take_factors(
    layer: nn.Module, leaf: nn.Parameter, take: Take
) -> tuple[RemovableHandle, RemovableHandle]:
    """Let calls of ``layer`` hand over their gradient when it appears, if factors take no room.

    ``leaf`` then gets no gradient of these calls, but still of whatever else uses it.

    Args:
        layer: Multiplies rows by a matrix, and does nothing else.
        leaf: Its weight.
        take: Gets the gradient (out, in): the sum over all calls that a backward pass visits, as
            factors (of what came out, and what went in) where those take no more room.

    Returns:
        Handles that end it.
    """
    # Each call uses it, so autograd passes there whatever x is, and knows which call was the last.
    wanted = torch.empty(0, dtype=torch.float32, device=leaf.device, requires_grad=True)
    found: list[Tensor | Factored] = []

    def add(factors: Factored) -> None:
        found[:] = [_sum(found[0], factors) if found else factors]

    def hand_over(wanted: Tensor) -> None:
        take(found.pop())

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _input(args, kwargs)
        is_own = layer._parameters["weight"] is leaf  # and not what another hook made of it
        if is_own and _takes_no_room(x, matrix_shape(layer)):
            leaf.requires_grad_(False)

    def after(
        layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        if leaf.requires_grad:
            return output
        leaf.requires_grad_(True)
        watched: Tensor = _Watched.apply(output, _input(args, kwargs), wanted, add)
        return watched

    wanted.register_post_accumulate_grad_hook(hand_over)
    return (
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True, prepend=True),
    )


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x


def _takes_no_room(x: Tensor, shape: tuple[int, int]) -> bool:
    """Whether factors are smaller than the matrix, or are there anyway, in fp32."""
    return x.dtype == torch.float32 or is_smaller(x.numel() // x.shape[-1], shape)


def _sum(total: Tensor | Factored, more: Factored) -> Tensor | Factored:
    if isinstance(total, Factored):
        if is_smaller(len(total.left) + len(more.left), more.shape):
            left = torch.cat((total.left, more.left))
            return Factored(left, torch.cat((total.right, more.right)))
        total = total.dense()
    return total.addmm_(more.left.T, more.right)


class _Watched(Function):
    """A layer's output as it is."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, wanted: Tensor, add: Callable[[Factored], None]
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return output.detach()  # a view could not be written to

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        left, right = (rows.detach().reshape(-1, rows.shape[-1]).float() for rows in (slope, x))
        ctx.add(Factored(left, right))
        return slope, None, slope.new_empty(0), None
