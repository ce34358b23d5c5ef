"""How a frozen layer stores its matrix, and how a low-rank product is applied beside it.

A new storage (another layer type, another quantisation) is one file here that registers its layer
class with the functions below; nothing else in the library changes.
"""

from lit_adapters.weights import convolution as _convolution  # registers Conv1d, Conv2d, Conv3d
from lit_adapters.weights import dense as _dense  # registers Linear, Conv1D and Embedding
from lit_adapters.weights import quantised as _quantised  # registers bitsandbytes' layers
from lit_adapters.weights.base_product import is_ordinary
from lit_adapters.weights.branch import branch_dtype, is_transformed, narrow_products
from lit_adapters.weights.quantised import hush, rounded
from lit_adapters.weights.recipes import forget_recipe, note_recipe
from lit_adapters.weights.storage import (
    add_low_rank,
    allocate,
    as_matrix,
    factor_shapes,
    foreign_forward,
    group_count,
    has_matrix,
    is_adaptable,
    is_lookup,
    is_plain,
    matrix_shape,
    multiplies_rows,
    peft_agrees,
    per_output,
    read_weight,
    requantise,
    rounding,
    settle,
    side_tensors,
    stored_matrix,
    weight_blocks,
    write_weight,
)

__all__ = [
    "add_low_rank",
    "allocate",
    "branch_dtype",
    "as_matrix",
    "factor_shapes",
    "forget_recipe",
    "foreign_forward",
    "group_count",
    "has_matrix",
    "is_adaptable",
    "hush",
    "is_lookup",
    "is_ordinary",
    "is_plain",
    "is_transformed",
    "settle",
    "matrix_shape",
    "multiplies_rows",
    "narrow_products",
    "note_recipe",
    "peft_agrees",
    "per_output",
    "read_weight",
    "requantise",
    "rounded",
    "rounding",
    "side_tensors",
    "stored_matrix",
    "weight_blocks",
    "write_weight",
]
del _convolution, _dense, _quantised
