"""The module of a fit with a base that has shapes only, and what else decides about memory."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from lit_adapters.adapters import METHOD
from lit_adapters.adapters.low_rank import LoRAAdapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.base_model import empty_base
from lit_adapters.callbacks import GaLore
from lit_adapters.estimate.memory_trace import MemoryTrace
from lit_adapters.initialisers import Initialiser, RewritesBase
from lit_adapters.module import AdapterFineTuneModule
from lit_adapters.precision import base_dtype, compute_dtype
from lit_adapters.weights import allocate, settle


@dataclass(frozen=True)
class Training:
    """What decides about the memory of a training run.

    Args:
        module: Its settings are read; it is not changed and needs no model.
        batch_size: Sequences of a micro-batch.
        max_length: Tokens of each; all of them are trained on.
        precision: The trainer's.
        accumulate: Micro-batches of an optimizer step.
        clip: Whether gradients are clipped.
        galore: The callback, if there is one.
        initialiser: What adapters start from.
        device: cpu or cuda; it decides how many tokens the loss scores at a time.
    """

    module: AdapterFineTuneModule
    batch_size: int
    max_length: int
    precision: str = "32-true"
    accumulate: int = 1
    clip: bool = False
    galore: GaLore | None = None
    initialiser: Initialiser | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1; give at least 1")

    def with_module(self, **changes: Any) -> "Training":
        """Return the same with other settings of the module."""
        return replace(self, module=like(self.module, **changes))


class Shapes(AdapterFineTuneModule):
    """The module with a base that has shapes only."""

    _trace: MemoryTrace

    def configure_model(self) -> None:
        """Build and adapt the base; no weights are read."""
        assert self.base is not None
        if self.adapter.reads_text:
            _ = self.tokenizer  # while it is known whose
        base, self.base = self.base, None
        precision = self._trainer.precision  # type: ignore[union-attr]
        self.model = empty_base(
            base,
            base_dtype(self.dtype_of_base, precision),
            self.revision,
            self.attn_implementation,
            self.quantization,
            compute_dtype(self.dtype_of_base, precision),
        )
        made: dict[int, tuple[Tensor, Tensor]] = {}  # also the first: an id is of what lives

        def empty(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                made[id(tensor)] = (tensor, self._trace.empty(tensor))
            return made[id(tensor)][1]

        for layer in self.model.modules():
            allocate(layer, empty)
        with self._trace:
            for layer in self.model.modules():
                settle(layer)
            super().configure_model()


def like(
    module: AdapterFineTuneModule, kind: type[AdapterFineTuneModule] | None = None, **changes: Any
) -> AdapterFineTuneModule:
    """Return an unbuilt module of the same settings, some of them changed."""
    settings = {
        **module.hparams,
        "adapter": module.adapter,
        "tokenizer": module._tokenizer,
        "optimizer": module.optimizer_factory,
        "lr_scheduler": module.lr_scheduler,
        "quantization": module.quantization,
    }
    return (kind or type(module))(**{**settings, **changes})


def built_with_shapes(training: Training, trace: MemoryTrace) -> Shapes:
    """Return the module of a training, its model built, adapted and ready."""
    module = like(training.module, Shapes, compile=False)
    assert isinstance(module, Shapes)
    module._trace = trace
    stub: Any = SimpleNamespace(precision=training.precision, callbacks=[], lr_scheduler_configs=[])
    module._trainer = stub  # what the module asks about
    module.configure_model()
    with trace:
        make_room(module.model, training.initialiser)
    return module


def make_room(model: nn.Module, initialiser: Initialiser | None) -> None:
    """Let adapters hold what an initialiser would leave in them."""
    for *_, adapter in adapted_layers(model, METHOD):
        if isinstance(initialiser, RewritesBase) and isinstance(adapter, LoRAAdapter):
            adapter.take()
        elif initialiser is not None and initialiser.pins_origin:
            adapter.make_room()
