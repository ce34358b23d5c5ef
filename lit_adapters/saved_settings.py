"""Settings as a checkpoint holds them: plain types out, and nothing but plain types back in."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast, get_args

from lit_adapters.adapters import METHODS, AdapterSpec
from lit_adapters.losses import LossKind
from lit_adapters.optim.schedule import Decay
from lit_adapters.quantization import BitsAndBytes, Kind, Quantization, as_quantization


def spec_to_plain(spec: AdapterSpec) -> dict[str, Any]:
    """Return a spec as a config file states it."""
    return {
        "class_path": f"lit_adapters.{type(spec).__name__}",
        "init_args": asdict(cast(Any, spec)),
    }


def spec_from_plain(plain: Mapping[str, Any]) -> AdapterSpec:
    """Rebuild a spec from saved hyper-parameters; the class comes from our list, not the file."""
    name = str(plain.get("class_path")).rpartition(".")[2]
    for method in METHODS:
        if method.__name__ == name:
            try:
                return method(**plain.get("init_args", {}))
            except TypeError as error:
                raise ValueError(f"saved settings of {name} do not fit: {error}") from error
    raise ValueError(
        f"adapter {name!r} is unknown; expected one of {[m.__name__ for m in METHODS]}"
    )


def quantization_to_plain(chosen: Quantization | None) -> dict[str, Any] | None:
    """Return settings of a quantisation as a config file states them; only ours can be saved."""
    if not isinstance(chosen, BitsAndBytes):
        return None
    return {"class_path": "lit_adapters.BitsAndBytes", "init_args": asdict(chosen)}


def quantization_from_plain(
    plain: Kind | Quantization | Mapping[str, Any] | None,
) -> Quantization | None:
    """Rebuild the settings of a quantisation from a name or from saved hyper-parameters."""
    if not isinstance(plain, Mapping):
        return as_quantization(plain)
    try:
        return BitsAndBytes(**plain.get("init_args", {}))
    except TypeError as error:
        raise ValueError(f"saved settings of the quantisation do not fit: {error}") from error


def trusted_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be taken from a checkpoint's hyper-parameters: our keys, plain values.

    A checkpoint may come from anywhere. The only class it can choose is an adapter of our list.
    """
    plain = {
        key: saved[key]
        for key in ("base", "tokenizer", "warmup", "lora_plus_ratio", "embedding_lr",
                    "gradient_checkpointing", "dtype", "revision",
                    "attn_implementation", "max_new_tokens", "lean_blocks")
        if isinstance(saved.get(key), str | bool | int | float)
    }  # fmt: skip
    if isinstance(saved.get("adapter"), Mapping):
        plain["adapter"] = spec_to_plain(spec_from_plain(saved["adapter"]))
    if isinstance(saved.get("quantization"), Mapping):
        chosen = quantization_from_plain(saved["quantization"])
        plain["quantization"] = quantization_to_plain(chosen)
    for key, allowed in {"lr_scheduler": Decay, "loss": LossKind}.items():
        if saved.get(key) in get_args(allowed):
            plain[key] = saved[key]
    return plain
