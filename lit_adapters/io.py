"""Save and load adapters: PEFT's layout, safetensors only, strict, all or nothing."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_adapters.adapters import METHOD, PREFIX, Adapted, AdapterSpec
from lit_adapters.adapters.fields import shown
from lit_adapters.attachment import adapted_layers, built, materialise, mount
from lit_adapters.dense_weights import DenseWeights, Matrices
from lit_adapters.fingerprint import base_name, fingerprint, same_base
from lit_adapters.folder import (
    CARD,
    CONFIG,
    EXTRA,
    WEIGHTS,
    Backend,
    all_or_nothing,
    read_json,
    read_tensors,
    write_tensors,
)
from lit_adapters.model_card import adapter_card
from lit_adapters.peft_config import spec_from_peft
from lit_adapters.prompting import NOTE, from_note, prompting_of, set_prompting, to_note
from lit_adapters.remainders import check_taken_from, rewrite, with_taken
from lit_adapters.targets import shortest_targets
from lit_adapters.version import __version__
from lit_adapters.weights import is_plain

DIGEST = "weights_sha256"
FORMAT = 1


def save_adapter(model: nn.Module, path: str | Path) -> Path:
    """Write the adapters of ``model`` as a folder that PEFT reads as well.

    Every file is written beside its place under a temporary name first, so a full disk leaves the
    previous files whole; a kill between the renames never leaves old weights with new settings.
    Weights are fp32 safetensors; those of full fine-tuning keep their own dtype.

    Raises:
        ValueError: if the model holds no adapters, or some of different settings.
    """
    model = _inside(model)
    adapted = list(adapted_layers(model))
    config = peft_config(model, adapted)
    spec = _filed(adapted)
    extra = {
        "format": FORMAT,
        "method": spec.name,
        **dict(item for one in adapted for item in one.adapter.notes().items()),
        "base": base_name(model)[1],
        "base_fingerprint": fingerprint(model, adapted),
        NOTE: to_note(prompting_of(model)),
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
        write_tensors(part / WEIGHTS, tensors)
        extra[DIGEST] = _sha256(part / WEIGHTS)
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (part / EXTRA).write_text(json.dumps(extra, indent=2) + "\n", encoding="utf-8")
        (part / CARD).write_text(adapter_card(config, extra), encoding="utf-8")
    return folder


def peft_config(model: nn.Module, adapted: Sequence[Adapted] | None = None) -> dict[str, Any]:
    """Return the ``adapter_config.json`` of the adapters of ``model``.

    Its ``peft_type`` begins with ``LIT_`` where PEFT has no method that computes the same.

    Args:
        model: That holds adapters.
        adapted: All of them, if they are known.

    Raises:
        ValueError: if the model holds no adapters, or some of different settings.
    """
    adapted = list(adapted_layers(model)) if adapted is None else adapted
    if not adapted:
        raise ValueError("the model holds no adapters; call `attach(model, spec)` first")
    spec = _filed(adapted)
    names = [name for name, _, adapter in adapted if adapter.slot == METHOD]
    config = {
        **spec.to_peft(shortest_targets(model, names), adapted),
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "base_model_name_or_path": base_name(model)[0],
        "inference_mode": True,
    }
    if "fan_in_fan_out" in spec.peft_fields:
        config["fan_in_fan_out"] = any(isinstance(layer, Conv1D) for _, layer, _ in adapted)
    return config


def _filed(adapted: Sequence[Adapted]) -> AdapterSpec:
    """The settings that a file of these adapters states."""
    held = [one for one in adapted if one.adapter.slot == METHOD]
    other = next((one for one in held if one.adapter.spec != held[0].adapter.spec), None)
    if other is not None:
        raise ValueError(
            f"the adapters of {held[0].name!r} and {other.name!r} were attached by different "
            f"settings, {held[0].adapter.spec} and {other.adapter.spec}, and one folder can state "
            "one; save the models that they belong to one by one"
        )
    adapters = [one.adapter for one in held]
    return cast(AdapterSpec, adapters[0].spec).filed(adapters)


@torch.inference_mode(False)  # else what is made there could never be trained
def load_adapter(
    model: nn.Module,
    path: str | Path,
    *,
    check_base: bool = True,
    tokenizer: Any = None,
    weights: Matrices | None = None,
) -> list[str]:
    """Load an adapter folder, ours or PEFT's, onto ``model``; it succeeds or changes nothing.

    A bare model gets adapters as the folder's ``adapter_config.json`` says; a model that holds
    adapters already must hold the same ones, and gets their values.

    An adapter that started by `QPiSSA` or `LoftQ` needs the base of its training, which lacks what
    the file says was taken from it. That base is made again: where ``model`` is quantised in the
    same way, from the unquantised weights in its files, to the same bytes (on another kind of
    processor, a few numbers may round to their neighbours); where it is not quantised, it gets the
    numbers that those bytes stand for, so that it computes what training computed, and can be
    merged. Both write the base. Weights other than those of training are refused.

    Args:
        model: The base that the adapter was trained on.
        path: The folder.
        check_base: Refuse a base whose weights differ from the one trained on (where recorded).
        tokenizer: Learns the new tokens of the folder (and keeps them, should loading fail), and
            decides which rows are theirs; without it the rows are those that they had in training.
        weights: Gives the unquantised matrix (out, in) of a layer by its name, where it cannot be
            read from the files that a quantised ``model`` came from.

    Returns:
        The names of the adapted modules.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if anything in it is not as expected; the message names the file and the key.
    """
    model, folder = _inside(model), Path(path)
    config, notes = read_json(folder, CONFIG), _notes(folder)
    spec, prompting = _stated(folder, config), from_note(notes.get(NOTE), folder / EXTRA)
    with ExitStack() as stack:
        with _naming(folder / CONFIG):
            stated = {**config, **{key: notes.get(key) for key in spec.notes_read}}
            fresh = stack.enter_context(built(model, spec, stated, tokenizer))
        held = list(adapted_layers(model))
        adapted = held or fresh
        if check_base:
            _check_base(model, adapted, folder, notes)
        if held:
            _check_same(held, fresh, folder)
        with _hinting(fresh, config):
            copied = any(one.adapter.needs_memory for one in adapted)
            tensors = _read(model, spec, adapted, folder, "mmap" if copied else "pread")
        _check_digest(folder, notes)
        if any(with_taken(adapted)):
            _check_rewritable(held, folder)
            weights = weights or DenseWeights(model)
            with _naming(folder):
                check_taken_from(model, adapted, weights)
        for one in fresh if copied and not held else ():
            materialise(one.adapter, one.layer)
        spec.unpack(model, adapted, tensors)
        rewrite(adapted, cast(Matrices, weights))
        if held:
            starts = {(one.name, one.adapter.slot): one.adapter.start_name for one in fresh}
            for name, _, adapter in held:
                adapter.start_name = starts[name, adapter.slot]
        else:
            mount(model, fresh)
        if held or prompting is not None:
            set_prompting(model, prompting)
    return [one.name for one in fresh if one.adapter.slot == METHOD]


def _inside(model: nn.Module) -> nn.Module:
    """The model that ``torch.compile(model)`` wraps, whose names another has as well."""
    inner = model._modules.get("_orig_mod")
    return model if inner is None else inner


def _check_rewritable(held: list[Adapted], folder: Path) -> None:
    """A base that is not quantised and was written once has lost what it was."""
    for one, _ in with_taken(held):
        if is_plain(one.layer):
            raise ValueError(
                f"{folder}: the base has been written for such an adapter already; load it anew"
            )


def folder_spec(folder: Path) -> AdapterSpec:
    """Return the settings that the folder's ``adapter_config.json`` states; raises as above."""
    return _stated(folder, read_json(folder, CONFIG))


