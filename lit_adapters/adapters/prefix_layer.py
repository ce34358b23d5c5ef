"""The module of prefix tuning: keys and values put before those of the tokens, and the masks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from lit_adapters.adapters.attention import named_inputs, slides
from lit_adapters.adapters.base import Adapter, AdapterSpec

# Small, as the base's own weights at their start: keys near zero make every prefix token weigh like
# a token of no interest, values near zero add no direction; the draws only tell tokens apart.
STD = 0.02


class PrefixAdapter(Adapter):
    """Keys and values (kv_heads, length, head_dim) that every token attends to; fp32.

    Keys are kept as they are used: after rotation, for positions ``-length .. -1``. The tokens keep
    their own positions from 0 on. No cache ever holds the prefix, so its size, its positions and
    everything else that reads it are as without one.
    """

    changes_inputs = True

    def __init__(
        self, spec: AdapterSpec, length: int, layer: Any, peft_problem: str | None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.length = length
        self.peft_problem = peft_problem  # why a file cannot be in PEFT's layout
        head_dim = int(layer.head_dim)
        shape = (int(layer.k_proj.out_features) // head_dim, length, head_dim)
        self.keys = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))
        self.values = nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))

    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Draw keys and values from N(0, 0.02^2)."""
        shape = self.keys.shape
        drawn = [torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2)]
        self.set_keys_values(*(tensor.normal_(std=STD, generator=generator) for tensor in drawn))

    @torch.no_grad()
    def set_keys_values(self, keys: Tensor, values: Tensor) -> None:
        """Take over keys, rotated for positions ``-length .. -1``, and values.

        Args:
            keys: (kv_heads, length, head_dim).
            values: The same shape.

        Raises:
            ValueError: if a shape differs.
        """
        for name, tensor in {"keys": keys, "values": values}.items():
            if tensor.shape != self.keys.shape:
                raise ValueError(
                    f"{name} have shape {tuple(tensor.shape)}, but this prefix holds (kv_heads, "
                    f"length, head_dim) = {tuple(self.keys.shape)}"
                )
        self.keys.copy_(keys)
        self.values.copy_(values)

    def inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Hand the attention a cache that puts the prefix in front, and a mask that shows it."""
        called = named_inputs(layer, args, kwargs)
        cache = PrefixedCache(called.get("past_key_values"), self.keys, self.values)
        mask = widened_mask(layer, called, self.length)
        return (), {**called, "past_key_values": cache, "attention_mask": mask}

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return ``output``: the inputs were changed."""
        return output

    def computes_like(self, other: Adapter) -> bool:
        """Return whether ``other`` is a prefix of the same shape."""
        return isinstance(other, PrefixAdapter) and self.keys.shape == other.keys.shape

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return keys and values as they are."""
        return {"prefix_keys": self.keys, "prefix_values": self.values}

    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over keys and values."""
        self.set_keys_values(tensors["prefix_keys"], tensors["prefix_values"])

    def extra_repr(self) -> str:
        """Return the number of prefix tokens for ``print(model)``."""
        return f"length={self.length}"


class PrefixedCache:
    """Stands in for the cache during one call of one attention module."""

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache = cache  # the real one, or None
        self.keys = keys
        self.values = values

    def update(
        self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Let the real cache remember the tokens, then return prefix and tokens.

        ``keys`` and ``values`` are (batch, kv_heads, new tokens, head_dim); what is returned, in
        their dtypes, is (batch, kv_heads, length + all tokens, head_dim).
        """
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return _before(self.keys, keys), _before(self.values, values)


def _before(prefix: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat([prefix.to(tokens.dtype).expand(len(tokens), -1, -1, -1), tokens], -2)


def widened_mask(layer: Any, called: Mapping[str, Any], length: int) -> Any:
    """Return the attention mask for ``length`` more keys on the left, which every query sees.

    Args:
        layer: The attention module.
        called: What it is called with, by name.
        length: Prefix tokens.

    Raises:
        ValueError: if the mask is of a kind that has no columns to add, or the attention would hide
            the prefix whatever the mask says.
    """
    mask = called.get("attention_mask")
    implementation = str(layer.config._attn_implementation)
    if called.get("cache") is not None or not (mask is None or isinstance(mask, Tensor)):
        kind = type(mask if called.get("cache") is None else called["cache"]).__name__
        raise ValueError(
            f"a prefix cannot be put before attention called with a {kind} "
            f"({implementation!r}); load the model with attn_implementation='sdpa' or 'eager'"
        )
    if "flash" in implementation:
        _check_flash(layer, called, implementation)
        return mask if mask is None else F.pad(mask, (length, 0), value=1)
    if mask is None and implementation != "eager":
        mask = _causal_mask(layer, called)
    if mask is None:  # a single query, or eager attention that hides nothing
        return None
    # (batch or 1, heads or 1, queries, keys): True shows; added to the scores, 0 shows
    return F.pad(mask, (length, 0), value=float(mask.dtype == torch.bool))


def _causal_mask(layer: Any, called: Mapping[str, Any]) -> Tensor | None:
    """Spell out what "no mask" means to SDPA; it counts from the first key, which is the prefix's.

    Returns (1, 1, queries, keys), bool, or None for a single query, which sees everything.
    Several queries without a mask are the first of their text; a cache that has room for more keys
    than it holds returns them all.
    """
    hidden, cache = called["hidden_states"], called.get("past_key_values")
    count = keys = hidden.shape[1]
    if count == 1:
        return None
    if cache is not None:
        keys, _ = cache.get_mask_sizes(count, layer.layer_idx)
    return torch.ones(1, 1, count, keys, dtype=torch.bool, device=hidden.device).tril()


def _check_flash(layer: Any, called: Mapping[str, Any], implementation: str) -> None:
    """Refuse what flash attention decides without a mask: windows and packed sequences."""
    positions = called.get("position_ids")
    packed = called.get("cu_seq_lens_q") is not None or (
        isinstance(positions, Tensor) and len(positions) == 1 and bool((positions.diff() < 1).any())
    )
    if packed or slides(layer.config):
        reason = "packs several texts into a row" if packed else "has a sliding window"
        raise ValueError(
            f"{implementation!r} cannot show a prefix to every token where the model {reason}; "
            "load it with attn_implementation='sdpa'"
        )
