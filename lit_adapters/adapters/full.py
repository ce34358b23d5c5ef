"""Full fine-tuning, the baseline: every parameter of the base is trained where it is."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Generator, Tensor, nn

from lit_adapters.adapters.base import PREFIX, Adapted, Adapter, AdapterSpec, Part, own_modules
from lit_adapters.adapters.fields import read_field
from lit_adapters.optim import SHADOW
from lit_adapters.weights import is_plain


@dataclass(frozen=True)
class FullFineTuning(AdapterSpec):
    """Train the base itself, behind the same module, configs, checkpoints and folders.

    Args:
        targets: ``"all"`` (every module with parameters of its own), or as in `LoRA`.
        exclude: Names to leave frozen: a regular expression or a list of name endings.
        layers: Keep only modules inside the decoder layers of these numbers.
    """

    peft_types: ClassVar[tuple[str, ...]] = ("LIT_FULL",)
    peft_fields: ClassVar[Set[str]] = frozenset({"target_modules"})

    targets: str | list[str] = "all"
    exclude: str | list[str] | None = None
    layers: list[int] | None = None

    def fits(self, layer: nn.Module) -> bool:
        """Whether ``layer`` has parameters of its own."""
        return any(True for _ in layer.parameters(recurse=False))

    def companions(
        self, model: nn.Module, names: list[str], stated: Mapping[str, Any], tokenizer: Any
    ) -> Sequence[Part]:
        """Refuse norms that learn from every batch, whether their parameters are trained or not.

        Raises:
            ValueError: if there is one in ``model``: no adapter file holds what it learns.
        """
        for name, module in own_modules(model).items():
            if getattr(module, "track_running_stats", False):
                raise ValueError(
                    f"{name!r} ({type(module).__name__}) keeps running statistics up to date "
                    "in training, frozen or not, and adapter files hold parameters only; replace "
                    "it by a norm that keeps none, such as GroupNorm"
                )
        return ()

    def build(self, layer: nn.Module, name: str) -> "TrainedLayer":
        """Return the marker of a trained layer.

        Raises:
            ValueError: if training changes buffers of ``layer``, which no adapter file holds, or
                it is quantised.
        """
        if not is_plain(layer):
            raise ValueError(
                f"{name!r} ({type(layer).__name__}) is quantised and cannot be trained itself; "
                "take an adapter such as LoRA, or load the base without quantisation"
            )
        buffers = layer._buffers.keys() - layer._non_persistent_buffers_set
        if buffers:
            raise ValueError(
                f"{name!r} ({type(layer).__name__}) keeps {', '.join(sorted(buffers))} up to date "
                "beside its parameters, and adapter files hold parameters only; leave it out with "
                "`exclude`"
            )
        return TrainedLayer(self)

    def to_peft(self, targets: str | list[str], adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return the fields of the config, in PEFT's layout."""
        return {"peft_type": "LIT_FULL", "target_modules": targets}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "FullFineTuning":
        """Return the settings that such a config states."""
        return cls(targets=read_field(config, "target_modules", (str, list)))

    def pack(self, model: nn.Module, adapted: Sequence[Adapted]) -> dict[str, Tensor]:
        """Return the trained parameters in their own dtype, a tied one once."""
        seen: set[int] = set()
        packed = {}
        for name, layer, adapter in adapted:
            for key, tensor in adapter.tensors(layer).items():
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    packed[f"{PREFIX}{name}.{key}"] = tensor.detach()
        return packed


class TrainedLayer(Adapter):
    """Marks a layer whose own parameters are trained; holds nothing and changes nothing."""

    def __init__(self, spec: FullFineTuning) -> None:
        super().__init__()
        self.spec = spec

    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Start from the base."""

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return ``output``: the layer was trained itself."""
        return output

    def computes_like(self, other: Adapter) -> bool:
        """Return whether the other marks a trained layer too."""
        return isinstance(other, TrainedLayer)

    def merge_into(self, layer: nn.Module) -> None:
        """Leave the weight, which is trained already."""

    def trained(self, layer: nn.Module) -> list[nn.Parameter]:
        """Return all parameters of ``layer`` itself."""
        named = layer.named_parameters(recurse=False)
        return [parameter for name, parameter in named if name != SHADOW]

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return all parameters of ``layer`` itself; GaLore's stand-in for one is none."""
        named = layer.named_parameters(recurse=False)
        return {name: parameter for name, parameter in named if name != SHADOW}

    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Copy into the layer's own parameters; a tied one is in the file once."""
        for key, value in tensors.items():
            layer.get_parameter(key).copy_(value)
