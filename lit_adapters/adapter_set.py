"""Several adapters for one base: at most one is on the model, the others wait beside it."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_adapters.adapters import Adapted, AdapterSpec, FullFineTuning, LoRA, LoRAAdapter
from lit_adapters.adapters.taken import TAKEN_NOTE
from lit_adapters.attachment import adapted_layers, attach, materialise, mount, unmount
from lit_adapters.folder import EXTRA, read_json
from lit_adapters.initialisers import Factors
from lit_adapters.io import folder_spec, load_adapter, save_adapter
from lit_adapters.merging import merge
from lit_adapters.remainders import with_taken
from lit_adapters.weights import group_count, matrix_shape


class AdapterSet:
    """Adapters by name for one model: switch between them, sum them, merge and un-merge.

    The active adapter is on the model as `attach` puts it there, and is what everything else in the
    library sees: what is trained, saved and exported. The others are no part of the model; they
    keep their values, and follow it to another device when they are activated.

    Args:
        model: The base. Adapters that it holds already are taken over under the name ``default``.

    Raises:
        ValueError: if the base's own weights are trained (`FullFineTuning`).
    """

    def __init__(self, model: nn.Module) -> None:
        held = list(adapted_layers(model))
        if any(with_taken(held)):
            _refuse_taken()
        if any(isinstance(adapter.spec, FullFineTuning) for *_, adapter in held):
            _refuse_full()
        self.model = model
        self.active: str | None = "default" if held else None  # None: the bare base computes
        self._adapters: dict[str, list[Adapted]] = {"default": held} if held else {}
        self._overwritten: list[_Overwritten] | None = None  # by merging

    @property
    def names(self) -> list[str]:
        """All names, in the order in which they were added."""
        return list(self._adapters)

    def add(
        self, name: str, spec: AdapterSpec, seed: int | None = None, tokenizer: Any = None
    ) -> None:
        """Attach a fresh adapter, which becomes the active one; see `attach`."""
        if isinstance(spec, FullFineTuning):
            _refuse_full()
        with self._added(name):
            attach(self.model, spec, seed, tokenizer)

    def load(
        self, name: str, path: str | Path, *, check_base: bool = True, tokenizer: Any = None
    ) -> None:
        """Load a folder, which becomes the active adapter; see `load_adapter`."""
        with self._added(name):
            if isinstance(folder_spec(Path(path)), FullFineTuning):
                _refuse_full()
            extra = Path(path) / EXTRA
            if extra.exists() and read_json(Path(path), EXTRA).get("origin") == TAKEN_NOTE:
                _refuse_taken()
            load_adapter(self.model, path, check_base=check_base, tokenizer=tokenizer)

    def activate(self, name: str | None) -> None:
        """Put another adapter on the model, or none: the bare base then computes."""
        self._check_free()
        if name is not None:
            self._check_known(name)
        unmount(self.model)
        self.active = name
        if name is not None:
            self._mount(name)

    def delete(self, name: str) -> None:
        """Forget an adapter; if it is active, the bare base computes afterwards."""
        if name not in self._adapters:
            self._check_known(name)
        if name == self.active:
            self.activate(None)
        del self._adapters[name]

    def save(self, name: str, path: str | Path) -> Path:
        """Write the folder of any of the adapters; see `save_adapter`."""
        self._check_free()
        self._check_known(name)
        before = self.active
        self.activate(name)
        try:
            return save_adapter(self.model, path)
        finally:
            self.activate(before)

    def combine(self, name: str, weights: Mapping[str, float]) -> None:
        """Add the weighted sum of adapters as one adapter, which becomes the active one.

        ``sum_i w_i s_i B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, ...] [A_1; A_2; ...]``: a LoRA whose
        rank is the sum of theirs, or, where a layer is too small for that, one of full rank.
        Dropout is not carried over.

        Raises:
            ValueError: if there is nothing to sum, or a sum of factors is not the sum of what they
                do: DoRA, prompts, and adapters with whole modules, biases or new tokens.
        """
        if not weights:
            raise ValueError("combine needs at least one adapter: {'name': weight}")
        parts: dict[str, list[tuple[float, Adapted]]] = {}
        for other, weight in weights.items():
            self._check_known(other)
            is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
            if not is_number or not math.isfinite(weight):
                raise ValueError(f"the weight of {other!r} must be a finite number, got {weight!r}")
            for one in self._adapters[other]:
                if type(one.adapter) is not LoRAAdapter:
                    raise ValueError(
                        f"{other!r} holds a {type(one.adapter).__name__}; only sums of plain LoRA "
                        "are exact. Merge one adapter into the base and train the other on that"
                    )
                parts.setdefault(one.name, []).append((float(weight), one))
        order = [module for module, _ in self.model.named_modules() if module in parts]
        summed = {module: _sum([(w, one) for w, one in parts[module]]) for module in order}
        spec = _spec({module: factors.B.shape[1] for module, factors in summed.items()})
        with self._added(name):
            adapted = []
            for module, factors in summed.items():
                layer = parts[module][0][1].layer
                adapter = spec.build(layer, module)
                materialise(adapter, layer)
                adapter.set_factors(factors)
                adapted.append(Adapted(module, layer, adapter))
            mount(self.model, adapted)

    def merge(self) -> None:
        """Fold the active adapter into the base, at full speed and for a while; see `unmerge`.

        What is overwritten is kept: as many bytes as the adapted layers have. If merging fails, it
        is written back at once.
        """
        self._check_free()
        if self.active is None:
            raise ValueError("no adapter is active, so there is nothing to merge")
        kept = [
            _Overwritten(layer, key, _tensor(layer, key).detach().clone())
            for _, layer, adapter in self._adapters[self.active]
            for key in sorted(adapter.overwrites())
            if layer._parameters.get(key) is not None or key in layer._buffers
        ]
        try:
            merge(self.model)
        except BaseException:
            _write_back(kept)
            unmount(self.model)  # of the layers that were not reached
            self._mount(self.active)
            raise
        self._overwritten = kept

    def unmerge(self) -> None:
        """Undo `merge` to the bit: write back what it overwrote, and put the adapter on again."""
        if self._overwritten is None or self.active is None:
            raise ValueError("nothing is merged")
        self._check_mine()
        _write_back(self._overwritten)
        self._overwritten = None
        self._mount(self.active)

    @contextmanager
    def _added(self, name: str) -> Iterator[None]:
        """Take the active adapter off; what the block puts on is called ``name``."""
        self._check_free()
        if not name or name in self._adapters:
            taken = f"taken; the names are {self.names}" if name else "empty"
            raise ValueError(f"adapter name {name!r} is {taken}. Choose another, or delete it")
        unmount(self.model)
        try:
            yield
        except BaseException:
            if self.active is not None:
                self._mount(self.active)
            raise
        self._adapters[name] = list(adapted_layers(self.model))
        self.active = name

    def _mount(self, name: str) -> None:
        for _, layer, adapter in self._adapters[name]:
            adapter.to(next(layer.parameters()).device)
        mount(self.model, self._adapters[name])

    def _check_known(self, name: str) -> None:
        if name not in self._adapters:
            raise ValueError(f"no adapter is called {name!r}; the names are {self.names}")
        modules = dict(self.model.named_modules())
        for module, layer, _ in self._adapters[name]:
            if modules.get(module) is not layer:
                raise ValueError(
                    f"{module!r} is not the module any more that {name!r} was made for; it was "
                    "replaced (by resizing embeddings?), and the adapter would act on nothing"
                )
        self._check_kept(name)

    def _check_kept(self, name: str) -> None:
        """Make sure that what waits does not lose its values when it follows the model."""
        for _, layer, adapter in self._adapters[name]:
            has_values = any(not parameter.is_meta for parameter in adapter.parameters())
            if has_values and any(parameter.is_meta for parameter in layer.parameters()):
                raise ValueError(
                    f"the model is on the meta device, without values, and {name!r} would follow "
                    "it there and lose its own; give the model values first (load the base)"
                )

    def _check_free(self) -> None:
        """Make sure that what is on the model can be taken off and put back."""
        self._check_mine()
        if self._overwritten is not None:
            raise ValueError(f"{self.active!r} is merged into the base; call unmerge() first")

    def _check_mine(self) -> None:
        held = {id(adapter) for *_, adapter in adapted_layers(self.model)}
        mounted = self._adapters[self.active] if self.active and self._overwritten is None else []
        if held != {id(adapter) for *_, adapter in mounted}:
            raise ValueError(
                f"the adapters on the model are not those of {self.active!r}: they were attached "
                "or taken off without this set. Save them, and make a new AdapterSet(model)"
            )


class _Overwritten(NamedTuple):
    layer: nn.Module
    key: str
    value: Tensor


@torch.no_grad()
def _write_back(kept: list[_Overwritten]) -> None:
    for layer, key, value in kept:
        _tensor(layer, key).data.copy_(value)


def _tensor(layer: nn.Module, key: str) -> Tensor:
    return layer.get_parameter(key) if key in layer._parameters else layer.get_buffer(key)


def _refuse_full() -> None:
    raise ValueError(
        "FullFineTuning trains the base's own weights, and an AdapterSet switches adapters on a "
        "base that stays; use LoRA with modules_to_save for whole modules"
    )


def _refuse_taken() -> None:
    raise ValueError(
        "an adapter that started by QPiSSA or LoftQ has a base of its own, which lacks what is in "
        "the adapter, and an AdapterSet switches adapters on one base; merge it, or load it alone"
    )


@torch.no_grad()
def _sum(parts: list[tuple[float, Adapted]]) -> Factors:
    """Concatenated factors of one layer: ``A`` (groups * r, in), ``B`` (out, r), fp32."""
    layer = parts[0][1].layer
    groups = group_count(layer)
    device = layer.get_parameter("weight").device
    A, B = [], []
    for weight, one in parts:
        assert isinstance(one.adapter, LoRAAdapter)
        thin = one.adapter.factors()
        A.append(thin.A.to(device).unflatten(0, (groups, -1)))
        B.append(thin.B.to(device) * (weight * one.adapter.scale))
    factors = Factors(torch.cat(A, 1).flatten(0, 1), torch.cat(B, 1))
    out, inputs = matrix_shape(layer)
    if factors.B.shape[1] <= min(out // groups, inputs):
        return factors
    blocks = factors.B.unflatten(0, (groups, -1)) @ factors.A.unflatten(0, (groups, -1))
    if inputs <= out // groups:
        return Factors(torch.eye(inputs, device=device).repeat(groups, 1), blocks.flatten(0, 1))
    unit = torch.eye(out // groups, device=device)
    return Factors(blocks.flatten(0, 1), unit.repeat(groups, 1))


def _spec(ranks: dict[str, int]) -> LoRA:
    """The LoRA with these ranks by module, and scale 1."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    # A pattern matches endings of names; the ^ keeps it from names that end in this one.
    others = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != common}
    return LoRA(
        rank=common,
        alpha=float(common),
        targets=list(ranks),
        rank_pattern=others,
        alpha_pattern={key: float(rank) for key, rank in others.items()},
    )
