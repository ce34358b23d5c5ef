"""What a trainer and its model say about batches: packed or padded, for whom, how long."""

from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer

Batching = Literal["auto", "packed", "padded"]


class Packing(NamedTuple):
    """Whether batches are packed; where that was left to be found out, why not."""

    packed: bool
    why_not: str = ""


def packing(batching: Batching, module: LightningModule | None) -> Packing:
    """Return whether the sequences of a batch may share a row, for the model of ``module``.

    Raises:
        ValueError: if they are to be packed and the module says that they must not.
    """
    if batching == "padded":
        return Packing(False)
    unknown = f"{type(module).__name__} does not say whether its model keeps sequences apart"
    obstacle = getattr(module, "packing_obstacle", unknown if batching == "auto" else None)
    if obstacle is None:
        return Packing(True)
    if batching == "packed":
        raise ValueError(f"batching='packed', but {obstacle}; use batching='auto', which then pads")
    return Packing(False, "" if module is None else obstacle)


def pins_memory(trainer: Trainer | None) -> bool:
    """Return whether batches leave for an accelerator, which they do faster from pinned memory."""
    strategy = getattr(trainer, "strategy", None)
    on_cpu = strategy is None or strategy.root_device.type == "cpu"
    return not on_cpu and torch.accelerator.is_available()


def sharing(trainer: Trainer | None) -> dict[str, Any]:
    """Return which share of the data is this device's: its ``rank`` among so many ``devices``.

    The strategy's numbers: under tensor parallelism several devices share a data rank.
    """
    found = (trainer.distributed_sampler_kwargs if trainer else None) or {}
    return {"rank": found.get("rank", 0), "devices": found.get("num_replicas", 1)}


def context(module: LightningModule | None) -> int | None:
    """Return the positions that the module's model knows; None where it has no such limit."""
    config: Any = getattr(getattr(module, "model", None), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None
