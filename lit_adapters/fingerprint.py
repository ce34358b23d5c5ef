"""Recognise a base model again: a name to show, and a short digest of its weights."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

from lit_adapters.adapters import Adapted, Adapter
from lit_adapters.attachment import adapted_layers
from lit_adapters.optim import SHADOW
from lit_adapters.spread import kind_of
from lit_adapters.weights import has_matrix, is_lookup, is_plain, matrix_shape

PACKED = "packed"  # in place of digests of weights that are not there
SAMPLES = 16  # values per tensor: enough to tell models apart, cheap for billions of weights
REMEMBERED = "whole_fingerprint"  # attribute of a model that is about to be sharded


def remember_fingerprint(model: nn.Module) -> None:
    """Let `fingerprint` say from now on what it says now: shards have other values."""
    setattr(model, REMEMBERED, fingerprint(model))


def fingerprint(model: nn.Module, adapted: Sequence[Adapted] | None = None) -> str:
    """Digests of the model's own weights, the same with or without adapters.

    Four, joined by hyphens. Two cover name, shape and 16 evenly spaced values of every
    floating-point parameter: one of the values rounded to bf16 and one to fp16, so that a model is
    recognised in whichever precision it was loaded. Two more leave out the values of matrices,
    which are others once they are quantised: by these a quantised base is recognised. It then
    passes for another that differs in matrices alone (a base into which a LoRA was merged). Compare
    with `same_base`.

    Of the base's own parameters that are trained, only name and shape are covered; rows added for
    new tokens and GaLore's shadows, which come and go, are not.

    Args:
        model: With or without adapters.
        adapted: Adapters built for the model that are not on it yet; None takes those it holds.
    """
    if (remembered := getattr(model, REMEMBERED, None)) is not None:
        return str(remembered)
    held = list(adapted_layers(model)) if adapted is None else adapted
    moving = {id(p) for _, layer, adapter in held for p in adapter.trained(layer)}
    sizes = {id(p): a.grown_from for _, layer, a in held for p in layer.parameters(recurse=False)}
    modules = list(model.modules())
    adapters = {id(p) for m in modules if isinstance(m, Adapter) for p in m.parameters()}
    owners = {
        id(m._parameters["weight"]): m for m in modules
        if "weight" in m._parameters and has_matrix(m) and not is_lookup(m)
    }  # fmt: skip
    whole, rest = Digests(), Digests()
    for name, parameter in model.named_parameters():
        matrix = owners.get(id(parameter))
        if matrix is not None:
            rows, columns = matrix_shape(matrix)
            rest.update(name, (sizes.get(id(parameter)) or rows, columns))
        passing = id(parameter) in adapters or name.rpartition(".")[2] == SHADOW
        if passing or not parameter.is_floating_point():
            continue
        own = parameter.detach()[: sizes.get(id(parameter))]
        sample = sampled(own, 0 if id(parameter) in moving else SAMPLES)
        whole.update(name, own.shape, sample)
        if matrix is None:
            rest.update(name, own.shape, sample)
    written = any(getattr(adapter, "has_taken", False) for *_, adapter in held)
    if written or not all(map(is_plain, modules)):
        return "-".join((PACKED, PACKED, *rest.texts()))
    return "-".join((*whole.texts(), *rest.texts()))


class Digests:
    """Of names, shapes and values, rounded to bf16 and to fp16."""

    def __init__(self) -> None:
        self.by_dtype = {torch.bfloat16: hashlib.sha256(), torch.float16: hashlib.sha256()}

    def update(self, name: str, shape: Sequence[int], sample: torch.Tensor | None = None) -> None:
        """Add one tensor; ``sample`` are some of its values."""
        head = f"{name}{tuple(shape)}".encode()
        for dtype, digest in self.by_dtype.items():
            digest.update(head)
            if sample is not None:
                digest.update(sample.to(dtype).view(torch.int16).numpy().data)

    def texts(self) -> list[str]:
        """Return both, in hexadecimal."""
        return [digest.hexdigest()[:16] for digest in self.by_dtype.values()]


def sampled(tensor: torch.Tensor, count: int = SAMPLES) -> torch.Tensor:
    """Return evenly spaced values of ``tensor``, on the CPU."""
    return tensor.flatten()[spaced(tensor.numel(), count)].cpu()


@lru_cache  # layers have few sizes
def spaced(length: int, count: int) -> torch.Tensor:
    """Return ``count`` indices from 0 to ``length - 1``, evenly spaced (all of them if fewer)."""
    count = min(count, length)
    exact = [i * (length - 1) // max(1, count - 1) for i in range(count)]  # no float32
    with torch.inference_mode(False):  # it is kept
        return torch.tensor(exact, dtype=torch.int64, device="cpu")  # wherever it is asked


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints agree in at least one precision, as far as both can be compared."""
    ours, theirs = one.split("-"), other.split("-")
    compared = slice(2, None) if PACKED in (ours[0], theirs[0]) else slice(2)
    return any(a == b for a, b in zip(ours[compared], theirs[compared], strict=False))


def same_digest(one: str, other: str) -> bool:
    """Whether two pairs of `Digests` agree in at least one precision."""
    return any(a == b for a, b in zip(one.split("-"), other.split("-"), strict=False))


def base_name(model: nn.Module) -> tuple[str | None, str]:
    """Return the hub id of a model, if it came from the hub, and a name to show.

    A local path is never returned: only the last part of it, as the name.
    """
    origin = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not origin:
        return None, kind_of(model).__name__
    is_hub_id = origin.count("/") <= 1 and not origin.startswith((".", "/", "~"))
    if is_hub_id and not Path(origin).exists():
        return origin, origin
    return None, Path(origin).name
