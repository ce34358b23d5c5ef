"""From an untrusted ``adapter_config.json`` to the settings of a method; nothing is imported."""

from collections.abc import Mapping
from typing import Any

from lit_adapters.adapters import METHODS, AdapterSpec

# Fields of PEFT 0.21 that `from_peft` reads or that change nothing about the loaded model.
_UNDERSTOOD = frozenset(
    "peft_type r lora_alpha lora_dropout target_modules use_rslora exclude_modules "
    "layers_to_transform rank_pattern alpha_pattern fan_in_fan_out task_type inference_mode "
    "base_model_name_or_path revision auto_mapping peft_version init_lora_weights bias "
    "loftq_config megatron_core qalora_group_size ensure_weight_tying runtime_config "
    "eva_config corda_config lora_ga_config".split()
)
# Starts after which PEFT subtracts the first product from the base it trains on.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def spec_from_peft(config: Mapping[str, Any]) -> AdapterSpec:
    """Return the settings that a PEFT config states.

    Raises:
        ValueError: if the method is unknown, a field is malformed, or a field asks for something
            that would make the loaded model differ from PEFT's.
    """
    kind = config.get("peft_type")
    method = next(
        (
            method
            for method in METHODS
            if all(config.get(key) == value for key, value in method.peft_identity.items())
        ),
        None,
    )
    if method is None:
        known = sorted({str(m.peft_identity["peft_type"]) for m in METHODS})
        raise ValueError(f"peft_type {kind!r} is not supported; expected one of {known}")
    for key in sorted(set(config) - _UNDERSTOOD - set(method.peft_identity)):
        if config[key]:
            raise ValueError(
                f"{key}={config[key]!r} is not supported here, and without it the adapter may "
                "compute something else. Merge it with PEFT instead, or remove the field if you "
                "know that it changes nothing"
            )
    if config.get("bias") not in (None, "none"):
        raise ValueError(
            f"bias={config['bias']!r}: trained biases are not supported; merge the adapter with "
            "PEFT instead"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise ValueError(
            f"init_lora_weights={start!r}: these factors belong to a base from which PEFT "
            "subtracts their start, so on the original base they compute something else. Convert "
            "the folder with PEFT first (save_pretrained with "
            "path_initial_model_for_weight_conversion), which writes a plain LoRA"
        )
    return method.from_peft(config)