def _stated(folder: Path, config: Mapping[str, Any]) -> AdapterSpec:
    with _naming(folder / CONFIG):
        return spec_from_peft(config)


def _check_digest(folder: Path, notes: Mapping[str, Any]) -> None:
    """Flipped bytes of a weight are a weight too: nothing else would notice them."""
    recorded = notes.get(DIGEST)
    if recorded is not None and recorded != _sha256(folder / WEIGHTS):
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that was saved: its SHA-256 is not the one in "
            f"{EXTRA}. Download it again; if you changed it on purpose, remove {DIGEST!r} from "
            f"{EXTRA}, or that file if another library wrote the weights"
        )


def _read(
    model: nn.Module, spec: AdapterSpec, adapted: list[Adapted], folder: Path, backend: Backend
) -> dict[str, Tensor]:
    """Return the tensors of the file, all checked; PEFT's copies of frozen weights among them."""
    with _naming(folder / CONFIG):
        expected = spec.pack(model, adapted)
    copies: dict[str, Tensor] = {}

    def optional() -> dict[str, Tensor]:
        copies.update(_frozen_copies(model, adapted))
        never_read = [adapter.never_read(layer, name) for name, layer, adapter in adapted]
        return {key: tensor for part in (*never_read, copies) for key, tensor in part.items()}

    tensors = read_tensors(folder, expected, optional, backend)
    for key in (copies.keys() - expected.keys()) & tensors.keys():
        _check_copy(folder / WEIGHTS, key, tensors[key], copies[key].detach())
    return tensors


