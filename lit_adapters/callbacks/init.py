"""Run an initialiser when a fit starts."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lit_adapters.attachment import adapted_layers
from lit_adapters.initialisation import initialise
from lit_adapters.initialisers import Initialiser


class InitAdapters(Callback):
    """Give adapters another start than their default.

    `AdapterFineTuneModule` asks for it while it builds its model, before anything is sharded. In
    any other LightningModule it acts in `setup` on adapters attached in ``__init__``. Skipped when
    the run resumes from a checkpoint that is known by then; where it is not, the checkpoint
    overwrites the start.

    Args:
        initialiser: Such as ``Gaussian()``.
    """

    def __init__(self, initialiser: Initialiser) -> None:
        self.initialiser = initialiser
        self.initialised: list[str] = []
        self._done: nn.Module | None = None  # an adapter of the model that was initialised

    def initialise(self, model: nn.Module, trainer: Trainer) -> None:
        """Initialise the adapters of ``model``, once, unless ``trainer`` resumes."""
        first = next(adapted_layers(model)).adapter
        if first is self._done or trainer.ckpt_path is not None:
            return
        self._done = first
        self.initialised = initialise(model, self.initialiser)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Act on adapters that are there already."""
        if stage == "fit" and any(True for _ in adapted_layers(pl_module)):
            self.initialise(pl_module, trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the names initialised, for the record."""
        return {"initialised": self.initialised}
