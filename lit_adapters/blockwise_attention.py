"""Attention inside each sequence of a packed row, without the mask of the whole row.

A packed row is several sequences one behind the other, whose positions start again at 0 for each.
Transformers recognises such positions and describes the row's mask as a function of two indices.
Its own implementations write that out for all pairs of tokens; here it is only asked where
sequences begin, and the model's own attention then runs on one sequence after the other, or a
variable-length kernel on all of them.
"""

import inspect
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch below 2.10
    varlen_attn = None

# The transformers implementation -> ours. Transformers acts on names that hold "sdpa" or "flash".
BLOCKWISE = {"sdpa": "blockwise_sdpa", "eager": "blockwise_eager"}

Sees = Callable[[Tensor, Tensor], Tensor]  # may a query of this index see a key of that index?


@dataclass(frozen=True)
class Blocks:
    """Stands in for the mask of a packed row: where its sequences are and what is seen in them.

    Args:
        runs: How many sequences of the same length follow each other, that length, and what they
            see, (1, 1, length, length) as the implementation wants it; None if that is plainly
            causal and the implementation can say so.
        window: Every token sees itself and the ``window - 1`` tokens before it; None where
            something else is seen.
        starts: (sequences + 1,) int32 on the row's device, where each begins, and the row's end.
    """

    runs: list[tuple[int, int, Tensor | None]]
    window: int | None
    starts: Tensor

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(length for _, length, _ in self.runs)


def blocks_or_mask(whole: Callable[..., Any], additive: bool, **asked: Any) -> Any:
    """Return `Blocks` for a packed row, else what ``whole`` makes of the same arguments.

    Args:
        whole: Transformers' function for such masks.
        additive: Whether its masks are added to the scores, and always needed.
        asked: What transformers asks every mask function for.
    """
    size = asked.get("q_length")
    packed = (
        size == asked.get("kv_length")
        and isinstance(size, int)
        and size > 1
        and asked.get("batch_size") == 1
        and asked.get("attention_mask") is None
        and not asked.get("allow_is_causal_skip", True)  # something but causality is asked for
        and not asked.get("use_vmap", False)  # a function that takes single indices only
        and not (asked.get("q_offset") or asked.get("kv_offset"))
    )
    found = _blocks(additive, **asked) if packed else None
    return whole(**asked) if found is None else found


def _blocks(
    additive: bool,
    q_length: int,
    mask_function: Callable[..., Tensor],
    device: Any,
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    **_: Any,
) -> Blocks | None:
    """Return the sequences of a row; None if there is one only or a token sees its successor."""
    index = torch.arange(q_length, device=device)
    zero = torch.zeros_like(index)

    def sees(query: Tensor, key: Tensor) -> Tensor:
        row = zero[0].expand_as(query)
        return mask_function(row, row, query, key)

    # A token that does not see its predecessor begins a sequence: nothing behind it can see across.
    begins = torch.cat([zero[:1].bool(), ~sees(index[1:], index[:-1])])
    if not begins.any() or sees(index[:-1], index[1:]).any():
        return None
    starts = torch.cat([zero[:1], begins.nonzero().flatten(), zero.new_tensor([q_length])])
    lengths = starts.diff().tolist()
    own_start = starts[begins.cumsum(0)]
    window = _window(sees, index, own_start, lengths, local_size)

    def mask(start: int, length: int) -> Tensor | None:
        if not additive and window is not None and length <= window:
            return None
        part = index[start : start + length]
        shown = sees(*torch.broadcast_tensors(part[:, None], part[None, :]))[None, None]
        if not additive:
            return shown
        hidden = torch.finfo(dtype).min
        return torch.zeros_like(shown, dtype=dtype).masked_fill(~shown, hidden)

    runs, start = [], 0
    for length, group in groupby(lengths):
        count = len(list(group))
        runs.append((count, length, mask(start, length)))
        start += count * length
    return Blocks(runs, window, starts.to(torch.int32))


