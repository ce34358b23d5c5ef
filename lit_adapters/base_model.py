"""Find and load a base model and its tokenizer: the embedded one, a folder, or a hub id."""

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]

EMBEDDED = "tiny"


def resolve_base(base: str) -> str:
    """Return what transformers should load for ``base``.

    Raises:
        FileNotFoundError: if ``base`` looks like a path and nothing is there.
    """
    if base == EMBEDDED:
        return str(files("lit_adapters") / "assets" / "tiny")
    path = Path(base).expanduser()
    if path.is_dir():
        return str(path)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        raise FileNotFoundError(
            f"base {base!r} is not a folder; expected {EMBEDDED!r}, a local folder with "
            "config.json and weights, or a hub id such as 'Qwen/Qwen3-0.6B'"
        )
    return base


def load_base(
    base: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """Return the causal language model ``base``, in evaluation mode, weights in ``dtype``.

    Only safetensors are read, and no code from a model's folder is run.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": revision}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    return AutoModelForCausalLM.from_pretrained(
        resolve_base(base), trust_remote_code=False, **options
    )


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``base``."""
    return AutoTokenizer.from_pretrained(
        resolve_base(base), revision=revision, trust_remote_code=False
    )
