"""What is trained beside a frozen layer: one file per method."""

from lit_adapters.adapters.base import Adapter, AdapterSpec
from lit_adapters.adapters.lora import LoRA, LoRAAdapter
from lit_adapters.adapters.methods import METHODS

__all__ = ["METHODS", "Adapter", "AdapterSpec", "LoRA", "LoRAAdapter"]
