"""PEFT's layout of a prefix: one tensor for all layers, its keys not rotated for their positions.

PEFT puts the prefix at positions ``0 .. length - 1`` of the cache and the tokens behind it, from
``length`` on; here the tokens stay where they are. Attention depends on differences alone, so
keys turned by ``length`` positions mean the same there.
"""

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lit_adapters.adapters.attention import is_half_rotary, rotate, slides
from lit_adapters.adapters.base import Adapted
from lit_adapters.adapters.prefix_layer import PrefixAdapter

STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles that no sequence length changes


def peft_problem(layer: Any) -> str | None:
    """Return why PEFT would compute something else with the same prefix, None if it would not."""
    if slides(layer.config):
        return "PEFT lets a prefix slide out of this model's attention window"
    rope = getattr(layer.config, "rope_parameters", None) or {}
    if not is_half_rotary(layer) or rope.get("rope_type") not in STATIC_ROPE:
        return "PEFT moves the tokens, and how this model rotates their keys is not known here"
    return None


def stacked(model: nn.Module, adapted: Sequence[Adapted]) -> Tensor:
    """Return PEFT's tensor (length, layers * 2 * kv_heads * head_dim), fp32.

    Raises:
        ValueError: if not every layer is adapted.
    """
    prefixes = _in_order(adapted)
    cos, sin = (part.to(prefixes[0].keys.device) for part in _turn(model, prefixes[0].length))
    pairs = [(rotate(p.keys.detach(), cos, sin), p.values.detach()) for p in prefixes]
    parts = torch.stack([part for pair in pairs for part in pair])
    return parts.permute(2, 0, 1, 3).flatten(1)  # from (layers * 2, kv_heads, length, head_dim)


def unstack(model: nn.Module, adapted: Sequence[Adapted], tensor: Tensor) -> None:
    """Give every prefix its part of what `stacked` returned."""
    prefixes = _in_order(adapted)
    cos, sin = _turn(model, prefixes[0].length)
    heads, length, head_dim = prefixes[0].keys.shape
    parts = tensor.float().view(length, -1, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
    for prefix, (keys, values) in zip(prefixes, parts, strict=True):
        prefix.set_keys_values(rotate(keys.to(cos.device), cos, -sin), values)


def _in_order(adapted: Sequence[Adapted]) -> list[PrefixAdapter]:
    """The prefixes in the order of the layers, which must be all there are."""
    prefixes = {cast(Any, layer).layer_idx: adapter for _, layer, adapter in adapted}
    count = cast(Any, adapted[0].layer).config.num_hidden_layers
    if sorted(prefixes) != list(range(count)):
        raise ValueError(
            f"PEFT's layout of a prefix needs one on each of the model's {count} layers, but the "
            f"targets mean layers {sorted(prefixes)}; give `layers`, for a layout of our own"
        )
    return [cast(PrefixAdapter, prefixes[number]) for number in range(count)]


def _turn(model: nn.Module, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (head_dim,), fp32, of a rotation by ``positions``.

    The model's own rotary module says them, times a factor that is no part of the rotation.
    """
    rotaries = list(_rotaries(model))
    if len(rotaries) != 1:
        raise ValueError(
            f"PEFT's layout of a prefix needs a model with one rotary module, found {len(rotaries)}"
        )
    [rotary] = rotaries
    device = rotary.get_buffer("inv_freq").device
    probe = torch.zeros(1, dtype=torch.float32, device=device)
    cos, sin = rotary(probe, position_ids=torch.tensor([[positions]], device=device))
    scaling = getattr(rotary, "attention_scaling", 1.0)
    return cos[0, 0] / scaling, sin[0, 0] / scaling


def _rotaries(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if "inv_freq" in module._buffers:
            yield module
