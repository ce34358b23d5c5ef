"""Count what a model holds: trainable parameters, and bytes of base, adapter and optimizer."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from math import prod

import torch
from torch import nn
from torch.optim import Optimizer

from lit_adapters.adapters import Adapter
from lit_adapters.optim import SHADOW
from lit_adapters.weights import is_plain, matrix_shape, side_tensors

with suppress(ImportError):  # absent on Windows
    import resource


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model; parameters are counted, the rest is bytes."""

    trainable: int
    total: int
    base_bytes: int
    adapter_bytes: int

    @property
    def share(self) -> float:
        """Trainable share of all parameters."""
        return self.trainable / max(1, self.total)


def footprint(model: nn.Module) -> Footprint:
    """Measure ``model``; the adapter is what is trained, and pinned origins; ties count once.

    A quantised weight counts with the numbers that it stands for, and with the bytes of its scales.
    """
    named = model.named_parameters()
    everything = [p for name, p in named if name.rpartition(".")[2] != SHADOW]  # workspace
    own = {id(p) for m in model.modules() if isinstance(m, Adapter) for p in m.parameters()}
    adapter_bytes = sum(p.nbytes for p in everything if p.requires_grad or id(p) in own)
    packed = {id(m.weight): m for m in model.modules() if not is_plain(m)}
    scales = sum(t.nbytes for layer in packed.values() for t in side_tensors(layer))
    counts = {key: prod(matrix_shape(layer)) for key, layer in packed.items()}
    return Footprint(
        trainable=sum(p.numel() for p in everything if p.requires_grad),
        total=sum(counts.get(id(p), p.numel()) for p in everything),
        base_bytes=sum(p.nbytes for p in everything) + scales - adapter_bytes,
        adapter_bytes=adapter_bytes,
    )


def optimizer_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state; those that parameters share count once."""
    held = {
        id(value): value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(held.values())


def peak_bytes(device: torch.device) -> int:
    """Highest use so far: allocated on a CUDA device, else resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0  # Windows keeps no such figure for a process without further packages
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
