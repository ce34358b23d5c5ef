"""Recognise a base model again: a name to show, and a short digest of its weights."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
from torch import nn

from lit_adapters.adapters import Adapted, own_modules
from lit_adapters.attachment import adapted_layers
from lit_adapters.optim import SHADOW
from lit_adapters.spread import kind_of
from lit_adapters.weights import has_matrix, is_lookup, is_plain, matrix_shape

PACKED = "packed"  # in place of digests of weights that are not there
SAMPLES = 16  # values per tensor: enough to tell models apart, cheap for billions of weights
NOTHING = torch.empty(0)  # in place of the values of matrices
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
    grown = [(layer, a.grown_from) for _, layer, a in held if a.grown_from is not None]
    sizes = {id(p): rows for layer, rows in grown for p in layer.parameters(recurse=False)}
    modules = {"": model, **own_modules(model)}
    owners = {
        id(m._parameters["weight"]): m for m in modules.values()
        if "weight" in m._parameters and has_matrix(m) and not is_lookup(m)
    }  # fmt: skip
    whole, rest = Digests(), Digests()
    for name, parameter in _own_parameters(modules):
        matrix = owners.get(id(parameter))
        if matrix is not None:
            rows, columns = matrix_shape(matrix)
            rest.update(name, (sizes.get(id(parameter)) or rows, columns))
        if name.rpartition(".")[2] == SHADOW or not parameter.is_floating_point():
            continue
        own = parameter.detach()
        if id(parameter) in sizes:
            own = own[: sizes[id(parameter)]]
        sample = sampled(own, 0 if id(parameter) in moving else SAMPLES)
        whole.update(name, own.shape, sample)
        if matrix is None:
            rest.update(name, own.shape, sample)
    written = any(getattr(adapter, "has_taken", False) for *_, adapter in held)
    if written or not all(map(is_plain, modules.values())):
        return "-".join((PACKED, PACKED, *rest.texts()))
    return "-".join((*whole.texts(), *rest.texts()))


def _own_parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what `named_parameters` does, each once, without another walk."""
    seen: set[int] = set()
    for prefix, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{prefix}.{name}" if prefix else name, parameter


class Digests:
    """Of names, shapes and values, rounded to bf16 and to fp16."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.samples: list[torch.Tensor] = []

    def update(self, name: str, shape: Sequence[int], sample: torch.Tensor | None = None) -> None:
        """Add one tensor; ``sample`` are some of its values."""
        self.heads.append(f"{name}{tuple(shape)}".encode())
        self.samples.append(NOTHING if sample is None else sample)

    def texts(self) -> list[str]:
        """Return both, in hexadecimal."""
        counts = [0, *(sample.numel() for sample in self.samples)]
        ends = list(accumulate(counts))
        values = gathered(self.samples)
        found = []
        for dtype in (torch.bfloat16, torch.float16):
            bits = values.to(dtype).view(torch.int16).numpy()
            parts = (bits[start:end].tobytes() for start, end in pairwise(ends))
            said = chain.from_iterable(zip(self.heads, parts, strict=True))
            found.append(hashlib.sha256(b"".join(said)).hexdigest()[:16])
        return found


def gathered(samples: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the values of all ``samples`` on the CPU, unrounded: one copy from each device."""
    if not samples:
        return torch.empty(0)
    # Types of 8 bits promote to none; the others, all to the widest.
    wide = [s if s.dtype.itemsize > 1 else s.float() for s in samples]
    if len({sample.device for sample in wide}) > 1:
        wide = [sample.cpu() for sample in wide]
    return torch.cat(wide).cpu()


def sampled(tensor: torch.Tensor, count: int = SAMPLES) -> torch.Tensor:
    """Return evenly spaced values of ``tensor``, on its device."""
    return tensor.flatten()[spaced(tensor.numel(), count)]


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
