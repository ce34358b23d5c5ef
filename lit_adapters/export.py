"""Leave the library: a merged stock model, or a plain PEFT adapter."""

import copy
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.adapters import OWN_TYPE
from lit_adapters.attachment import merge
from lit_adapters.io import peft_config, save_adapter


def export_merged(
    model: PreTrainedModel,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write base and adapter as one stock Hugging Face model folder; ``model`` keeps its adapters.

    Args:
        model: A model with adapters.
        path: The folder to write.
        tokenizer: Written beside it if given.
        dtype: Of the stored weights, rounded once after the fp32 merge; the model's own if null.

    Raises:
        ValueError: if there is no adapter, or a tied weight stands in the way (see `merge`).
    """
    merged = merge(copy.deepcopy(model))
    if dtype is not None:
        nn.Module.to(merged, dtype)
    folder = Path(path)
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
        ValueError: if PEFT has no method that computes the same. Nothing is then written.
    """
    kind = peft_config(model)["peft_type"]
    if kind.startswith(OWN_TYPE):
        raise ValueError(
            f"PEFT has nothing that computes what this adapter does ({kind}); use its folder with "
            "load_adapter, or export a merged model if the method can be merged"
        )
    folder = save_adapter(model, path)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
