"""Leave the library: a merged stock model, or a plain PEFT adapter."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.adapters import OWN_TYPE
from lit_adapters.io import peft_config, save_adapter
from lit_adapters.merging import merge

VLLM_RANK = 16  # its default --max-lora-rank
MODEL, ADAPTER = "config.json", "adapter_config.json"  # which folder is which


def free_folder(path: str | Path, other: str) -> Path:
    """Return the folder ``path``, to be written, if it is free of the ``other`` kind.

    Both in one would be read as an adapter on the model, which is merged already, or another's.

    Args:
        path: It need not exist.
        other: `MODEL` or `ADAPTER`.

    Raises:
        ValueError: if it is no name, a file, or holds ``other``.
    """
    folder = Path(path)
    if not str(path) or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"the output {str(path)!r} is no folder; name one, which need not exist")
    if (folder / other).exists():
        raise ValueError(
            f"{folder} holds {other}: a model and an adapter in one folder would be taken for each "
            "other's, and the adapter applied to it; choose another folder"
        )
    return folder


def export_merged(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
    untie: bool = False,
) -> Path:
    """Write base and adapter as one stock Hugging Face model folder; ``model`` keeps its adapters.

    Args:
        model: A model with adapters.
        path: The folder to write.
        tokenizer: Written beside it if given.
        dtype: Of the stored weights, rounded once after the fp32 merge; the model's own if null.
        untie: Give a tied layer that is adapted at one end a weight of its own.

    Raises:
        ValueError: if there is no adapter, a tied weight stands in the way (see `merge`), or the
            folder is an adapter's.
    """
    folder = free_folder(path, ADAPTER)
    merged = copy.deepcopy(model)
    if dtype is not None:  # a narrower weight would round the sum before it is stored
        nn.Module.to(merged, torch.promote_types(model.dtype, dtype))
    merge(merged, untie)
    if dtype is not None:
        nn.Module.to(merged, dtype)
    merged.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def export_peft(
    model: nn.Module, path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Write the adapters as a folder that ``peft.PeftModel.from_pretrained`` loads, and vLLM.

    Args:
        model: A model with adapters.
        path: The folder to write.
        tokenizer: Written beside it if given.

    Raises:
        ValueError: if PEFT has no method that computes the same, or the folder is a model's.
            Nothing is then written.
    """
    folder = free_folder(path, MODEL)
    kind = peft_config(model)["peft_type"]
    if kind.startswith(OWN_TYPE):
        raise ValueError(
            f"PEFT has nothing that computes what this adapter does ({kind}); use its folder with "
            "load_adapter, or export a merged model if the method can be merged"
        )
    save_adapter(model, folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def serving_notes(config: Mapping[str, Any]) -> list[str]:
    """Return what keeps servers from loading a PEFT folder, one sentence each; often nothing.

    What vLLM (its LoRA loader, 2026) refuses, and the remedy, given an ``adapter_config.json``.
    """
    merged = "export a merged model instead (--format hf)"
    notes = []
    if config.get("modules_to_save"):
        notes.append(f"vLLM loads no whole modules (modules_to_save); {merged}.")
    if config.get("trainable_token_indices"):
        notes.append(
            f"vLLM loads no rows of new tokens; {merged}. With PEFT, load the tokenizer written "
            "here and resize the base to it first"
        )
    if config.get("bias") not in (None, "none"):
        notes.append(f"vLLM loads no trained biases; {merged}.")
    if config.get("use_dora"):
        notes.append(f"vLLM loads no DoRA; {merged}.")
    rank = max([config.get("r") or 0, *(config.get("rank_pattern") or {}).values()])
    if rank > VLLM_RANK:
        notes.append(f"vLLM takes ranks up to {VLLM_RANK} by default: --max-lora-rank {rank}.")
    return notes
