"""Lightning callbacks.

AdapterCheckpoint, InitAdapters and RunReport work with any LightningModule that holds adapters,
GaLore and SpikeGuard with any at all;
SampleGenerations and PredictionWriter need the model, tokenizer and data of this library.
"""

from lit_adapters.callbacks.checkpoint import AdapterCheckpoint
from lit_adapters.callbacks.galore import GaLore
from lit_adapters.callbacks.init import InitAdapters
from lit_adapters.callbacks.predictions import PredictionWriter
from lit_adapters.callbacks.report import RunReport
from lit_adapters.callbacks.samples import SampleGenerations
from lit_adapters.callbacks.spikes import SpikeGuard

__all__ = [
    "AdapterCheckpoint",
    "GaLore",
    "InitAdapters",
    "PredictionWriter",
    "RunReport",
    "SampleGenerations",
    "SpikeGuard",
]
