"""Find and load a base model and its tokenizer: the embedded one, a folder, or a hub id."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.quantizers import AutoHfQuantizer

from lit_adapters.quantization import Kind, Quantization, as_quantization
from lit_adapters.weights import hush, settle

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
    quantization: Kind | Quantization | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> PreTrainedModel:
    """Return the causal language model ``base``, in evaluation mode, weights in ``dtype``.

    Only safetensors are read, and no code from a model's folder is run.

    Args:
        base: ``tiny``, a local folder or a hub id.
        dtype: Of the weights, of those that are not quantised.
        revision: Branch, tag or commit of a hub model.
        attn_implementation: Of transformers, such as sdpa.
        quantization: Of the linear layers, one after the other while they are loaded.
        compute_dtype: In which quantised layers multiply; ``dtype`` if null.
        device: Where to quantise; a CUDA device if there is one, if null.

    Raises:
        FileNotFoundError: if a local folder is missing.
        OSError: if the hub has no such model, wants a login or cannot be reached.
        RuntimeError: if a package is missing that quantises, or the device lacks bf16.
    """
    _check_is_model(base)
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": revision}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    settings = as_quantization(quantization)
    with _explained(base):
        if settings is not None:
            hush()
            device = device or _quantising_device()
            compute_dtype = compute_dtype or dtype
            _check_bf16(compute_dtype, device)
            head = partial(_output_head, base, revision)
            options["quantization_config"] = settings.loading(compute_dtype, head)
            options["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(
            resolve_base(base), trust_remote_code=False, **options
        )
    for module in model.modules():
        settle(module)
    return model


def _check_is_model(base: str) -> None:
    """Raise a FileNotFoundError if ``base`` is a local folder without a model."""
    folder = Path(resolve_base(base))
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    remedy = "give the folder of a model"
    if (folder / "adapter_config.json").exists():
        remedy = "it is an adapter folder: name the model as the base, and it as the adapter"
    raise FileNotFoundError(f"base {base!r} is a folder without config.json; {remedy}")


def _quantising_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _check_bf16(dtype: torch.dtype, device: torch.device) -> None:
    lacking = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == torch.bfloat16 and lacking:
        raise RuntimeError(
            f"{torch.cuda.get_device_name(device)} has no bf16, in which the quantised layers were "
            "to multiply; train with precision='16-mixed' or '32-true'"
        )


def empty_base(
    base: str,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantization: Kind | Quantization | None = None,
    compute_dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the model of `load_base` on the meta device, from its config alone.

    Layers are those of the quantisation, their weights not packed yet; `allocate` does it. Raises
    as `load_base` does.
    """
    _check_is_model(base)
    with _explained(base):
        config = AutoConfig.from_pretrained(
            resolve_base(base), revision=revision, trust_remote_code=False
        )
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=False, **options
        )
    settings = as_quantization(quantization)
    if settings is not None:
        hush()
        head = partial(_output_head, base, revision)
        loading = settings.loading(compute_dtype or dtype, head)
        quantizer = AutoHfQuantizer.from_config(loading, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map=None)
        model.tie_weights()
    return model.eval()


def _output_head(base: str, revision: str | None) -> list[str]:
    """Names of the output head of ``base``, found without its weights."""
    path = resolve_base(base)
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    head = model.get_output_embeddings()  # type: ignore[operator]
    return [name for name, module in model.named_modules() if module is head]


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of ``base``; raises as `load_base` does."""
    path = resolve_base(base)
    with _explained(base):
        try:
            return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
        except ValueError as error:  # what transformers makes of a folder without one
            if not Path(path).is_dir() or any(Path(path).glob("*tokenizer*")):
                raise
            raise FileNotFoundError(
                f"{base!r} holds no tokenizer (tokenizer.json and the like); name a folder or hub "
                "id that does as the tokenizer"
            ) from error


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
