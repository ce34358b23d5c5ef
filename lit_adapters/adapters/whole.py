"""Whole modules trained beside an adapter: a copy computes instead of the frozen original."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from lit_adapters.adapters.base import Adapter, Part
from lit_adapters.weights import is_plain


@dataclass(frozen=True)
class WholeModules(Part):
    """Train copies of whole modules, such as an output head or norms; the originals stay.

    Args:
        targets: Name endings of the modules.
    """

    targets: list[str]
    exclude: None = None
    layers: None = None

    def fits(self, layer: nn.Module) -> bool:
        """Whether ``layer`` can be called and has parameters, all of them floating-point."""
        parameters = list(layer.parameters())
        is_called = not isinstance(layer, nn.ModuleList | nn.ModuleDict | nn.ParameterList)
        if not all(is_plain(module) for module in layer.modules()):
            return False  # packed in whichever data type
        return is_called and bool(parameters) and all(p.is_floating_point() for p in parameters)

    def select(self, names: list[str]) -> list[str]:
        """Leave out modules inside modules that are copied anyway."""
        return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]

    def build(self, layer: nn.Module, name: str) -> "TrainedCopy":
        """Return a copy of ``layer`` without values."""
        held = layer._modules.get(TrainedCopy.slot)
        original = held.module if isinstance(held, TrainedCopy) else layer
        return TrainedCopy(self, copy.deepcopy(original))


class TrainedCopy(Adapter):
    """A trained copy of a module, fp32, buffers included.

    It computes in the dtype of the original, to which its fp32 masters are cast at each call where
    that differs. Linear layers and embeddings below it are called with no rows at all, so that the
    product with the frozen weight costs nothing; other originals compute, and that is dropped.
    """

    slot: ClassVar[str] = "trained_copy"
    changes_inputs: ClassVar[bool] = True

    def __init__(self, spec: WholeModules, module: nn.Module) -> None:
        super().__init__()
        self.spec = spec
        self.module = module.to("meta", torch.float32).requires_grad_(True)
        self._args: tuple[Any, ...] | None = None  # of the call that is under way

    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Start from the original."""
        self._take_over(layer)

    @torch.no_grad()
    def _take_over(self, layer: nn.Module) -> None:
        theirs = dict(chain(layer.named_parameters(), layer.named_buffers()))
        for name, ours in chain(self.module.named_parameters(), self.module.named_buffers()):
            ours.copy_(theirs[name])

    def inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a matrix an empty batch; the copy gets the real one."""
        self._args = None
        is_matrix = isinstance(layer, nn.Linear | Conv1D | nn.Embedding)
        if not is_matrix or kwargs or len(args) != 1 or args[0].ndim < 2:
            return args, kwargs
        self._args = args
        return (args[0][:0],), kwargs

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return what the copy computes from the same arguments."""
        args, self._args = self._args or args, None
        dtypes = {name: parameter.dtype for name, parameter in layer.named_parameters()}
        cast = {
            name: parameter.to(dtypes[name])
            for name, parameter in self.module.named_parameters()
            if parameter.dtype != dtypes[name]
        }
        return functional_call(self.module, cast, args, kwargs)

    def computes_like(self, other: Adapter) -> bool:
        """Return whether the other copies a module of the same class and shapes."""
        return isinstance(other, TrainedCopy) and (
            [type(self.module), *_shapes(self)] == [type(other.module), *_shapes(other)]
        )

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """Write what was trained into the original."""
        theirs = dict(chain(layer.named_parameters(), layer.named_buffers()))
        for name, ours in chain(self.module.named_parameters(), self.module.named_buffers()):
            theirs[name].copy_(ours)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return parameters and saved buffers under their own names, as PEFT does."""
        return self.module.state_dict()

    @torch.no_grad()
    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over all values; what files do not hold comes from the original."""
        self._take_over(layer)
        for name, ours in self.module.state_dict().items():
            ours.copy_(tensors[name])


def within(name: str, endings: Sequence[str]) -> bool:
    """Whether the module called ``name``, or one around it, is meant by one of ``endings``."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(a == e or a.endswith(f".{e}") for a in around for e in endings)


def _shapes(adapter: TrainedCopy) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in adapter.module.state_dict().items()]