def _frozen_copies(model: nn.Module, adapted: list[Adapted]) -> dict[str, Tensor]:
    """What PEFT may write of the base, by key."""
    heads = _heads(model)
    copies = {
        f"{PREFIX}{name}.weight": module.get_parameter("weight")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or id(module) in heads
    }
    for name, layer, adapter in adapted:
        frozen = adapter.frozen_copies(layer)
        copies |= {f"{PREFIX}{name}.{key}": weight for key, weight in frozen.items()}
    return copies


def _heads(model: nn.Module) -> set[int]:
    roots = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return {id(root.get_output_embeddings()) for root in roots}


def _check_same(held: list[Adapted], stored: list[Adapted], folder: Path) -> None:
    ours = {(name, adapter.slot): adapter for name, _, adapter in held}
    theirs = {(name, adapter.slot): adapter for name, _, adapter in stored}
    differing = sorted(ours.keys() ^ theirs.keys()) or [
        key for key in ours if not ours[key].computes_like(theirs[key])
    ]
    if differing:
        raise ValueError(
            f"{folder / CONFIG}: its adapters are not those on the model (first difference: "
            f"{differing[0][0]!r}); call `detach(model)` first to load it on the bare base"
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
    notes = read_json(folder, EXTRA) if extra.exists() or extra.is_symlink() else {}
    if notes.get("format", FORMAT) != FORMAT:
        raise ValueError(
            f"{extra}: format {shown(notes['format'])} was written by a later version of "
            f"lit_adapters, and this one reads format {FORMAT}; update it"
        )
    return notes


def _check_base(
    model: nn.Module, adapted: list[Adapted], folder: Path, notes: Mapping[str, Any]
) -> None:
    expected, actual = notes.get("base_fingerprint"), fingerprint(model, adapted)
    if any(one.adapter.trained(one.layer) for one in adapted) and expected is None:
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


@contextmanager
def _hinting(adapted: list[Adapted], config: Mapping[str, Any]) -> Iterator[None]:
    """Add to errors what an adapter knows may be the reason."""
    try:
        yield
    except ValueError as error:
        hint = next(filter(None, (adapter.misfit(config) for *_, adapter in adapted)), None)
        if hint is None:
            raise
        raise ValueError(f"{error} {hint}") from error


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Name ``file`` in errors."""
    try:
        yield
    except (ValueError, RuntimeError) as error:  # torch refuses sizes with a RuntimeError
        raise ValueError(f"{file}: {error}") from error


def _sha256(file: Path) -> str:
    digest, block = hashlib.sha256(), memoryview(bytearray(1 << 18))
    with file.open("rb", buffering=0) as handle:
        while count := handle.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
