"""Settings as a checkpoint holds them: plain types out, and nothing but plain types back in."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, cast, get_args

from lit_adapters.adapters import METHODS, AdapterSpec
from lit_adapters.losses import LossKind
from lit_adapters.optim.schedule import Decay


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


def trusted_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return what may be taken from a checkpoint's hyper-parameters: our keys, plain values.

    A checkpoint may come from anywhere. The only class it can choose is an adapter of our list.
    """
    plain = {
        key: saved[key]
        for key in ("base", "tokenizer", "warmup", "lora_plus_ratio", "embedding_lr",
                    "gradient_checkpointing", "dtype", "revision",
                    "attn_implementation", "max_new_tokens")
        if isinstance(saved.get(key), str | bool | int | float)
    }  # fmt: skip
    if isinstance(saved.get("adapter"), Mapping):
        plain["adapter"] = spec_to_plain(spec_from_plain(saved["adapter"]))
    for key, allowed in {"lr_scheduler": Decay, "loss": LossKind}.items():
        if saved.get(key) in get_args(allowed):
            plain[key] = saved[key]
    return plain
