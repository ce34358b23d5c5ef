"""DDP of a part of a model: gradients of the rest are averaged by somebody else."""

from collections.abc import Callable, Iterable
from functools import partial

from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import distributed as dist
from torch import nn


def average_all_but(strategy: DDPStrategy, weights: Callable[[], Iterable[nn.Parameter]]) -> None:
    """Let ``strategy`` neither gather nor average the gradients of ``weights()`` from now on.

    Args:
        strategy: Which has not wrapped its model yet.
        weights: Called when it does; before that they need not exist.
    """
    strategy.configure_ddp = partial(_configure_ddp, strategy, weights)  # type: ignore[method-assign]


def average_all(strategy: Strategy) -> None:
    """Undo `average_all_but` for the next fit."""
    strategy.__dict__.pop("configure_ddp", None)


def _configure_ddp(strategy: DDPStrategy, weights: Callable[[], Iterable[nn.Parameter]]) -> None:
    module = strategy.model
    assert module is not None
    left_out = {id(weight) for weight in weights()}
    named = list(module.named_parameters(remove_duplicate=False))
    wraps = any(p.requires_grad and id(p) not in left_out for _, p in named)
    for parameter in module.parameters():  # DDP starts what it averages as rank 0 does
        if id(parameter) in left_out or not wraps:
            dist.broadcast(parameter.data, 0)
    if not wraps:  # DDP refuses a model of which it is to average nothing
        return
    asked = list(getattr(module, "_ddp_params_and_buffers_to_ignore", []))
    ignored = [*asked, *(name for name, p in named if id(p) in left_out)]
    module._ddp_params_and_buffers_to_ignore = ignored  # type: ignore[assignment]
    try:
        type(strategy).configure_ddp(strategy)
    finally:  # what wraps it next may average all
        if asked:
            module._ddp_params_and_buffers_to_ignore = asked  # type: ignore[assignment]
        else:
            del module._ddp_params_and_buffers_to_ignore
