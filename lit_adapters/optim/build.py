"""An optimizer over what is trained: its groups, their rates, the fused kernel."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lit_adapters.optim.groups import fuse, hold_ratios, parameter_groups
from lit_adapters.optim.options import set_rate


def build_optimizer(
    factory: Callable[[Any], Optimizer],
    model: nn.Module,
    lr_ratio: float = 1.0,
    embedding_lr: float | None = None,
    rate: float | None = None,
    fused: bool = True,
) -> Optimizer:
    """Return what ``factory`` makes of the trainable parameters of ``model``.

    Args:
        factory: Called with the groups of `parameter_groups`.
        model: Holds the trainable parameters.
        lr_ratio: As for `parameter_groups`.
        embedding_lr: As for `parameter_groups`.
        rate: In place of the factory's own.
        fused: Whether to take the fused kernel where there is one; GradScaler cannot clip with it.

    Raises:
        ValueError: as `parameter_groups` and `hold_ratios` do.
    """
    optimizer = factory(parameter_groups(model, lr_ratio, embedding_lr))
    if rate is not None:
        set_rate(optimizer, rate)
    hold_ratios(optimizer)
    if fused:
        fuse(optimizer)
    return optimizer
