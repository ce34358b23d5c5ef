"""The list of methods that a file may name; files choose from it and nothing else."""

from lit_adapters.adapters.base import AdapterSpec
from lit_adapters.adapters.lora import LoRA

METHODS: tuple[type[AdapterSpec], ...] = (LoRA,)
