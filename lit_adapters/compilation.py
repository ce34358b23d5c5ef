"""torch.compile, layer by layer: one compilation serves all layers of a kind."""

import shutil
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from inspect import signature
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, Strategy
from torch import nn
from torch.utils.checkpoint import checkpoint

from lit_adapters.sharding import decoder_layers

# Of one kind of layer: with and without gradients, first layer or later, with and without a mask,
# one row or several, lengths fixed or not. Beyond it torch runs what is new without compiling it.
MOST_VERSIONS = 64


def backend_of(choice: bool | str) -> str | None:
    """Return the name of a backend of torch.compile, or None for none.

    Args:
        choice: True is torch's default, inductor.

    Raises:
        ValueError: if there is no such backend.
    """
    if isinstance(choice, bool):
        return "inductor" if choice else None
    if choice not in torch.compiler.list_backends(exclude_tags=()):
        usual = ["aot_eager", "eager", *torch.compiler.list_backends()]
        raise ValueError(
            f"compile={choice!r} is no backend of torch.compile; expected true, false, or one of "
            f"{', '.join(sorted(usual))}"
        )
    return choice


def compile_layers(model: nn.Module, backend: str, strategy: Strategy | None = None) -> None:
    """Let each decoder layer of ``model``, adapters included, run compiled from its next call on.

    Modules, names and state-dict keys stay as they are. What is around the layers (embeddings, the
    mask, the head and its loss) runs as before.

    Args:
        model: With its adapters.
        backend: Of torch.compile.
        strategy: Lightning's, which says on which device the model will run.

    Raises:
        RuntimeError: if there is no compiler for that device.
        ValueError: if the model has no decoder layers, or is to be sharded by FSDP1.
    """
    check_compile(strategy)
    if backend == "inductor":
        _check_compiler(strategy.root_device if strategy else torch.device("cpu"))
    try:
        layers = decoder_layers(model)
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} has no list of decoder layers that could be compiled one by "
            "one; leave compile out"
        ) from error
    # Else a layer would run as compiled for one that has no adapter where it has.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    # Torch would cut each layer where a bucket of DDP is full, for gradients to be sent meanwhile;
    # they are anyway, layer after layer.
    torch._dynamo.config.optimize_ddp = False
    for _, layer in layers:
        layer.compile(**_options(backend))
        if getattr(layer, "gradient_checkpointing", False):
            recomputed: Any = layer
            recomputed._gradient_checkpointing_func = partial(_recompute, backend)


def check_compile(strategy: Strategy | None) -> None:
    """Raise a ValueError if layers cannot be compiled under ``strategy``.

    FSDP2's hooks gather a layer's weights outside of what is compiled.
    """
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"compile with {type(strategy).__name__}: FSDP1 puts another module around each layer, "
            "and compiling what is in it was not tried. Take FSDP2 "
            "(strategy=ModelParallelStrategy()) or DDP, or leave compile out"
        )


def _options(backend: str) -> dict[str, Any]:
    # A parameter since torch 2.13; the number before is 8 for all of torch.
    has_limit = "recompile_limit" in signature(torch.compile).parameters
    return {"backend": backend, **({"recompile_limit": MOST_VERSIONS} if has_limit else {})}


@torch.compiler.disable
def _recompute(backend: str, layer: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint around what is compiled: inside of it torch compiles next to nothing."""
    return checkpoint(_compiled_call(backend), layer, *args, use_reentrant=False)


@cache
def _compiled_call(backend: str) -> Any:
    def call(layer: Callable[..., Any], *args: Any) -> Any:
        return layer(*args)

    return torch.compile(call, **_options(backend))


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        names = [name for name in torch._inductor.config.cpp.cxx if name]
        if not any(shutil.which(name) for name in names):
            raise RuntimeError(
                f"compile needs a C++ compiler on the CPU, and there is no {' or '.join(names)}; "
                "install one (package g++), name yours in the environment variable CXX, or leave "
                "compile out"
            )
    elif find_spec("triton") is None:
        raise RuntimeError(
            f"compile needs the package triton on {device.type}; install it, or leave compile out"
        )
