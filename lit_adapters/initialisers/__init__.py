"""Where a low-rank adapter starts: pure functions of the frozen matrix, one file per idea."""

from lit_adapters.initialisers.base import Factors, Initialiser, named_generator
from lit_adapters.initialisers.lora_ga import LoRAGA
from lit_adapters.initialisers.milora import MiLoRA
from lit_adapters.initialisers.noise import Gaussian, Kaiming
from lit_adapters.initialisers.olora import OLoRA
from lit_adapters.initialisers.pissa import PiSSA

__all__ = [
    "Factors",
    "Gaussian",
    "Initialiser",
    "Kaiming",
    "LoRAGA",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "named_generator",
]
