"""Where a low-rank adapter starts: pure functions of the frozen matrix, one file per idea."""

from lit_adapters.initialisers.base import Factors, Initialiser, named_generator
from lit_adapters.initialisers.factored import Factored, is_smaller
from lit_adapters.initialisers.lora_ga import LoRAGA
from lit_adapters.initialisers.milora import MiLoRA
from lit_adapters.initialisers.noise import Gaussian, Kaiming
from lit_adapters.initialisers.olora import OLoRA
from lit_adapters.initialisers.pissa import PiSSA
from lit_adapters.initialisers.qpissa import LoftQ, QPiSSA, RewritesBase, remainder

__all__ = [
    "Factored",
    "Factors",
    "Gaussian",
    "Initialiser",
    "Kaiming",
    "LoRAGA",
    "LoftQ",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "QPiSSA",
    "RewritesBase",
    "is_smaller",
    "named_generator",
    "remainder",
]
