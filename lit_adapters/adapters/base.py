"""The two halves of every method: its settings (`AdapterSpec`) and its module (`Adapter`)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from lit_adapters.adapters.fields import shown
from lit_adapters.data import Prompting
from lit_adapters.spread import plain_name

PREFIX = "base_model.model."  # of every key in a file; PEFT finds nothing without it
OWN_TYPE = "LIT_"  # begins each ``peft_type`` that PEFT is to refuse
METHOD = "adapter"  # the slot of a method itself, as against what is trained beside it


class Adapter(nn.Module, ABC):
    """What is trained beside one frozen layer; it lives at ``layer.adapter``, or another `slot`.

    It never holds its layer: forward hooks on the layer pass it in, so the module tree has no
    cycles and deepcopy, pickle and sharding see an ordinary child. What is trained beside a method
    (a bias, new rows) lives in a slot of its own, so one layer may hold several.
    """

    spec: "Part"  # what it was built from
    active = True  # whether the layer's hooks use it
    start_name: str | None = None  # the initialiser it started from, for the record
    prompting: "Prompting | None" = None  # how it was asked in training, for the record
    source: "Adapter | None" = None  # the adapter of a tied layer whose parameters it uses
    grown_from: int | None = None  # rows of its layer's weight before `claim` added some
    slot: ClassVar[str] = METHOD  # the name of the child
    changes_inputs: ClassVar[bool] = False  # whether `inputs` does anything
    stands_in: ClassVar[bool] = False  # whether `call` does anything

    @abstractmethod
    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Draw the default start for ``layer``."""

    @abstractmethod
    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the adapted output of ``layer``, called with ``args`` and ``kwargs``.

        ``output``, which the layer returned alone, may be overwritten: nobody else has it.
        """

    def inputs(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what ``layer`` is called with instead, if `changes_inputs`."""
        return args, kwargs

    @abstractmethod
    def computes_like(self, other: "Adapter") -> bool:
        """Whether equal parameters would mean equal outputs in evaluation."""

    def start(
        self,
        layer: nn.Module,
        initialiser: Any,
        generator: Generator,
        gradient: Any = None,
        dense: Tensor | None = None,
    ) -> None:
        """Take the start that ``initialiser`` computes, from ``gradient`` (out, in) if it reads it.

        ``dense`` (out, in) is the unquantised matrix, for one that writes the base.

        Raises:
            TypeError: if this method has no such start.
        """
        raise TypeError(
            f"{type(initialiser).__name__} does not fit {type(self.spec).__name__}, which has no "
            "low-rank factors; leave the initialiser out"
        )

    def claim(self, layer: nn.Module, model: nn.Module) -> None:
        """Change the shape of ``layer``, a part of ``model``, to what this adapter needs; once."""

    def release(self, layer: nn.Module, model: nn.Module) -> None:
        """Undo `claim`."""

    def call(
        self, layer: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Return ``run(*args, **kwargs)``, the forward of ``layer``, if it `stands_in`."""
        return run(*args, **kwargs)

    def bias(self, layer: nn.Module) -> Tensor | None:
        """Return what stands in for the bias of ``layer``, if anything does."""
        return None

    def overwrites(self) -> Set[str]:
        """Return the names of the layer's tensors that `merge_into` writes."""
        return {"weight"}

    def merge_into(self, layer: nn.Module) -> None:
        """Change the weight of ``layer`` so that it computes the same without the adapter.

        Raises:
            ValueError: if no weight can say what the adapter does. The layer is then unchanged.
        """
        raise ValueError(
            f"{type(self.spec).__name__} cannot be merged: no weight of the base computes the "
            "same. Keep the base and load the adapter folder on it"
        )

    def unmoved(self) -> bool:
        """Whether it computes nothing yet and a gradient step would have changed that."""
        return False

    def make_room(self) -> None:
        """Have a place for the origin that a checkpoint will fill, if the method has one."""

    def trained(self, layer: nn.Module) -> list[nn.Parameter]:
        """Parameters of ``layer`` itself that training changes; none for most methods."""
        return []

    @abstractmethod
    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return what a file holds, by key after the layer's name and a dot."""

    @abstractmethod
    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned elsewhere; keys and shapes have been checked.

        It is called without gradients.
        """

    @property
    def needs_memory(self) -> bool:
        """Whether `load` copies into parameters, rather than let them be what it is given."""
        return True

    def take_over(self, layer: nn.Module, **values: Tensor) -> None:
        """Give parameters these values; those without memory become the tensors themselves."""
        device = next(layer.parameters()).device
        for name, value in values.items():
            old: nn.Parameter = getattr(self, name)
            if old.is_meta:
                self._parameters[name] = nn.Parameter(
                    value.to(device, old.dtype), old.requires_grad
                )
            else:
                old.copy_(value)

    def frozen_copies(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return frozen weights that a file may hold as well, by key; loading only compares them.

        PEFT writes them for embeddings and heads.
        """
        return {}

    def never_read(self, layer: nn.Module, name: str) -> dict[str, Tensor]:
        """Return what PEFT writes and never reads, by whole key; ``name`` is that of ``layer``."""
        return {}

    def misfit(self, config: Mapping[str, Any]) -> str | None:
        """Say what may be the reason if the file with this ``adapter_config.json`` does not fit."""
        return None

    def notes(self) -> dict[str, Any]:
        """Return what ``lit_adapters.json`` says beside the tensors."""
        return {}

    def adopt(self, names: Set[str]) -> None:
        """Make room for the parameters of a checkpoint, of which ``names`` are this adapter's."""

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        self.adopt({key[len(prefix) :] for key in state if key.startswith(prefix)})
        super()._load_from_state_dict(state, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Follow the model to another device but never to another dtype.

        A precision plugin (``precision="bf16-true"``) casts the module before the optimizer
        exists; adapters keep their fp32 masters, to the bit.
        """

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class Adapted(NamedTuple):
    """A layer that holds an adapter (or is about to), and its dotted name in the model."""

    name: str
    layer: nn.Module
    adapter: Adapter


def adapters_of(layer: nn.Module) -> Iterator[Adapter]:
    """Yield the adapters that ``layer`` itself holds, in the order in which they act."""
    return (child for child in layer._modules.values() if isinstance(child, Adapter))


def bias_of(layer: nn.Module) -> Tensor | None:
    """Return the bias that a call of ``layer`` adds, trained or frozen."""
    for adapter in adapters_of(layer):
        bias = adapter.bias(layer) if adapter.active else None
        if bias is not None:
            return bias
    return getattr(layer, "bias", None)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module below ``model`` by name, adapters and what is inside them left out."""
    found: dict[str, nn.Module] = {}
    seen = {model}

    def visit(parent: nn.Module, prefix: str) -> None:  # `named_modules` takes twice as long
        for key, child in parent._modules.items():
            if child is not None and child not in seen and not isinstance(child, Adapter):
                seen.add(child)
                found[plain_name(prefix + key)] = child
                visit(child, f"{prefix}{key}.")

    visit(model, "")
    return found


class Part(ABC):
    """Which layers hold what; a frozen dataclass.

    A plain base class on purpose: the CLI would refuse subclasses of a dataclass.
    """

    field: ClassVar[str] = "targets"  # what messages call the setting that names the layers
    remedy: ClassVar[str] = "leave them out with `exclude`"  # where layers cannot hold it

    targets: str | list[str] | tuple[str, ...]  # a tuple is of whole names
    exclude: str | list[str] | None
    layers: list[int] | None

    @property
    def name(self) -> str:
        """What it is called in files and messages."""
        return type(self).__name__

    @abstractmethod
    def fits(self, layer: nn.Module) -> bool:
        """Whether a module like ``layer`` can hold it."""

    def select(self, names: list[str]) -> list[str]:
        """Narrow the names that the targets matched, given in model order."""
        return names

    @abstractmethod
    def build(self, layer: nn.Module, name: str) -> Adapter:
        """Return an adapter for ``layer``, called ``name`` in its model, on the meta device.

        Raises:
            ValueError: if the settings do not fit this layer.
        """

    def rebuild(self, layer: nn.Module, name: str, stated: Mapping[str, Any]) -> Adapter:
        """Like `build`, for a file; ``stated`` are the fields of its two JSON files together."""
        return self.build(layer, name)

    def build_all(
        self, layers: Mapping[str, nn.Module], stated: Mapping[str, Any]
    ) -> list[Adapted]:
        """Build for each of the ``layers`` by name; ``stated`` is empty when attaching."""
        make = partial(self.rebuild, stated=stated) if stated else self.build
        return [Adapted(name, layer, make(layer, name)) for name, layer in layers.items()]


class AdapterSpec(Part):
    """Settings of a method, whose fields are the YAML's keys, and how files state them."""

    peft_types: ClassVar[
        tuple[str, ...]
    ]  # values of ``peft_type`` in a config that may mean this method
    text_field: ClassVar[str] = "text"  # the setting that may make it read texts
    peft_fields: ClassVar[Set[str]]  # the fields of such a config that `from_peft` reads
    notes_read: ClassVar[Set[str]] = frozenset()  # what `stated` has beside it: some `notes`

    def __post_init__(self) -> None:
        """Check the fields that every method has."""
        for name, value in {"targets": self.targets, "exclude": self.exclude}.items():
            entries = [] if value is None else [value] if isinstance(value, str) else value
            if not isinstance(entries, list) or not all(isinstance(e, str) for e in entries):
                raise ValueError(
                    f"{name} must be a string or a list of strings, got {shown(value)}"
                )
        layers = [] if self.layers is None else self.layers
        if not isinstance(layers, list) or not all(type(n) is int for n in layers):
            raise ValueError(f"layers must be a list of layer numbers, got {shown(layers)}")

    @property
    def reads_text(self) -> bool:
        """Whether attaching needs a tokenizer."""
        return False

    def teach(self, tokenizer: Any) -> None:  # noqa: B027
        """Add to a tokenizer the tokens that these settings bring."""

    def companions(
        self, model: nn.Module, names: list[str], stated: Mapping[str, Any], tokenizer: Any
    ) -> Sequence[Part]:
        """Return what is trained beside the adapters of the layers called ``names``.

        Args:
            model: Not yet adapted.
            names: The layers that the targets matched.
            stated: The fields of a file's two JSON files; empty when attaching.
            tokenizer: Gives tokens their ids; None if there is none.
        """
        return ()

    def prepare(self, model: nn.Module, tokenizer: Any) -> None:  # noqa: B027
        """Finish the start of freshly attached adapters that need the whole model or text."""

    def filed(self, adapters: Sequence[Adapter]) -> "AdapterSpec":
        """Return the settings that a file with the tensors of ``adapters`` states."""
        return self

    @abstractmethod
    def to_peft(self, targets: str | list[str], adapted: Sequence[Adapted]) -> dict[str, Any]:
        """Return the fields of PEFT's ``adapter_config.json`` that say the same.

        ``targets`` are the shortest names that mean exactly the modules that hold the method;
        ``adapted`` is all of them and what is trained beside it.
        """

    @classmethod
    def recognises(cls, config: Mapping[str, Any]) -> bool:
        """Whether a PEFT ``adapter_config.json`` states this method."""
        return config.get("peft_type") in cls.peft_types

    @classmethod
    @abstractmethod
    def from_peft(cls, config: Mapping[str, Any]) -> "AdapterSpec":
        """Return the settings that a PEFT ``adapter_config.json`` states.

        Raises:
            ValueError: if a field is malformed, or asks for what this method does not do.
        """

    def pack(self, model: nn.Module, adapted: Sequence[Adapted]) -> dict[str, Tensor]:
        """Return everything that the file of an adapted model holds, by key."""
        return {
            f"{PREFIX}{name}.{key}": tensor.detach()
            for name, layer, adapter in adapted
            for key, tensor in adapter.tensors(layer).items()
        }

    @torch.no_grad()
    def unpack(
        self, model: nn.Module, adapted: Sequence[Adapted], tensors: Mapping[str, Tensor]
    ) -> None:
        """Load what `pack` returned, checked to have its keys and shapes."""
        for name, layer, adapter in adapted:
            keys = {key: f"{PREFIX}{name}.{key}" for key in adapter.tensors(layer)}
            adapter.load(layer, {k: tensors[full] for k, full in keys.items() if full in tensors})
