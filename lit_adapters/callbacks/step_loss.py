"""The loss of any LightningModule on a batch, outside its training loop."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric

from lit_adapters.gradients import Loss
from lit_adapters.losses import IGNORE

MUTED = ("log", "log_dict")  # no loop is there to collect what they get


@contextmanager
def step_loss(module: LightningModule) -> Iterator[Loss]:
    """Yield a function that returns the mean training loss of a batch and its trained tokens.

    ``nll(batch)`` (summed loss, tokens) if ``module`` has that method, else `training_step`, whose
    loss counts as often as its batch has ``labels`` other than -100, or once. A batch goes through
    the trainer's transfer hooks and precision. Within the block the module's logging is muted; its
    metrics are reset at the end.

    Raises:
        ValueError: if the module optimises by hand, so that its `training_step` is no mere loss.
    """
    sums = inspect.ismethod(getattr(module, "nll", None))
    if not sums and not module.automatic_optimization:
        raise ValueError(
            f"{type(module).__name__} optimises by hand, so its training_step cannot be used to "
            "take gradients; give it a method nll(batch) that returns the summed loss and the "
            "number of trained tokens"
        )
    trainer = module.trainer

    def loss(_: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        batch = module._on_before_batch_transfer(batch)
        batch = trainer.strategy.batch_to_device(batch)
        with trainer.precision_plugin.forward_context():
            return _sum_to_mean(*module.nll(batch)) if sums else _step(module, batch)  # type: ignore[operator]

    before = {name: vars(module)[name] for name in MUTED if name in vars(module)}
    vars(module).update(dict.fromkeys(MUTED, _ignore))
    try:
        yield loss
    finally:
        for name in MUTED:
            del vars(module)[name]
        vars(module).update(before)
        if not sums:
            for part in module.modules():
                if isinstance(part, Metric):
                    part.reset()


def _sum_to_mean(nll: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    tokens = torch.as_tensor(tokens)
    return nll / tokens.clamp(min=1), tokens


def _step(module: LightningModule, batch: Any) -> tuple[Tensor, Tensor]:
    takes_index = len(inspect.signature(module.training_step).parameters) > 1
    output = module.training_step(*((batch, 0) if takes_index else (batch,)))
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if loss is None:  # Lightning's way to skip a batch
        return torch.zeros(()), torch.tensor(0)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return loss, torch.tensor(1)
    shifted = labels[:, 1:] if labels.ndim > 1 else labels  # the first token is not predicted
    return loss, (shifted != IGNORE).sum()


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Stand in for a muted method."""
