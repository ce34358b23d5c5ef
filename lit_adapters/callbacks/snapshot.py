"""A copy in main memory of what is trained and of the optimizer's state, and the way back."""

from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_adapters.callbacks.galore import GaLore
from lit_adapters.optim import GaLoreEngine

Snapshot = dict[str, Any]  # tensors and primitives: `torch.load(weights_only=True)` reads it


def take(trainer: Trainer, model: nn.Module) -> Snapshot:
    """Copy trainable parameters, the optimizer's state and GaLore's subspaces, between two steps.

    Rates and decays are no part of it: they belong to the schedule.
    """
    optimizer = trainer.optimizers[0]
    return {
        "weights": {name: _copy(p) for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": {
            number: {key: (_device(value), _copy(value)) for key, value in state.items()}
            for number, parameter in enumerate(_stepped(optimizer))
            if (state := optimizer.state.get(parameter))
        },
        "galore": [_copy(engine.state_dict()) for engine in engines(trainer)],
    }


@torch.no_grad()
def put_back(snapshot: Snapshot, trainer: Trainer, model: nn.Module) -> None:
    """Make everything equal to what `take` returned, to the bit; in place where that can be."""
    parameters = dict(model.named_parameters())
    for name, kept in snapshot["weights"].items():
        parameters[name].copy_(kept)
    optimizer = trainer.optimizers[0]
    for number, parameter in enumerate(_stepped(optimizer)):
        present = optimizer.state.pop(parameter, {})
        kept = snapshot["optimizer"].get(number)
        if kept is not None:
            optimizer.state[parameter] = {
                key: _into(present.get(key), value, device) for key, (device, value) in kept.items()
            }
    for engine, state in zip(engines(trainer), snapshot["galore"], strict=True):
        engine.load_state_dict(_copy(state))


def engines(trainer: Trainer) -> list[GaLoreEngine]:
    """Return what projects gradients in this trainer."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c.engine for c in callbacks if isinstance(c, GaLore) and c.engine is not None]


def _stepped(optimizer: Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _device(value: Any) -> str:
    """A count of steps may be kept on the CPU beside moments on the GPU."""
    return str(value.device) if isinstance(value, Tensor) else "cpu"


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return deepcopy(value)


def _into(present: Any, kept: Any, device: str) -> Any:
    """Copy ``kept`` into the tensor that is there, which may be paged, if it has its shape."""
    if not isinstance(kept, Tensor):
        return deepcopy(kept)
    if isinstance(present, Tensor) and present.shape == kept.shape and present.dtype == kept.dtype:
        return present.copy_(kept)
    return kept.to(device, copy=True)
