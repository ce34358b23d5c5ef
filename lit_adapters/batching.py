"""What a trainer and its module say about batches: of whose tokens, packed or padded, how long."""

from inspect import signature
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from transformers import PreTrainedTokenizerBase

Batching = Literal["auto", "packed", "padded"]


class Packing(NamedTuple):
    """Whether batches are packed; where that was left to be found out, why not."""

    packed: bool
    why_not: str = ""


def check_batching(batching: Batching) -> None:
    """Raise a ValueError if there is no such way to make batches."""
    if batching not in get_args(Batching):
        raise ValueError(
            f"batching {batching!r} is unknown; use 'auto', 'packed' or 'padded' (with "
            "group_by_length, which is the default, padding is little)"
        )


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


def tells_loaders_apart(module: LightningModule | None, split: str) -> bool:
    """Return whether a module asks which loader a batch is of; only then it can have several."""
    step = "test_step" if split == "test" else "validation_step"
    return module is None or "dataloader_idx" in signature(getattr(module, step)).parameters


def context(module: LightningModule | None) -> int | None:
    """Return the positions that the module's model knows; None where it has no such limit."""
    config: Any = getattr(getattr(module, "model", None), "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def check_context(
    module: LightningModule | None, data: str, longest: int | None, max_length: int
) -> None:
    """Raise a ValueError if the module's model cannot read examples as long as these.

    Args:
        module: That of a trainer; nothing is known without one.
        data: What messages call the examples.
        longest: Tokens of the longest; None if nobody knows yet, but that none is above
            ``max_length``.
        max_length: The setting that they were cut to.
    """
    limit = context(module)
    if limit is not None and (max_length if longest is None else longest) > limit:
        has = f"may have {max_length}" if longest is None else f"has {longest}"
        raise ValueError(
            f"{data}: the longest example {has} tokens (max_length is {max_length}), but the model "
            f"reads {limit} at most; set max_length to {limit} or less"
        )


def tokenizer_of(module: LightningModule | None, asker: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the module; raise a ValueError if it has none.

    Args:
        module: That of a trainer, if there is one.
        asker: Name of the class that could be given one.
    """
    found: PreTrainedTokenizerBase | None = getattr(module, "tokenizer", None)
    if found is None:
        owner = "there is no trainer" if module is None else f"{type(module).__name__} has none"
        raise ValueError(
            f"no tokenizer: tokenizer=None takes the model's, but {owner}; give "
            f"{asker}(tokenizer=...) a folder, a hub id or a tokenizer"
        )
    return found
