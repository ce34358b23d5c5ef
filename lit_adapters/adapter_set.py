"""Several adapters for one base: at most one is on the model, the others wait beside it."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_adapters.adapters import Adapted, AdapterSpec, FullFineTuning, LoRA, LoRAAdapter
from lit_adapters.adapters.low_rank import TAKEN_NOTE
from lit_adapters.attachment import adapted_layers, attach, materialise, merge, mount, unmount
from lit_adapters.folder import CONFIG, EXTRA, read_json
from lit_adapters.initialisers import Factors
from lit_adapters.io import load_adapter, save_adapter
from lit_adapters.peft_config import spec_from_peft
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
        self._overwritten: list[tuple[Tensor, Tensor]] | None = None  # by merging: where, what

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
            if isinstance(spec_from_peft(read_json(Path(path), CONFIG)), FullFineTuning):
                _refuse_full()
            extra = Path(path) / EXTRA
            if extra.exists() and read_json(Path(path), EXTRA).get("origin") == TAKEN_NOTE:
                _refuse_taken()
            load_adapter(self.model, path, check_base=check_base, tokenizer=tokenizer)

    def activate(self, name: str | None) -> None:
        """Put another adapter on the model, or none: the bare base then computes."""
        self._check_unmerged()
        if name is not None:
            self._check_known(name)
        unmount(self.model)
        self.active = name
        if name is not None:
            self._mount(name)

    def delete(self, name: str) -> None:
        """Forget an adapter; if it is active, the bare base computes afterwards."""
        self._check_known(name)
        if name == self.active:
            self.activate(None)
        del self._adapters[name]

    def save(self, name: str, path: str | Path) -> Path:
        """Write the folder of any of the adapters; see `save_adapter`."""
        self._check_unmerged()
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

        What is overwritten is kept: as many bytes as the adapted layers have.
        """
        self._check_unmerged()
        if self.active is None:
            raise ValueError("no adapter is active, so there is nothing to merge")
        layers = {id(one.layer): one.layer for one in self._adapters[self.active]}
        tensors = {
            id(tensor): tensor
            for layer in layers.values()
            for tensor in (*layer.parameters(), *layer.buffers())
        }
        adapters = {
            id(tensor)
            for one in self._adapters[self.active]
            for tensor in (*one.adapter.parameters(), *one.adapter.buffers())
        }
        kept = [(t, t.detach().clone()) for key, t in tensors.items() if key not in adapters]
        merge(self.model)
        self._overwritten = kept

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge` to the bit: write back what it overwrote, and put the adapter on again."""
        if self._overwritten is None or self.active is None:
            raise ValueError("nothing is merged")
        for tensor, value in self._overwritten:
            tensor.data.copy_(value)
        self._overwritten = None
        self._mount(self.active)

    @contextmanager
    def _added(self, name: str) -> Iterator[None]:
        """Take the active adapter off; what the block puts on is called ``name``."""
        self._check_unmerged()
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

    def _check_unmerged(self) -> None:
        if self._overwritten is not None:
            raise ValueError(f"{self.active!r} is merged into the base; call unmerge() first")


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
    if len(set(ranks.values())) == 1:
        rank = next(iter(ranks.values()))
        return LoRA(rank=rank, alpha=rank, targets=list(ranks))
    # The first key that matches wins, and a key matches endings too: longer names come first.
    by_name = {re.escape(name): ranks[name] for name in sorted(ranks, key=len, reverse=True)}
    return LoRA(
        targets=list(ranks),
        rank_pattern=by_name,
        alpha_pattern={key: float(rank) for key, rank in by_name.items()},
    )
