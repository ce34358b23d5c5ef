"""Whether what a layer returned is, to autograd, a product with frozen numbers and nothing else."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module
from transformers.pytorch_utils import Conv1D

from lit_adapters.weights.storage import stored_matrix

PLAIN = (nn.Linear.forward, Conv1D.forward)
PRODUCTS = ("MmBackward0", "AddmmBackward0")
VIEWS = ("ViewBackward0", "UnsafeViewBackward0")


def frozen_matrix(layer: nn.Module) -> Tensor | None:
    """Return the matrix (out, in) of a layer that multiplies with it, and does not train it."""
    if type(layer).forward not in PLAIN or "forward" in layer.__dict__:
        return None
    # No property, as of a parametrisation, which may give others each time; and no class of its
    # own, which may multiply in its own way.
    weight: Any = layer._parameters.get("weight", vars(layer).get("weight"))
    if not (is_ordinary(weight) or type(weight) is nn.Parameter):
        return None
    matrix = stored_matrix(layer)
    return None if matrix.requires_grad else matrix


def is_product_alone(layer: nn.Module, output: Tensor, x: Tensor) -> bool:
    """Whether gradients of ``output`` pass through the product with ``x`` and nothing else.

    False, too, if there are none or somebody might wait for them on their way. To be called in the
    only forward hook of ``layer``, which has a `frozen_matrix`.
    """
    node: Any = output.grad_fn
    if (
        node is None
        or not x.requires_grad
        or len(layer._forward_hooks) > 1
        or module._global_forward_hooks
        or is_watched(output)
    ):
        return False
    if type(node).__name__ in VIEWS:  # of rows, in the dimensions of `x`
        node = node.next_functions[0][0]
    if type(node).__name__ not in PRODUCTS:
        return False
    trained = [edge for edge in node.next_functions if edge[0] is not None]
    if not trained:  # `x` is a view that was made without gradients of what has some
        return False
    if not _leads_to(trained, x) and type(trained[0][0]).__name__ in VIEWS:  # of `x`, as rows
        trained = [*trained[0][0].next_functions, *trained[1:]]
    return _leads_to(trained, x)


def _leads_to(edges: Sequence[tuple[Any, int]], x: Tensor) -> bool:
    """Whether the only one of some edges of the graph is where gradients of ``x`` go."""
    (node, number), *others = edges
    if x.grad_fn is None:
        return not others and getattr(node, "variable", None) is x
    return not others and node is x.grad_fn and number == x.output_nr


def is_ordinary(x: Tensor) -> bool:
    """Whether ``x`` is of no class of its own, or stands for such in an estimate of memory."""
    return type(x) is Tensor or type(x) is FakeTensor


def is_watched(output: Tensor) -> bool:
    """Whether somebody has asked for the gradient of ``output``, to see or to change it."""
    return bool(output._backward_hooks) or output.retains_grad
