"""The 4-bit and 8-bit linear layers of bitsandbytes: read in fp32, never written by a merge.

bitsandbytes may be absent and takes a second to import, so its layers are known by name and it is
imported when one of them is read.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from math import gcd
from typing import Any, NoReturn

import torch
from torch import Tensor

from lit_adapters.weights.storage import (
    BLOCK,
    allocate,
    check_shape,
    is_plain,
    matrix_shape,
    read_weight,
    requantise,
    rounding,
    settle,
    side_tensors,
    weight_blocks,
    write_weight,
)

PACKAGE = "bitsandbytes"


class _ByName(type):
    """Makes a class count as a base of the bitsandbytes class that has the same name.

    Not an ABC: with one registered, torch.compile cannot trace what `singledispatch` does.
    """

    def __subclasscheck__(cls, other: type) -> bool:
        return any(
            base.__name__ == cls.__name__ and base.__module__.partition(".")[0] == PACKAGE
            for base in other.__mro__
        )


class Linear4bit(metaclass=_ByName):
    """NF4 or FP4: a 4-bit number for each element, and a scale for each block of 64."""


class Linear8bitLt(metaclass=_ByName):
    """int8: a number of -127 to 127 for each element, and a scale for each row."""


def _matrix_shape(layer: Any) -> tuple[int, int]:
    return layer.out_features, layer.in_features


def _is_plain(layer: Any) -> bool:
    return False


def _write_weight(layer: Any, weight: Tensor) -> NoReturn:
    raise ValueError(
        f"a {type(layer).__name__} holds quantised numbers, and rounding a merged weight to them "
        "again would undo most of what was trained; load the base without quantisation, load the "
        "adapter on it, merge there and save (the `merge` command does)"
    )


def _read_weight(layer: Any) -> Tensor:
    return torch.cat(list(weight_blocks(layer)))


# --- 4 bits --------------------------------------------------------------------------------------


def _weight_blocks_4bit(layer: Any) -> Iterator[Tensor]:
    from bitsandbytes import functional as bnb

    state = layer.weight.quant_state
    out_features, in_features = matrix_shape(layer)
    packed = layer.weight.data.view(torch.uint8).view(-1)
    scales = state.absmax
    if state.nested:
        scales = bnb.dequantize_blockwise(scales, state.state2) + state.offset
    whole = state.blocksize // gcd(state.blocksize, in_features)  # rows that end with a block
    rows = max(1, BLOCK // in_features // whole) * whole
    for start in range(0, out_features, rows):
        count = min(rows, out_features - start)
        first, numbers = start * in_features, count * in_features
        blocks = slice(first // state.blocksize, -(-(first + numbers) // state.blocksize))
        part = bnb.QuantState(
            absmax=scales[blocks].float().contiguous(),
            shape=torch.Size((numbers,)),  # not as rows, see `_halve_blocks`
            code=state.code,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        last = -(-(first + numbers) // 2)  # two numbers in a byte
        yield bnb.dequantize_4bit(packed[first // 2 : last, None], part).view(count, in_features)


def _rounding_4bit(layer: Any) -> dict[str, Any]:
    state = layer.weight.quant_state
    return {"kind": state.quant_type, "double_quant": bool(state.nested)}


def _rounding_8bit(layer: Any) -> dict[str, Any]:
    return {"kind": "int8"}


def rounded(weight: Tensor, how: Mapping[str, Any]) -> Tensor:
    """Return ``weight`` (out, in), fp32, as a layer with this `rounding` would hold and read it.

    Raises:
        ValueError: if there is no such rounding, or bitsandbytes is missing.
    """
    hush()
    try:
        from bitsandbytes import functional as bnb
    except ImportError as error:
        raise ValueError(
            "this adapter was trained on a base quantised by bitsandbytes, which is needed to make "
            "that base again: pip install 'lit_adapters[quant]'"
        ) from error
    if how.get("kind") == "int8":
        numbers, scales, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
        return numbers.float() * (scales.float() / 127)[:, None]
    if how.get("kind") not in ("nf4", "fp4"):
        raise ValueError(f"quantisation {dict(how)!r} is unknown; expected nf4, fp4 or int8")
    packed, state = bnb.quantize_4bit(
        weight.contiguous(),
        quant_type=how["kind"],
        compress_statistics=how.get("double_quant") is True,
    )
    state.shape = torch.Size((weight.numel(),))  # not as rows, see `_halve_blocks`
    return bnb.dequantize_4bit(packed, state).view(weight.shape)


def _requantise_4bit(layer: Any, weight: Tensor) -> None:
    from bitsandbytes import functional as bnb

    check_shape(layer, weight)
    stored = layer.weight
    packed, state = bnb.quantize_4bit(
        weight.to(stored.device, torch.float32).contiguous(),
        blocksize=stored.blocksize,
        compress_statistics=stored.quant_state.nested,
        quant_type=stored.quant_state.quant_type,
        quant_storage=stored.data.dtype,
    )
    state.dtype = stored.quant_state.dtype  # what it is read as, not what it was made from
    stored.data.copy_(packed.view(stored.data.shape))
    stored.quant_state = state
    vars(layer)["quant_state"] = state  # bitsandbytes keeps it in two places
    _halve_blocks(layer)


def _settle_4bit(layer: Any) -> None:
    # On processors with bf16 instructions, bitsandbytes would repack the weight in the first
    # evaluation, scales rounded to bf16, into a form that has no gradient afterwards.
    vars(layer)["support_avx512bf16_for_cpu"] = False
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        layer.state_dict()  # what makes bitsandbytes undo it
        warnings.warn(
            "the base was evaluated before it was adapted, and bitsandbytes has rounded its scales "
            "to bf16 then; load it anew, with load_base or with attach before the first forward",
            stacklevel=4,
        )
    _keep_bias(layer)
    _halve_blocks(layer)


def _halve_blocks(layer: Any) -> None:
    """Let two blocks have each scale, where bitsandbytes would take the wrong one on a processor.

    With AVX-512, its release 0.50 begins a new block with each row if rows are whole multiples of
    16 and not of 64, the size of a block. Half as large, blocks end where rows of multiples of 32
    do: the numbers stay the same, and are read as they were meant (measured: an error of 9% instead
    of 25%).
    """
    state = layer.weight.quant_state
    is_odd = layer.in_features % 16 == 0 and layer.in_features % 64 != 0
    if state is None or state.blocksize != 64 or not is_odd or layer.weight.device.type != "cpu":
        return
    if layer.in_features % 32:
        warnings.warn(
            f"bitsandbytes may misread a layer with {layer.in_features} inputs on a processor; "
            "leave it out with the `skip` of the quantisation",
            stacklevel=5,
        )
        return
    state.absmax, state.blocksize = state.absmax.repeat_interleave(2), 32
    if state.nested:  # 256 scales have one of their own
        count = -(-state.absmax.numel() // 256)
        state.state2.absmax = state.state2.absmax.repeat_interleave(2)[:count]


def _allocate_4bit(layer: Any, empty: Callable[[Tensor], Tensor]) -> None:
    from bitsandbytes import functional as bnb

    tables = dict(bnb.name2qmap)
    packed = layer.weight._quantize("meta")
    if bnb.name2qmap.keys() != tables.keys():  # one without values, made for all who follow
        bnb.name2qmap.clear()
        bnb.name2qmap.update(tables)
    _allocate_packed(layer, empty)
    state = packed.quant_state
    for part in (state, *([state.state2] if state.nested else [])):
        part.absmax, part.code = empty(part.absmax), empty(part.code)
    if state.nested:
        state.offset = empty(state.offset)


def _side_tensors_4bit(layer: Any) -> list[Tensor]:
    state = layer.weight.quant_state
    if state is None:
        return []
    found = [state.absmax]
    return [*found, state.state2.absmax, state.offset] if state.nested else found


# --- 8 bits --------------------------------------------------------------------------------------


def _scales(layer: Any) -> Tensor:
    """The largest absolute value of each row (out,); it moves at the first forward."""
    waiting = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if waiting is None else waiting


def _weight_blocks_8bit(layer: Any) -> Iterator[Tensor]:
    scales = (_scales(layer).float() / 127)[:, None]
    rows = max(1, BLOCK // layer.in_features)
    for start in range(0, layer.out_features, rows):
        part = slice(start, start + rows)
        yield layer.weight.data[part].float() * scales[part]


def _requantise_8bit(layer: Any, weight: Tensor) -> None:
    from bitsandbytes import functional as bnb

    check_shape(layer, weight)
    stored = layer.weight.data
    numbers, scales, _ = bnb.int8_vectorwise_quant(weight.to(stored.device, torch.float16))
    stored.copy_(numbers)
    _scales(layer).copy_(scales)


def _settle_8bit(layer: Any) -> None:
    _keep_bias(layer)


def _allocate_8bit(layer: Any, empty: Callable[[Tensor], Tensor]) -> None:
    packed = layer.weight._quantize("meta")
    _allocate_packed(layer, empty)
    layer.weight.CB, layer.weight.SCB = layer.weight.data, empty(packed.SCB)


def _side_tensors_8bit(layer: Any) -> list[Tensor]:
    scales = _scales(layer)
    return [] if scales is None else [scales]


# --- both ----------------------------------------------------------------------------------------


def _allocate_packed(layer: Any, empty: Callable[[Tensor], Tensor]) -> None:
    """Replace a layer's tensors; what bitsandbytes keeps on the weight stays there."""
    kept = vars(layer.weight)
    allocate.dispatch(object)(layer, empty)
    vars(layer.weight).update(kept)


