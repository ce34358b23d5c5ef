"""From an untrusted ``adapter_config.json`` to the settings of a method; nothing is imported."""

from collections.abc import Mapping
from typing import Any

from lit_adapters.adapters import METHODS, AdapterSpec
from lit_adapters.adapters.fields import shown

# Fields of every PEFT 0.21 config that change nothing about the loaded model, or are handled apart.
_COMMON = frozenset(
    "peft_type task_type inference_mode base_model_name_or_path revision auto_mapping "
    "peft_version".split()
)


def spec_from_peft(config: Mapping[str, Any]) -> AdapterSpec:
    """Return the settings that a PEFT config states.

    Raises:
        ValueError: if the method is unknown, a field is malformed, or a field asks for something
            that would make the loaded model differ from PEFT's.
    """
    method = next((method for method in METHODS if method.recognises(config)), None)
    if method is None:
        known = sorted({kind for method in METHODS for kind in method.peft_types})
        raise ValueError(
            f"peft_type {shown(config.get('peft_type'))} is not supported; expected one of "
            f"{known}. Merge the adapter with PEFT instead"
        )
    for key in sorted(set(config) - _COMMON - method.peft_fields):
        if config[key]:
            raise ValueError(
                f"{shown(key)[1:-1]}={shown(config[key])} is not supported here, and without it "
                "the adapter may compute something else. Merge it with PEFT instead, or remove the "
                "field if you know that it changes nothing"
            )
    return method.from_peft(config)
