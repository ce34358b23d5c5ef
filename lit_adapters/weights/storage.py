"""The questions the rest of the library asks about a layer; each storage answers by registering."""

from collections.abc import Callable, Iterator
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Size, Tensor, nn

# The output projection of nn.MultiheadAttention, which reads its weight and never calls it.
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

BLOCK = 1 << 22  # elements converted to fp32 at a time


@singledispatch
def matrix_shape(layer: nn.Module) -> tuple[int, int]:
    """Shape ``(out, in)`` of the matrix that ``layer`` applies.

    A convolution is its kernel with everything but the output channels flattened,
    ``(out, in / groups * kernel size)``.

    Raises:
        TypeError: if no storage is registered for this layer type.
    """
    raise TypeError(
        f"{type(layer).__name__} cannot hold a low-rank adapter; supported layers: "
        f"{', '.join(cls.__name__ for cls in matrix_shape.registry if cls is not object)}. "
        "Narrow `targets`, or register the type in lit_adapters/weights/"
    )


@singledispatch
def as_matrix(layer: nn.Module, stored: Tensor) -> Tensor:
    """View a tensor of the shape of ``layer.weight``, say a gradient, as a matrix ``(out, in)``."""
    raise TypeError(f"no storage is registered for {type(layer).__name__}")


def stored_matrix(layer: nn.Module) -> Tensor:
    """The layer's matrix ``(out, in)`` in its own dtype, sharing memory with the layer."""
    # No parameter: while FSDP computes, a plain tensor is in its place.
    return as_matrix(layer, cast(Tensor, layer.weight))


@singledispatch
def read_weight(layer: nn.Module) -> Tensor:
    """The layer's matrix as a dense fp32 tensor ``(out, in)``; may share memory with the layer."""
    return stored_matrix(layer).detach().float()


@singledispatch
def write_weight(layer: nn.Module, weight: Tensor) -> None:
    """Store the fp32 matrix ``weight`` ``(out, in)``, rounded once to the layer's own dtype.

    Raises:
        ValueError: if ``weight`` has another shape.
    """
    check_shape(layer, weight)
    stored_matrix(layer).data.copy_(weight)


def check_shape(layer: nn.Module, weight: Tensor) -> None:
    """Refuse a matrix of another shape than the layer's, which `copy_` would broadcast."""
    if tuple(weight.shape) != matrix_shape(layer):
        raise ValueError(
            f"{type(layer).__name__} holds a matrix of shape {matrix_shape(layer)}, "
            f"got {tuple(weight.shape)}"
        )


@singledispatch
def is_plain(layer: nn.Module) -> bool:
    """Whether the layer's parameters are the numbers it computes with, and not packed ones."""
    return True


@singledispatch
def requantise(layer: nn.Module, weight: Tensor) -> None:
    """Let a quantised layer hold ``weight`` (out, in), fp32, rounded as its own was.

    For a start that is subtracted from the base before it is quantised (QPiSSA), and nothing else.

    Raises:
        TypeError: if the layer is not quantised.
    """
    raise TypeError(
        f"a {type(layer).__name__} is not quantised, so there is nothing to round to; load the "
        "base with quantization='nf4'"
    )


@singledispatch
def rounding(layer: nn.Module) -> dict[str, Any]:
    """How a quantised layer rounds, in plain types; `rounded` does the same to a dense matrix.

    Raises:
        TypeError: if the layer is not quantised.
    """
    raise TypeError(f"a {type(layer).__name__} is not quantised")


@singledispatch
def settle(layer: nn.Module) -> None:
    """Prepare the layer for being computed with: it shall hold and give the same at every call."""


@singledispatch
def allocate(layer: nn.Module, empty: Callable[[Tensor], Tensor]) -> None:
    """Give a layer that was built on the meta device memory, values not set, as it is trained on.

    Args:
        layer: Its own tensors are replaced, those of its children are not.
        empty: Returns a tensor like the one it is given, with memory; the same for the same.
    """
    own: tuple[dict[str, Any], ...] = (layer._parameters, layer._buffers)
    for tensors in own:
        tensors.update({k: empty(t) for k, t in tensors.items() if t is not None})


@singledispatch
def side_tensors(layer: nn.Module) -> list[Tensor]:
    """Return what belongs to a packed weight and is neither parameter nor buffer, as scales."""
    return []


