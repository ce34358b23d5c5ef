"""Recognise a base model again: a name to show, and a short digest of its weights."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from lit_adapters.adapters import Adapter

SAMPLES = 16  # values per tensor: enough to tell models apart, cheap for billions of weights


def fingerprint(model: nn.Module) -> str:
    """Digest of the model's own weights, the same with or without adapters, in fp32 or in bf16.

    Covers name, shape and 16 evenly spaced values, rounded to bf16, of every floating-point
    parameter; returns 16 hexadecimal digits.
    """
    adapters = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) in adapters or not parameter.is_floating_point():
            continue
        values = parameter.detach().flatten()
        steps = torch.linspace(0, max(len(values) - 1, 0), min(SAMPLES, len(values)))
        sample = values[steps.long().to(values.device)].to("cpu", torch.bfloat16)
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_name(model: nn.Module) -> tuple[str | None, str]:
    """Return the hub id of a model, if it came from the hub, and a name to show.

    A local path is never returned: only the last part of it, as the name.
    """
    origin = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not origin:
        return None, type(model).__name__
    is_hub_id = origin.count("/") <= 1 and not origin.startswith((".", "/", "~"))
    if is_hub_id and not Path(origin).exists():
        return origin, origin
    return None, Path(origin).name
