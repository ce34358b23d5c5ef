"""The length of DoRA's rows, applied to an output so that nothing is kept but what comes out."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

LEAST = 1e-12  # stands for a ratio of 0, through which nothing could be read back


def scaled(product: Tensor, ratio: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``(product - bias) * ratio + bias``; where the ratio is 1, ``product`` to the bit.

    Autograd would keep ``product`` for the gradient of the ratio. Without a bias the result, which
    activations and attention mostly keep anyway, says as much: it is divided by the ratio.

    Args:
        product: (..., out, ...), fp32.
        ratio: fp32, broadcasts over it; one number an output.
        bias: Broadcasts over it.
        dtype: Of the result.

    Raises:
        RuntimeError: in the backward pass, if the result was overwritten meanwhile.
    """
    result: Tensor = _Scaled.apply(product, ratio, bias, dtype)
    return result


class _Scaled(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(product: Tensor, ratio: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        result = product * _read_back(ratio)
        if bias is not None:
            result = result + (1 - ratio) * bias
        return result.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        product, ratio, bias, dtype = inputs
        # Small numbers lose digits in fp16, and beside a bias.
        ctx.reads_output = dtype != torch.float16 and bias is None
        ctx.save_for_backward(output if ctx.reads_output else product, ratio, bias)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        try:
            kept, ratio, bias = ctx.saved_tensors
        except RuntimeError as error:
            raise RuntimeError(
                "the model overwrites, in place, what a layer with DoRA returned, and the gradient "
                "of the magnitude is computed from it; `exclude` the layer, or use LoRA there"
            ) from error
        slope = slope.to(ratio.dtype)
        of_product, of_ratio, of_bias = slope * ratio, None, None
        if ctx.needs_input_grad[1]:
            moved = kept.to(ratio.dtype) if bias is None else kept - bias
            of_ratio = (slope * moved).sum_to_size(ratio.shape)
            if ctx.reads_output:
                of_ratio = of_ratio / _read_back(ratio)
        if ctx.needs_input_grad[2]:
            assert bias is not None
            of_bias = (slope * (1 - ratio)).sum_to_size(bias.shape).to(bias.dtype)
        return of_product, of_ratio, of_bias, None


def _read_back(ratio: Tensor) -> Tensor:
    return torch.where(ratio == 0, LEAST, ratio)