@singledispatch
def weight_blocks(layer: nn.Module) -> Iterator[Tensor]:
    """The layer's matrix in fp32 as blocks of whole rows ``(some, in)``, top to bottom.

    At most `BLOCK` elements (but at least one row) are copied at a time, none if it is fp32.
    """
    matrix = stored_matrix(layer).detach()
    if matrix.dtype == torch.float32:
        yield matrix
        return
    rows = max(1, BLOCK // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        yield matrix[start : start + rows].float()


@singledispatch
def add_low_rank(
    layer: nn.Module,
    output: Tensor,  # what the frozen layer returned
    x: Tensor,  # what goes into the branch
    A: Tensor,  # (groups * r, in)
    B: Tensor,  # (out, r)
    scale: float,
    dropout: float = 0.0,
    hidden: Tensor | None = None,  # ``A x^T`` (r, rows), where the layer `multiplies_rows`
) -> Tensor:
    """``output + scale * B A dropout(x)``, the matrices applied as ``layer`` applies its own."""
    raise TypeError(f"no storage is registered for {type(layer).__name__}")


@singledispatch
def factor_shapes(layer: nn.Module, rank: int) -> tuple[Size, Size]:
    """Shapes of ``A`` and ``B`` as weights of layers of this kind: what a file holds."""
    out_features, in_features = matrix_shape(layer)
    return Size((rank, in_features)), Size((out_features, rank))


@singledispatch
def per_output(layer: nn.Module, vector: Tensor) -> Tensor:
    """View ``vector`` (out,) so that it broadcasts over the layer's output."""
    return vector


@singledispatch
def group_count(layer: nn.Module) -> int:
    """Number of blocks of outputs that read blocks of inputs of their own (grouped convolution).

    Block ``j`` of a low-rank product is then ``B[j-th rows] A[j-th rows]``.
    """
    return 1


@singledispatch
def multiplies_rows(layer: nn.Module) -> bool:
    """Whether `add_low_rank` multiplies every row of the input, and takes a product made before."""
    return False


@singledispatch
def peft_agrees(layer: nn.Module) -> bool:
    """Whether PEFT computes the same from the same factors beside a layer like this."""
    return True


@singledispatch
def is_lookup(layer: nn.Module) -> bool:
    """Whether the layer is indexed by integers (an embedding) rather than multiplied."""
    return False


# Classes of transformers that override `forward` and compute what those of torch do.
SAME_FORWARD = {"FalconLinear"}


def foreign_forward(layer: nn.Module) -> str | None:
    """Say so if ``layer`` is of a known kind but computes something of its own from its weight.

    Scaled and causal layers do, beside which a low-rank product would stand for something else.
    Registering such a class with `matrix_shape` says that it computes what its parent does.
    """
    kinds: list[Any] = list(type(layer).__mro__)
    if matrix_shape.dispatch(kinds[0]) is matrix_shape.dispatch(object):
        return None
    place = next(i for i, kind in enumerate(kinds) if "forward" in vars(kind))
    owner, parents = kinds[place], kinds[place + 1 :]
    is_registered = not matrix_shape.registry.keys().isdisjoint(kinds[: place + 1]) or (
        # by name, as those of bitsandbytes
        matrix_shape.dispatch(owner) is not matrix_shape.dispatch(owner.__base__)
    )
    from_transformers = owner.__module__.partition(".")[0] == "transformers"
    is_scaled_table = isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale")
    if is_registered or (from_transformers and (is_scaled_table or owner.__name__ in SAME_FORWARD)):
        return None
    kind, parent = (
        cls.__name__ for cls in (kinds[0], next(p for p in parents if issubclass(p, nn.Module)))
    )
    return (
        f"its class has a forward of its own. If that computes what a {parent} does, say so with "
        f"`weights.matrix_shape.register({kind}, weights.matrix_shape.dispatch({parent}))` of "
        "lit_adapters"
    )


def has_matrix(layer: nn.Module) -> bool:
    """Whether some storage is registered for the type of ``layer``, and hooks on it ever run."""
    is_known = matrix_shape.dispatch(type(layer)) is not matrix_shape.dispatch(object)
    is_called = not isinstance(layer, NonDynamicallyQuantizableLinear)
    # Weights that are computed at each call (weight_norm), and tables that calls write to.
    is_plain = "weight" in layer._parameters and vars(layer).get("max_norm") is None
    return is_known and is_called and is_plain


def is_adaptable(layer: nn.Module) -> bool:
    """Whether a low-rank product beside ``layer`` stands for a change of its matrix."""
    return has_matrix(layer) and foreign_forward(layer) is None
