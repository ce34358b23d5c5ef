"""Weights trained whole beside an adapter: copies of modules or biases stand in for the frozen."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Generator, Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lit_adapters.adapters.base import PREFIX, Adapted, Adapter, Part, own_modules
from lit_adapters.weights import is_plain

Bias = Literal["none", "adapter", "all"]

# Recurrent layers keep references to their weights in a list of their own, and attention of torch
# reads those of its output projection without calling it.
UNREAD = (nn.RNNBase, NonDynamicallyQuantizableLinear)
UNCALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)

# Threads that call one layer would take each other's copies for the originals.
ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class WholeModules(Part):
    """Train copies of whole modules, such as an output head or norms; the originals stay.

    Args:
        targets: Name endings of the modules.
    """

    field: ClassVar[str] = "modules_to_save"
    remedy: ClassVar[str] = "take them out of `modules_to_save`"

    targets: list[str]
    exclude: None = None
    layers: None = None

    def fits(self, layer: nn.Module) -> bool:
        """Whether ``layer`` is called, and its weights are read when it is and can be trained."""
        parameters = list(layer.parameters())
        is_called = not isinstance(layer, UNCALLED)
        is_read = not any(_unread(module) for module in layer.modules())
        is_float = all(parameter.is_floating_point() for parameter in parameters)
        if not all(is_plain(module) for module in layer.modules()):
            return False  # packed, in whichever data type
        return is_called and is_read and bool(parameters) and is_float

    def select(self, names: list[str]) -> list[str]:
        """Leave out modules inside modules that are copied anyway."""
        return [n for n in names if not any(n.startswith(f"{other}.") for other in names)]

    def build(self, layer: nn.Module, name: str) -> "TrainedCopy":
        """Return a copy, without values, of what ``layer`` itself holds."""
        return TrainedCopy(self, layer, _saved(layer), name)

    def build_all(
        self, layers: Mapping[str, nn.Module], stated: Mapping[str, Any]
    ) -> list[Adapted]:
        """Build for each module and for each one inside it that holds something."""
        adapted = []
        for name, layer in layers.items():
            inside = {f"{name}.{inner}": module for inner, module in own_modules(layer).items()}
            _refuse_tied({name: layer, **inside})
            adapted += [
                Adapted(inner, module, TrainedCopy(self, module, _saved(module), name))
                for inner, module in {name: layer, **inside}.items()
                if _saved(module)
            ]
        return adapted


def _refuse_tied(modules: Mapping[str, nn.Module]) -> None:
    owners: dict[int, str] = {}
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(
                    f"modules_to_save holds {other!r} and {name!r}, which are tied: copies of "
                    "their one weight would come apart. Name modules inside, and one of the two"
                )


def _unread(module: nn.Module) -> bool:
    """Whether a call of ``module`` does not read its parameters where they are."""
    hooks = module._forward_pre_hooks.values()
    is_computed = any(isinstance(hook, WeightNorm | SpectralNorm) for hook in hooks)
    return is_computed or isinstance(module, (*UNREAD, nn.ParameterList, nn.ParameterDict))


def _saved(layer: nn.Module) -> list[str]:
    """Names of the parameters and buffers of ``layer`` itself that a state dict holds."""
    buffers = [b for b in layer._buffers if b not in layer._non_persistent_buffers_set]
    held = {**layer._parameters, **layer._buffers}
    return [name for name in (*layer._parameters, *buffers) if held[name] is not None]


@dataclass(frozen=True)
class Biases(Part):
    """Train the biases of the modules that ``targets`` names (alone: BitFit, arXiv 2106.10199).

    Args:
        targets: Whole dotted names.
        adapted: Which of the modules hold an adapter as well; files call their biases differently.
    """

    field: ClassVar[str] = "bias"
    remedy: ClassVar[str] = "train fewer biases (`bias`)"

    targets: tuple[str, ...]
    adapted: frozenset[str] = frozenset()
    exclude: None = None
    layers: None = None

    def fits(self, layer: nn.Module) -> bool:
        """Whether ``layer`` has a bias that it reads when it is called."""
        return bool(_biases(layer)) and not _unread(layer)

    def build(self, layer: nn.Module, name: str) -> "TrainedCopy":
        """Return copies of biases, without values."""
        prefix = "base_layer." if name in self.adapted else ""  # PEFT's
        return TrainedCopy(self, layer, _biases(layer), name, prefix)


def _biases(layer: nn.Module) -> list[str]:
    return [name for name, _ in layer.named_parameters(recurse=False) if "bias" in name]


def biases(model: nn.Module, mode: Bias, adapted: Iterable[str], whole: Sequence[str]) -> Biases:
    """Return the part that trains the biases of ``model`` that ``mode`` means.

    Args:
        model: With or without adapters.
        mode: ``"adapter"`` means the layers that hold one, ``"all"`` every module.
        adapted: Names of the layers that hold an adapter.
        whole: Name endings of modules that are trained whole.

    Raises:
        ValueError: if there is none.
    """
    inside = frozenset(adapted)
    chosen = [
        name
        for name, module in own_modules(model).items()
        if _biases(module)
        and not within(name, whole)
        and not (mode == "adapter" and name not in inside)
    ]
    if not chosen:
        where = "no adapted layer" if mode == "adapter" else "nothing in the model"
        raise ValueError(f"bias={mode!r}, but {where} has a bias; leave it at 'none'")
    return Biases(targets=tuple(chosen), adapted=inside)


class TrainedCopy(Adapter):
    """Trained copies, fp32, of what a module itself holds; and of its buffers, in their dtype.

    They take the place of the originals for the time of a call, cast to their dtype where that
    differs. Nothing runs twice, and what a module does to its buffers it does to the copies.
    """

    slot: ClassVar[str] = "trained_copy"
    stands_in: ClassVar[bool] = True

    def __init__(
        self, spec: Part, layer: nn.Module, names: Sequence[str], root: str, prefix: str = ""
    ) -> None:
        super().__init__()
        self.spec = spec
        self.root = root  # the module that the settings named
        self.prefix = prefix  # of the keys in a file
        self.own = nn.Module()  # their names may be anything
        for name in names:
            original = layer._parameters.get(name, layer._buffers.get(name))
            assert original is not None
            if name in layer._parameters:
                empty = torch.empty_like(original, device="meta", dtype=torch.float32)
                self.own.register_parameter(name, nn.Parameter(empty))
            else:
                self.own.register_buffer(name, torch.empty_like(original, device="meta"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TrainedCopy":
        """Keep fp32 masters in a cast of the model; buffers follow it, as the originals do."""
        super()._apply(fn, recurse)
        for name, buffer in self.own.named_buffers(recurse=False):
            self.own._buffers[name] = fn(buffer)
        return self

    @torch.no_grad()
    def reset(self, layer: nn.Module, generator: Generator) -> None:
        """Start from the originals."""
        for name, ours in self._values().items():
            ours.copy_(_held(layer)[name])

    def _values(self) -> dict[str, Tensor]:
        return {**dict(self.own.named_parameters()), **dict(self.own.named_buffers())}

    def call(
        self, layer: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Return ``run(*args, **kwargs)``, a call of ``layer`` with the copies in their place."""
        if torch.compiler.is_compiling():  # in one thread, and without locks
            return self._swapped(layer, run, args, kwargs)
        with ONE_AT_A_TIME:
            return self._swapped(layer, run, args, kwargs)

    def _swapped(
        self, layer: nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        before = {}
        try:
            for name, ours in self._values().items():
                place = _place(layer, name)
                before[name] = original = place[name]
                place[name] = ours.to(original.dtype)
            return run(*args, **kwargs)
        finally:
            for name, original in before.items():
                place = _place(layer, name)
                if name in layer._buffers:
                    self.own._buffers[name] = place[name]  # it may have been set anew
                place[name] = original

    def bias(self, layer: nn.Module) -> Tensor | None:
        """Return the trained bias in the dtype of the frozen one, if there is one."""
        ours = self.own._parameters.get("bias")
        return None if ours is None else ours.to(cast(Tensor, layer.bias).dtype)

    def forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return ``output``, which the copies have computed."""
        return output

    def computes_like(self, other: Adapter) -> bool:
        """Return whether the other holds tensors of the same names and shapes."""
        return isinstance(other, TrainedCopy) and (
            {name: tensor.shape for name, tensor in self._values().items()}
            == {name: tensor.shape for name, tensor in other._values().items()}
        )

    def overwrites(self) -> Set[str]:
        """Return the names of the tensors."""
        return self._values().keys()

    @torch.no_grad()
    def merge_into(self, layer: nn.Module) -> None:
        """Write what was trained into the originals."""
        for name, ours in self._values().items():
            _held(layer)[name].copy_(ours)

    def tensors(self, layer: nn.Module) -> dict[str, Tensor]:
        """Return all of it under its own names, as PEFT does."""
        return {self.prefix + name: tensor for name, tensor in self._values().items()}

    def never_read(self, layer: nn.Module, name: str) -> dict[str, Tensor]:
        """Return the biases of whole modules: where PEFT trains biases, it writes them again."""
        inside = name[len(self.root) :]
        return {
            f"{PREFIX}{self.root}.{what}{inside}.{key}": value
            for key, value in self.tensors(layer).items()
            for what in ("modules_to_save", "modules_to_save.default", "original_module")
            if "bias" in key and not self.prefix
        }

    def load(self, layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """Take over all values."""
        for name, ours in self._values().items():
            ours.copy_(tensors[self.prefix + name])


def _place(layer: nn.Module, name: str) -> dict[str, Any]:
    return layer._parameters if name in layer._parameters else layer._buffers


def _held(layer: nn.Module) -> dict[str, Tensor]:
    named = (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))
    return dict(named)


def within(name: str, endings: Sequence[str]) -> bool:
    """Whether the module called ``name``, or one around it, is meant by one of ``endings``."""
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(a == e or a.endswith(f".{e}") for a in around for e in endings)
