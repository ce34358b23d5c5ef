"""Low-memory fine-tuning of Hugging Face language models, native to PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lit_adapters.version import __version__

if TYPE_CHECKING:
    from lit_adapters.adapter_set import AdapterSet
    from lit_adapters.adapters import (
        DoRA,
        FullFineTuning,
        LLaMAAdapter,
        LoRA,
        PrefixTuning,
        start_from_text,
    )
    from lit_adapters.alpaca_datamodule import AlpacaDataModule
    from lit_adapters.attachment import attach, check_adapters_fire, detach
    from lit_adapters.callbacks import (
        AdapterCheckpoint,
        GaLore,
        InitAdapters,
        SampleGenerations,
        SpikeGuard,
    )
    from lit_adapters.datamodule import InstructionDataModule
    from lit_adapters.export import export_merged, export_peft
    from lit_adapters.initialisation import initialise
    from lit_adapters.initialisers import (
        Gaussian,
        Kaiming,
        LoftQ,
        LoRAGA,
        MiLoRA,
        OLoRA,
        PiSSA,
        QPiSSA,
    )
    from lit_adapters.io import load_adapter, save_adapter
    from lit_adapters.merging import merge
    from lit_adapters.module import AdapterFineTuneModule
    from lit_adapters.quantization import BitsAndBytes


# Public names by the module that defines them. Resolved on first use, so that `--help` and a plain
# `import lit_adapters` do not pay for torch, transformers and lightning.
_HOMES = {
    "lit_adapters.adapter_set": ["AdapterSet"],
    "lit_adapters.adapters": [
        "DoRA",
        "FullFineTuning",
        "LLaMAAdapter",
        "LoRA",
        "PrefixTuning",
        "start_from_text",
    ],
    "lit_adapters.alpaca_datamodule": ["AlpacaDataModule"],
    "lit_adapters.attachment": ["attach", "check_adapters_fire", "detach"],
    "lit_adapters.merging": ["merge"],
    "lit_adapters.callbacks": [
        "AdapterCheckpoint",
        "GaLore",
        "InitAdapters",
        "SampleGenerations",
        "SpikeGuard",
    ],
    "lit_adapters.datamodule": ["InstructionDataModule"],
    "lit_adapters.export": ["export_merged", "export_peft"],
    "lit_adapters.initialisation": ["initialise"],
    "lit_adapters.initialisers": [
        "Gaussian",
        "Kaiming",
        "LoRAGA",
        "LoftQ",
        "MiLoRA",
        "OLoRA",
        "PiSSA",
        "QPiSSA",
    ],
    "lit_adapters.io": ["load_adapter", "save_adapter"],
    "lit_adapters.module": ["AdapterFineTuneModule"],
    "lit_adapters.quantization": ["BitsAndBytes"],
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterCheckpoint",
    "AdapterFineTuneModule",
    "AdapterSet",
    "AlpacaDataModule",
    "BitsAndBytes",
    "DoRA",
    "FullFineTuning",
    "GaLore",
    "Gaussian",
    "InitAdapters",
    "InstructionDataModule",
    "Kaiming",
    "LLaMAAdapter",
    "LoRA",
    "LoRAGA",
    "LoftQ",
    "MiLoRA",
    "OLoRA",
    "PiSSA",
    "PrefixTuning",
    "QPiSSA",
    "SampleGenerations",
    "SpikeGuard",
    "__version__",
    "attach",
    "check_adapters_fire",
    "detach",
    "export_merged",
    "export_peft",
    "initialise",
    "load_adapter",
    "merge",
    "save_adapter",
    "start_from_text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
