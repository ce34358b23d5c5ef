"""Find and load a base model and its tokenizer: the embedded one, a folder, or a hub id."""

from collections.abc import Iterator
from contextlib import contextmanager
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

    Raises:
        FileNotFoundError: if a local folder is missing.
        OSError: if the hub has no such model, wants a login or cannot be reached.
    """
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": revision}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with _explained(base):
        return AutoModelForCausalLM.from_pretrained(
            resolve_base(base), trust_remote_code=False, **options
        )


def recompute_activations(model: PreTrainedModel) -> None:
    """Switch gradient checkpointing on, in the form that works over a frozen base."""
    enable = getattr(  # its name from transformers 5.2x on
        model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    model.enable_input_require_grads()


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``base``; raises as `load_base` does."""
    with _explained(base):
        return AutoTokenizer.from_pretrained(
            resolve_base(base), revision=revision, trust_remote_code=False
        )


@contextmanager
def _explained(base: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise OSError(
            f"{base!r} could not be loaded. Is the name right, does the repository ask for a login "
            "(set HF_TOKEN), is the hub within reach (HF_HUB_OFFLINE)? A local folder is written "
            f"with a leading ./ . The loader said: {error}"
        ) from error
