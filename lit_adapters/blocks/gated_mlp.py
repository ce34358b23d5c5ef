"""Gated MLPs that keep their two halves for the backward pass, and make the product again."""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.nn.modules import module
from transformers.activations import GELUActivation, GELUTanh, SiLUActivation

from lit_adapters.weights import forget_recipe, is_ordinary, is_transformed, note_recipe

ACTIVATIONS = (nn.SiLU, nn.GELU, SiLUActivation, GELUActivation, GELUTanh)


def stock(self: Any, x: Tensor) -> Tensor:
    """What more than a hundred classes of transformers compute, in their words."""
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj  # noqa: RET504 - the very code


def fits(mlp: Any) -> bool:
    """Whether the activation is one that may be computed twice."""
    return _is_known(mlp.act_fn)


def lean(mlp: Any, x: Tensor) -> Tensor:
    """Compute as `stock`, of whose four wide tensors three are kept: two if an adapter is last.

    The activation and its product with the other half are computed again, once each.
    """
    act, gate, up = mlp.act_fn, mlp.gate_proj(x), mlp.up_proj(x)
    if not _is_plain(act, gate, up):
        return mlp.down_proj(act(gate) * up)
    product = _GatedProduct.apply(act, gate, up)
    note_recipe(product, partial(_product, act), gate, up)
    try:
        return mlp.down_proj(product)
    finally:
        forget_recipe(product)  # whoever keeps the product shall not keep the halves


def _is_plain(act: nn.Module, gate: Tensor, up: Tensor) -> bool:
    """Whether gradients are wanted, and nobody looks at the activation."""
    return (
        is_ordinary(gate)
        and is_ordinary(up)
        and gate.requires_grad
        and up.requires_grad
        and torch.is_grad_enabled()
        and gate.dtype == up.dtype
        and not is_transformed()
        and _is_known(act)  # still
        and not (act._forward_hooks or act._forward_pre_hooks)
        and not (act._backward_hooks or act._backward_pre_hooks or module._has_any_global_hook())
    )


def _is_known(act: Any) -> bool:
    """Whether it computes with one of torch's functions, and does not write to its input.

    Autocast may round within what is put together of several, and the second time it is off.
    """
    return (
        type(act) in ACTIVATIONS
        and not getattr(act, "inplace", False)
        and not isinstance(getattr(act, "act", None), MethodType)
        and "forward" not in vars(act)
    )


def _product(act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return act.forward(gate) * up


class _GatedProduct(Function):
    @staticmethod
    def forward(ctx: Any, act: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
        ctx.act = act
        ctx.save_for_backward(gate, up)
        return _product(act, gate, up)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        again = torch.is_grad_enabled()  # for second derivatives
        with torch.enable_grad():
            inner = gate.view_as(gate)  # a tensor without the hooks of that
            active = ctx.act.forward(inner)
        (to_gate,) = torch.autograd.grad(active, inner, slope * up, create_graph=again)
        return None, to_gate, slope * (active if again else active.detach())
