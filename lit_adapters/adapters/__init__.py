"""What is trained beside a frozen layer: one file per method."""

from lit_adapters.adapters.base import (
    METHOD,
    OWN_TYPE,
    PREFIX,
    Adapted,
    Adapter,
    AdapterSpec,
    Part,
    adapters_of,
    own_modules,
)
from lit_adapters.adapters.dora import DoRA, DoRAAdapter
from lit_adapters.adapters.full import FullFineTuning
from lit_adapters.adapters.llama_adapter import LLaMAAdapter, LLaMAAdapterLayer
from lit_adapters.adapters.lora import LoRA
from lit_adapters.adapters.low_rank import LoRAAdapter
from lit_adapters.adapters.methods import METHODS
from lit_adapters.adapters.new_tokens import NewRows
from lit_adapters.adapters.prefix import PEFTPrefixTuning, PrefixTuning, start_from_text
from lit_adapters.adapters.prefix_layer import PrefixAdapter
from lit_adapters.adapters.whole import TrainedCopy

__all__ = [
    "METHOD",
    "METHODS",
    "OWN_TYPE",
    "PREFIX",
    "Adapted",
    "Adapter",
    "AdapterSpec",
    "DoRA",
    "DoRAAdapter",
    "FullFineTuning",
    "LLaMAAdapter",
    "LLaMAAdapterLayer",
    "LoRA",
    "LoRAAdapter",
    "NewRows",
    "Part",
    "PEFTPrefixTuning",
    "PrefixAdapter",
    "PrefixTuning",
    "TrainedCopy",
    "adapters_of",
    "own_modules",
    "start_from_text",
]
