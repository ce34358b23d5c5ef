"""Gradient checkpointing: layers that keep only their input and run again in the backward pass."""

from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

Policy = bool | Literal["none", "full"] | int


def recompute_every(policy: Policy) -> int:
    """Return n where the first of every n layers is to be recomputed, and 0 for none.

    Args:
        policy: ``none`` or False, ``full`` or True, or n itself.

    Raises:
        ValueError: if it is none of them.
    """
    if isinstance(policy, str | bool):
        found = {"none": 0, False: 0, "full": 1, True: 1}.get(policy)
        if found is not None:
            return found
    elif isinstance(policy, int) and policy > 0:
        return policy
    raise ValueError(
        f"gradient_checkpointing={policy!r} is no policy; expected none, full, or a whole number n "
        "from 1 on, which recomputes the first of every n layers (1 is full)"
    )


def recompute_activations(model: nn.Module, every: int = 1) -> None:
    """Recompute the first of every ``every`` transformer layers in the backward pass.

    Layers are counted in the order of the model. It is the first, because to recompute the last
    saves nothing at the peak: its activations come back while those of all others are still held.
    Checkpoints are not reentrant, so gradients need no input that asks for one: the embeddings
    below frozen layers stay as they are.

    Args:
        model: Any module that holds layers of transformers' ``GradientCheckpointingLayer``, as all
            its causal language models do that can recompute.
        every: 1 is all of them.

    Raises:
        TypeError: if there is no such layer.
        ValueError: if ``every`` is above their number.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inner = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    outermost = [layer for layer in layers if id(layer) not in inner]
    if not layers:
        raise TypeError(
            f"{type(model).__name__} has no layer that can be recomputed: gradient_checkpointing "
            "works on layers of the class transformers.modeling_layers.GradientCheckpointingLayer. "
            "Derive your layers from it, or say none and use torch.utils.checkpoint inside the "
            "model"
        )
    if every > len(outermost):
        raise ValueError(
            f"gradient_checkpointing={every} is above the {len(outermost)} layers of "
            f"{type(model).__name__}: only the first would be recomputed, which saves almost "
            f"nothing. Give at most {len(outermost)}, full for all layers, or none"
        )
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):  # the model itself asks, too
            holder: Any = module
            holder.gradient_checkpointing = id(module) not in inner or every == 1
            holder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    for index, layer in enumerate(outermost):
        layer.gradient_checkpointing = index % every == 0
