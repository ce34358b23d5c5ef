"""Save and load adapters: PEFT's layout, safetensors only, strict, all or nothing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_adapters.adapters import PREFIX, Adapted, AdapterSpec
from lit_adapters.attachment import adapted_layers, check_layers, materialise, mount
from lit_adapters.fingerprint import base_name, fingerprint, same_base
from lit_adapters.folder import (
    CARD,
    CONFIG,
    EXTRA,
    WEIGHTS,
    all_or_nothing,
    read_json,
    read_tensors,
)
from lit_adapters.model_card import adapter_card
from lit_adapters.peft_config import spec_from_peft
from lit_adapters.targets import match_targets, shortest_targets
from lit_adapters.version import __version__

Parsed = TypeVar("Parsed")


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Write the adapters of ``model`` as a folder that PEFT reads as well.

    Every file is written beside its place under a temporary name first, so a full disk leaves the
    previous files whole; a kill between the renames never leaves old weights with new settings.
    Weights are fp32 safetensors; those of full fine-tuning keep their own dtype.

    Raises:
        ValueError: if the model holds no adapters.
    """
    config = peft_config(model)
    adapted = list(adapted_layers(model))
    adapter = adapted[0].adapter
    spec = adapter.spec.filed([adapter for *_, adapter in adapted])
    extra = {
        "format": 1,
        "method": spec.name,
        **adapter.notes(),
        "base": base_name(model)[1],
        "base_fingerprint": fingerprint(model, _trained(adapted)),
        "versions": {
            "lit_adapters": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    packed = spec.pack(model, adapted)
    tensors = {key: tensor.to("cpu").contiguous() for key, tensor in packed.items()}
    folder = Path(path)
    with all_or_nothing(folder) as part:
        save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / EXTRA).write_text(json.dumps(extra, indent=2) + "\n", encoding="utf-8")
        (part / CARD).write_text(adapter_card(config, extra), encoding="utf-8")
    return folder


def peft_config(model: nn.Module) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of the adapters of ``model``.

    Its ``peft_type`` begins with ``LIT_`` where PEFT has no method that computes the same.

    Raises:
        ValueError: if the model holds no adapters.
    """
    adapted = list(adapted_layers(model))
    if not adapted:
        raise ValueError("the model holds no adapters; call `attach(model, spec)` first")
    adapters = [adapter for *_, adapter in adapted]
    spec = adapters[0].spec.filed(adapters)
    config = {
        **spec.to_peft(shortest_targets(model, [name for name, *_ in adapted]), adapters),
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "base_model_name_or_path": base_name(model)[0],
        "inference_mode": True,
    }
    if "fan_in_fan_out" in spec.peft_fields:
        config["fan_in_fan_out"] = any(isinstance(layer, Conv1D) for _, layer, _ in adapted)
    return config


def load_adapter(model: nn.Module, path: str | Path, *, check_base: bool = True) -> list[str]:
    """Load an adapter folder, ours or PEFT's, onto ``model``; it succeeds or changes nothing.

    A bare model gets adapters as the folder's ``adapter_config.json`` says; a model that holds
    adapters already must hold the same ones, and gets their values.

    Args:
        model: The base that the adapter was trained on.
        path: The folder.
        check_base: Refuse a base whose weights differ from the one trained on (where recorded).

    Returns:
        The names of the adapted modules.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if anything in it is not as expected; the message names the file and the key.
    """
    folder = Path(path)
    config = read_json(folder, CONFIG)
    spec = _naming(folder / CONFIG, lambda: spec_from_peft(config))
    notes = _notes(folder)
    adapted = _naming(folder / CONFIG, lambda: _build(model, spec, {**notes, **config}))
    if check_base:
        _check_base(model, adapted, folder, notes)
    held = list(adapted_layers(model))
    if held:
        _check_same(held, adapted, folder)
        starts = {name: adapter.start_name for name, _, adapter in adapted}
        adapted = held
    expected = _naming(folder / CONFIG, lambda: spec.pack(model, adapted))
    copies = {
        f"{PREFIX}{name}.base_layer.weight": layer.get_parameter("weight")
        for name, layer, adapter in adapted
        if hasattr(layer, "weight") and not adapter.trained(layer)
    }
    shapes = {key: tensor.shape for key, tensor in expected.items()}
    optional = {key: weight.shape for key, weight in copies.items()}
    tensors = read_tensors(folder, shapes, optional)
    for key in copies.keys() & tensors.keys():
        _check_copy(folder / WEIGHTS, key, tensors[key], copies[key].detach())
    if not held:
        for _, layer, adapter in adapted:
            materialise(adapter, layer)
    spec.unpack(model, adapted, tensors)
    for name, _, adapter in held:
        adapter.start_name = starts[name]
    if not held:
        mount(model, {name: adapter for name, _, adapter in adapted})
    return [name for name, *_ in adapted]


def _build(model: nn.Module, spec: AdapterSpec, stated: Mapping[str, Any]) -> list[Adapted]:
    names = match_targets(model, spec)
    layers = [(name, model.get_submodule(name)) for name in names]
    built = [Adapted(name, layer, spec.rebuild(layer, name, stated)) for name, layer in layers]
    check_layers(model, {name: adapter for name, _, adapter in built})
    return built


def _check_same(held: list[Adapted], stored: list[Adapted], folder: Path) -> None:
    ours = {name: adapter for name, _, adapter in held}
    theirs = {name: adapter for name, _, adapter in stored}
    differing = sorted(ours.keys() ^ theirs.keys()) or [
        name for name in ours if not ours[name].computes_like(theirs[name])
    ]
    if differing:
        raise ValueError(
            f"{folder}: its adapters are not those on the model (first difference: "
            f"{differing[0]!r}); call `detach(model)` first to load it on the bare base"
        )


def _check_copy(file: Path, key: str, stored: Tensor, weight: Tensor) -> None:
    """PEFT also saves the frozen weight of an adapted embedding or head; it must be the same."""
    if not torch.equal(stored.to(weight), weight):
        raise ValueError(
            f"{file}: {key!r} holds a base weight that differs from the model's; loading never "
            "writes base weights. Resize or replace the embedding in the base first"
        )


def _notes(folder: Path) -> dict[str, Any]:
    """What ``lit_adapters.json`` says; PEFT writes none."""
    extra = folder / EXTRA
    return read_json(folder, EXTRA) if extra.exists() or extra.is_symlink() else {}


def _trained(adapted: list[Adapted]) -> list[nn.Parameter]:
    """The base's own parameters that training changes."""
    return [p for _, layer, adapter in adapted for p in adapter.trained(layer)]


def _check_base(
    model: nn.Module, adapted: list[Adapted], folder: Path, notes: Mapping[str, Any]
) -> None:
    trained = _trained(adapted)
    expected, actual = notes.get("base_fingerprint"), fingerprint(model, trained)
    if trained and expected is None:
        raise ValueError(
            f"{folder} holds weights of the base itself and no fingerprint of the model that they "
            "belong to; pass check_base=False if you mean to write them into this one"
        )
    if expected is not None and not same_base(str(expected), actual):
        raise ValueError(
            f"{folder} was trained on another base ({notes.get('base')!r}, fingerprint "
            f"{expected}); this model's weights have fingerprint {actual}. Load that base "
            "(--base on the command line), or pass check_base=False if you mean to use it here"
        )


def _naming(file: Path, parse: Callable[[], Parsed]) -> Parsed:
    """Run ``parse`` and name ``file`` in its errors."""
    try:
        return parse()
    except (ValueError, RuntimeError) as error:  # torch refuses sizes with a RuntimeError
        raise ValueError(f"{file}: {error}") from error
