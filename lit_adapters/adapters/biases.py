"""Biases trained beside an adapter (alone: BitFit, arXiv 2106.10199)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor, nn

from lit_adapters.adapters.base import Adapter, Part, own_modules
from lit_adapters.adapters.whole import within
from lit_adapters.weights import is_adaptable, per_output

Bias = Literal["none", "adapter", "all"]
CHANNELS_SECOND = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


@dataclass(frozen=True)
class Biases(Part):
    """Train the biases of the modules that ``targets`` names.

    Args:
        targets: A regular expression for whole dotted names.
        adapted: Which of the modules hold an adapter as well; files call their biases differently.
    """

    targets: str
    adapted: frozenset[str] = frozenset()
    exclude: None = None
    layers: None = None

    def fits(self, layer: nn.Module) -> bool:
        """Whether the bias of ``layer`` is added to its output."""
        known = is_adaptable(layer) or isinstance(layer, (nn.LayerNorm, *CHANNELS_SECOND))
        return known and isinstance(getattr(layer, "bias", None), nn.Parameter)

    def build(self, layer: nn.Module, name: str) -> "TrainedBias":
        """Return an adapter with an unset bias."""
        return TrainedBias(self, layer, name in self.adapted)


def biases(model: nn.Module, mode: Bias, adapted: Iterable[str], whole: Sequence[str]) -> Biases:
    """Return the part that trains the biases of ``model`` that ``mode`` means.

    Args:
        model: Not yet adapted.
        mode: ``"adapter"`` means the layers that hold one, ``"all"`` every module.
        adapted: Names of the layers that hold an adapter.
        whole: Name endings of modules that are trained whole.

    Raises:
        ValueError: if there is none, or one cannot be trained alone.
    """
    inside = frozenset(adapted)
    chosen = []
    for name, module in own_modules(model).items():
        own = [key for key, _ in module.named_parameters(recurse=False) if "bias" in key]
        if not own or within(name, whole) or (mode == "adapter" and name not in inside):
            continue
        if own != ["bias"] or not Biases("").fits(module):
            raise ValueError(
                f"bias={mode!r} would train {', '.join(own)} of {name!r}, a "
                f"{type(module).__name__}, which cannot be trained alone; use bias='adapter', or "
                "name the module in `modules_to_save`"
            )
        chosen.append(name)
    if not chosen:
        where = "no adapted layer" if mode == "adapter" else "nothing in the model"
        raise ValueError(f"bias={mode!r}, but {where} has a bias; leave it at 'none'")
    return Biases(targets="|".join(map(re.escape, chosen)), adapted=inside)


class TrainedBias(Adapter):
    """The trained ``bias`` (out,) of a layer, fp32, in place of the frozen one."""

    slot: ClassVar[str] = "trained_bias"

    def __init__(self, spec: Biases, layer: nn.Module, beside_adapter: bool) -> None:
        super().__init__()
        self.spec = spec
        self.key = "base_layer.bias" if beside_adapter else "bias"  # PEFT's keys
        frozen = layer.get_parameter("bias")
        self.bias = nn.Parameter(torch.empty(frozen.shape, device="meta", dtype=torch.float32))

    @torch.no_grad()
    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Start from the frozen bias."""
        self.bias.copy_(layer.get_parameter("bias"))

    def forward(self, layer: nn.Module, args: object, kwargs: object, output: Tensor) -> Tensor:
        """Return ``output + (bias - frozen bias)`` in the dtype of ``output``."""
        moved = per_output(layer, self.bias - layer.get_parameter("bias"))
        if isinstance(layer, CHANNELS_SECOND):
            moved = moved.view(-1, *[1] * (output.ndim - 2))
        return output + moved.to(output.dtype)

    def computes_like(self, other: Adapter) -> bool:
        """Return whether the other is a bias as well."""
        return isinstance(other, TrainedBias)

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """Write the bias into the layer."""
        layer.get_parameter("bias").copy_(self.bias)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return the bias."""
        return {self.key: self.bias}

    @torch.no_grad()
    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over the bias."""
        self.bias.copy_(tensors[self.key])