def _window(
    sees: Sees, index: Tensor, own_start: Tensor, lengths: list[int], local_size: int | None
) -> int | None:
    """Return how many tokens back each one sees, itself included; None if that is not the rule.

    Two probes per token tell: the farthest key within the window is seen, the next one is not.
    """
    if sees(index, own_start).all():
        return max(lengths)
    if local_size is None:
        return None
    farthest = torch.maximum(own_start, index - local_size + 1)
    beyond = index - local_size
    inside = beyond >= own_start
    hides = not sees(index[inside], beyond[inside]).any()
    return local_size if hides and bool(sees(index, farthest).all()) else None


def blockwise(
    inner: Callable[[Any], Callable[..., tuple[Tensor, Any]]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Attend within each sequence of `Blocks`; with any other mask, as ``inner`` does.

    Args:
        inner: Gives the attention function of a module.
        module: The attention module.
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim).
        value: The same shape.
        attention_mask: `Blocks`, or what ``inner`` takes.
        options: Dropout, scaling, soft cap and whatever else the model says; for ``inner``.

    Returns:
        (batch, queries, heads, head_dim), and the weights if ``inner`` gives any.
    """
    attend = inner(module)
    if not isinstance(attention_mask, Blocks):
        return attend(module, query, key, value, attention_mask, **options)
    return _within_blocks(attend, module, query, key, value, attention_mask, options), None


@torch.compiler.disable  # it would be compiled again for all lengths that come up
def _within_blocks(
    attend: Callable[..., tuple[Tensor, Any]],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Blocks,
    options: dict[str, Any],
) -> Tensor:
    if _has_kernel(query, blocks, attend, options):
        return _all_at_once(query, key, value, blocks, options)
    sizes = [count * length for count, length, _ in blocks.runs]
    rows = zip(*(tensor[0].split(sizes, 1) for tensor in (query, key, value)), strict=True)
    outputs = []
    for (count, length, mask), row in zip(blocks.runs, rows, strict=True):
        # A view: (heads, tokens, head_dim) as (sequences, heads, length, head_dim)
        stacked = (part.unflatten(1, (count, length)).transpose(0, 1) for part in row)
        outputs.append(attend(module, *stacked, mask, **options)[0].flatten(0, 1))
    return torch.cat(outputs)[None]


@cache
def _known_to_kernel() -> Set[str]:
    return inspect.signature(varlen_attn).parameters.keys() if varlen_attn else frozenset()


def _has_kernel(query: Tensor, blocks: Blocks, attend: Any, options: dict[str, Any]) -> bool:
    return (
        query.is_cuda
        and attend is sdpa_attention_forward
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and blocks.window is not None
        and not options.get("dropout")
        and options.get("position_bias") is None
        and options.get("softcap") is None
        and {"window_size", "scale", "enable_gqa"} <= _known_to_kernel()
    )


def _all_at_once(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, options: dict[str, Any]
) -> Tensor:
    """Flash attention with sequence boundaries; returns (1, queries, heads, head_dim)."""
    window = blocks.window
    assert window is not None
    output: Tensor = varlen_attn(
        *(tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value)),
        *(blocks.starts, blocks.starts, blocks.longest, blocks.longest),
        scale=options.get("scaling"),
        window_size=(-1 if window >= blocks.longest else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output[None]


def _eager_of(module: Any) -> Callable[..., tuple[Tensor, Any]]:
    """The attention that a model's own file calls eager."""
    found: Callable[..., tuple[Tensor, Any]] = sys.modules[
        type(module).__module__
    ].eager_attention_forward
    return found


def _sdpa_of(module: Any) -> Callable[..., tuple[Tensor, Any]]:
    return sdpa_attention_forward


AttentionInterface.register(BLOCKWISE["sdpa"], partial(blockwise, _sdpa_of))
AttentionMaskInterface.register(BLOCKWISE["sdpa"], partial(blocks_or_mask, sdpa_mask, False))
AttentionInterface.register(BLOCKWISE["eager"], partial(blockwise, _eager_of))
AttentionMaskInterface.register(BLOCKWISE["eager"], partial(blocks_or_mask, eager_mask, True))
