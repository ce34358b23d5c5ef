"""What adapters know of Hugging Face's attention modules: how they are called and rotated."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

# Modules whose query is [q_norm](q_proj(x)), turned by rotary positions that pair element i with
# i + head_dim / 2. Others pair neighbours, leave part of a head unturned or fuse projections.
HALF_ROTARY = frozenset(
    "GemmaAttention LlamaAttention MistralAttention MixtralAttention Qwen2Attention "
    "Qwen2MoeAttention Qwen3Attention Qwen3MoeAttention".split()
)


def is_half_rotary(layer: nn.Module) -> bool:
    """Whether `queries` computes the queries of ``layer``."""
    return any(kind.__name__ in HALF_ROTARY for kind in type(layer).__mro__)


def named_inputs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what ``layer`` is called with, by parameter name."""
    if not args:  # how the models call it
        return kwargs
    names = inspect.signature(layer.forward).parameters
    return {**dict(zip(names, args, strict=False)), **kwargs}


def split_heads(layer: Any, x: Tensor) -> Tensor:
    """Return ``x`` (..., length, heads * head_dim) as (..., heads, length, head_dim)."""
    return x.unflatten(-1, (-1, int(layer.head_dim))).transpose(-3, -2)


def queries(layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotated queries (batch, heads, length, head_dim) of an `is_half_rotary` module.

    ``hidden`` is (batch, length, hidden); ``cos`` and ``sin`` are (batch, length, head_dim).
    """
    query = split_heads(layer, layer.q_proj(hidden))
    if hasattr(layer, "q_norm"):  # Qwen3: over each head
        query = layer.q_norm(query)
    return rotate(query, cos.unsqueeze(1), sin.unsqueeze(1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair ``(x_i, x_{i + d/2})`` of the last axis by its angle (RoPE, 2104.09864)."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def slides(config: Any) -> bool:
    """Whether some layer of a model with this ``config`` sees only a window of the tokens."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is not None
    return any(kind != "full_attention" for kind in kinds)
