"""Layers that hold an ordinary floating-point matrix: Linear, Hugging Face Conv1D, Embedding."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_adapters.weights.branch import add_branch, add_product
from lit_adapters.weights.storage import (
    add_low_rank,
    as_matrix,
    is_lookup,
    matrix_shape,
    multiplies_rows,
)


@matrix_shape.register(nn.Linear)
def _(layer: nn.Linear) -> tuple[int, int]:
    return layer.out_features, layer.in_features


@matrix_shape.register(Conv1D)
@matrix_shape.register(nn.Embedding)
def _(layer: Conv1D | nn.Embedding) -> tuple[int, int]:
    rows, columns = layer.weight.shape  # both store (in, out)
    return columns, rows


@as_matrix.register(nn.Linear)
def _(layer: nn.Linear, stored: Tensor) -> Tensor:
    return stored


@as_matrix.register(Conv1D)
@as_matrix.register(nn.Embedding)
def _(layer: Conv1D | nn.Embedding, stored: Tensor) -> Tensor:
    return stored.T


add_low_rank.register(nn.Linear, add_branch)
add_low_rank.register(Conv1D, add_branch)


@add_low_rank.register(nn.Embedding)
def _(layer: nn.Embedding, output: Tensor, x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    # Gemma multiplies its embeddings; the branch stands for a change of the table, so it is too.
    # It is read as a buffer or number at call time: a cast of the model casts it as well.
    factor = getattr(layer, "embed_scale", 1.0)
    hidden = F.embedding(x, A.T, padding_idx=layer.padding_idx)
    return add_product(output, hidden * factor, B, scale)


@is_lookup.register(nn.Embedding)
def _(layer: nn.Embedding) -> bool:
    return True


@multiplies_rows.register(nn.Linear)
@multiplies_rows.register(Conv1D)
def _(layer: nn.Linear | Conv1D) -> bool:
    return True
