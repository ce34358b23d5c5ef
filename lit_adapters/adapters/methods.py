"""The list of methods that a file may name; files choose from it and nothing else."""

from lit_adapters.adapters.base import AdapterSpec
from lit_adapters.adapters.dora import DoRA
from lit_adapters.adapters.full import FullFineTuning
from lit_adapters.adapters.llama_adapter import LLaMAAdapter
from lit_adapters.adapters.lora import LoRA
from lit_adapters.adapters.prefix import PrefixTuning

METHODS: tuple[type[AdapterSpec], ...] = (LoRA, DoRA, FullFineTuning, LLaMAAdapter, PrefixTuning)
