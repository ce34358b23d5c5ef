"""The two halves of every method: its settings (`AdapterSpec`) and its module (`Adapter`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Generator, Tensor, nn


class Adapter(nn.Module, ABC):
    """What is trained beside one frozen layer; it lives at ``layer.adapter``.

    It never holds its layer: one forward hook on the layer passes it in, so the module tree has no
    cycles and deepcopy, pickle and sharding see an ordinary child.
    """

    spec: "AdapterSpec"  # what it was built from

    @abstractmethod
    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Draw the default start for ``layer``."""

    @abstractmethod
    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Return the adapted output of ``layer``, called with ``args`` and ``kwargs``."""

    @abstractmethod
    def merged(self, weight: Tensor) -> Tensor:
        """Return the fp32 matrix ``(out, in)`` that equals frozen ``weight`` plus adapter."""

    @abstractmethod
    def computes_like(self, other: "Adapter") -> bool:
        """Whether equal parameters would mean equal outputs in evaluation."""

    @abstractmethod
    def file_keys(self, layer: nn.Module) -> dict[str, str]:
        """Map parameter names to their keys in a PEFT file, after the layer's name and a dot."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Follow the model to another device but never to another dtype.

        A precision plugin (``precision="bf16-true"``) casts the module before the optimizer
        exists; adapters keep their fp32 masters, to the bit.
        """

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class AdapterSpec(ABC):
    """Settings of a method: a frozen dataclass whose fields are the YAML's keys.

    A plain base class on purpose: the CLI would refuse subclasses of a dataclass.
    """

    peft_identity: ClassVar[dict[str, Any]]  # the fields of a PEFT config that mean this method

    targets: str | list[str]
    exclude: str | list[str] | None
    layers: list[int] | None

    def __post_init__(self) -> None:
        """Check the fields that every method has."""
        for name, value in {"targets": self.targets, "exclude": self.exclude}.items():
            entries = [] if value is None else [value] if isinstance(value, str) else value
            if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
                raise ValueError(f"{name} must be a string or a list of strings, got {value!r}")
        layers = [] if self.layers is None else self.layers
        if not isinstance(layers, list) or not all(type(n) is int for n in layers):
            raise ValueError(f"layers must be a list of layer numbers, got {layers!r}")

    @abstractmethod
    def build(self, layer: nn.Module, name: str) -> Adapter:
        """Return an adapter for ``layer``, called ``name`` in its model, values not yet set.

        Raises:
            ValueError: if the settings do not fit this layer.
        """

    @abstractmethod
    def to_peft(self) -> dict[str, Any]:
        """Return the fields of PEFT's ``adapter_config.json`` that say the same, less targets."""

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "AdapterSpec":
        """Return the settings that a PEFT ``adapter_config.json`` states.

        Raises:
            ValueError: if a field is malformed, or asks for what this method does not do.
        """
