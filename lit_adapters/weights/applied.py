"""Calling an autograd Function without what its `apply` looks up at each call."""

from typing import Any

import torch
from torch.autograd.function import Function


def applied(function: type[Function], *args: Any) -> Any:
    """``function.apply(*args)``, all of its arguments given.

    Torch inspects the signature of ``forward`` whenever there is a ``setup_context``: 30 us a call,
    as long as a small layer takes.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(Function, function).apply(*args)  # type: ignore[misc]
