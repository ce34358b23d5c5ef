"""Convolutions: the low-rank branch is the same convolution into ``r`` channels, then a 1x1 one.

``A`` keeps stride, padding, padding mode, dilation and groups of the layer, so the product of the
two kernels is exactly a kernel of the layer's shape, and merging is exact for all of them.
"""

import math
from typing import Any, cast

from torch import Size, Tensor, nn
from torch.nn import functional as F

from lit_adapters.weights.dropout import dropout as drop
from lit_adapters.weights.storage import (
    add_low_rank,
    as_matrix,
    check_shape,
    factor_shapes,
    group_count,
    matrix_shape,
    peft_agrees,
    per_output,
    write_weight,
)

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
POINTWISE = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def _matrix_shape(layer: Convolution) -> tuple[int, int]:
    fan_in = layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    return layer.out_channels, fan_in


def _as_matrix(layer: Convolution, stored: Tensor) -> Tensor:
    return stored.flatten(1)


def _write_weight(layer: Convolution, weight: Tensor) -> None:
    check_shape(layer, weight)
    layer.weight.data.copy_(weight.view(layer.weight.shape))  # in any memory format


def _factor_shapes(layer: Convolution, rank: int) -> tuple[Size, Size]:
    points = (1,) * len(layer.kernel_size)
    inner = (layer.in_channels // layer.groups, *layer.kernel_size)
    return Size((layer.groups * rank, *inner)), Size((layer.out_channels, rank, *points))


def _add_low_rank(
    layer: Convolution,
    output: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    shape_A, shape_B = factor_shapes(layer, B.shape[1])
    dropped = (drop(x, dropout) if dropout else x).to(A.dtype)
    # torch's own method, because it knows every padding mode and "same".
    hidden = cast(Any, layer)._conv_forward(dropped, A.view(shape_A), None)
    pointwise = next(f for kind, f in POINTWISE.items() if isinstance(layer, kind))
    branch = pointwise(hidden, B.view(shape_B), groups=layer.groups)
    return output + (branch * scale).to(output.dtype)


def _group_count(layer: Convolution) -> int:
    return layer.groups


def _peft_agrees(layer: Convolution) -> bool:
    # PEFT 0.21 leaves out dilation and padding mode, and stores grouped factors differently.
    return layer.padding_mode == "zeros" and layer.groups == 1 and set(layer.dilation) == {1}


def _per_output(layer: Convolution, vector: Tensor) -> Tensor:
    return vector.view(-1, *(1,) * len(layer.kernel_size))


for _kind in POINTWISE:
    matrix_shape.register(_kind, _matrix_shape)
    as_matrix.register(_kind, _as_matrix)
    write_weight.register(_kind, _write_weight)
    factor_shapes.register(_kind, _factor_shapes)
    add_low_rank.register(_kind, _add_low_rank)
    group_count.register(_kind, _group_count)
    peft_agrees.register(_kind, _peft_agrees)
    per_output.register(_kind, _per_output)
