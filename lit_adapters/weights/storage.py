"""The questions the rest of the library asks about a layer; each storage answers by registering."""

from functools import singledispatch

from torch import Tensor, nn


@singledispatch
def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Shape ``(out, in)`` of the matrix that ``layer`` applies.

    Raises:
        TypeError: if no storage is registered for this layer type.
    """
    raise TypeError(
        f"{type(layer).__name__} cannot hold a low-rank adapter; supported layers: "
        f"{', '.join(cls.__name__ for cls in matrix_shape.registry if cls is not object)}. "
        "Narrow `targets`, or register the type in lit_adapters/weights/"
    )


@singledispatch
def read_weight(layer: nn.Module) -> Tensor:
    """The layer's matrix as a dense fp32 tensor ``(out, in)``; may share memory with the layer."""
    raise TypeError(f"no storage is registered for {type(layer).__name__}")


@singledispatch
def write_weight(layer: nn.Module, weight: Tensor) -> None:
    """Store the fp32 matrix ``weight`` ``(out, in)``, rounded once to the layer's own dtype."""
    raise TypeError(f"no storage is registered for {type(layer).__name__}")


@singledispatch
def add_low_rank(
    layer: nn.Module,
    output: Tensor,  # what the frozen layer returned
    x: Tensor,  # what goes into the branch
    A: Tensor,  # (r, in)
    B: Tensor,  # (out, r)
    scale: float,
) -> Tensor:
    """``output + scale * B A x``, with the matrices applied as ``layer`` applies its own."""
    raise TypeError(f"no storage is registered for {type(layer).__name__}")


@singledispatch
def is_lookup(layer: nn.Module) -> bool:
    """Whether the layer is indexed by integers (an embedding) rather than multiplied."""
    return False


def is_adaptable(layer: nn.Module) -> bool:
    """Whether some storage is registered for the type of ``layer``."""
    return matrix_shape.dispatch(type(layer)) is not matrix_shape.dispatch(object)