def _keep_bias(layer: Any) -> None:
    """Cast a bias now that bitsandbytes would cast at the first forward."""
    dtype = getattr(layer, "compute_dtype", None)
    if layer.bias is not None and dtype is not None:
        layer.bias.data = layer.bias.data.to(dtype)


ANSWERS: dict[Any, tuple[Any, Any]] = {  # for 4 bits, for 8
    matrix_shape: (_matrix_shape, _matrix_shape),
    is_plain: (_is_plain, _is_plain),
    read_weight: (_read_weight, _read_weight),
    write_weight: (_write_weight, _write_weight),
    weight_blocks: (_weight_blocks_4bit, _weight_blocks_8bit),
    rounding: (_rounding_4bit, _rounding_8bit),
    requantise: (_requantise_4bit, _requantise_8bit),
    settle: (_settle_4bit, _settle_8bit),
    side_tensors: (_side_tensors_4bit, _side_tensors_8bit),
    allocate: (_allocate_4bit, _allocate_8bit),
}
for _question, _answers in ANSWERS.items():
    for _kind, _answer in zip((Linear4bit, Linear8bitLt), _answers, strict=True):
        _question.register(_kind, _answer)


def hush() -> None:
    """Silence what bitsandbytes says at import and at each call about what is meant here."""
    for logger, phrase in {
        "bitsandbytes.backends.cpu.ops": "kernels-community",  # for evaluation in bf16 only
        "bitsandbytes.autograd._functions": "inputs will be cast",  # int8 computes so
    }.items():
        logging.getLogger(logger).addFilter(_Without(phrase))


class _Without(logging.Filter):
    def __init__(self, phrase: str) -> None:
        super().__init__(phrase)

    def filter(self, record: logging.LogRecord) -> bool:
        return self.name not in record.getMessage()

    def __eq__(self, other: object) -> bool:  # the same filter is added once
        return isinstance(other, _Without) and self.name == other.name

    __hash__ = logging.Filter.__hash__
