"""Sums over one accumulation window: loss, trained tokens, time."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


class TokenWindow:
    """Collects micro-batches between two optimizer steps."""

    def __init__(self) -> None:
        self.nll: Tensor | None = None
        self.tokens: Tensor | None = None
        self.started = time.perf_counter()

    def start(self) -> None:
        """Begin to count time."""
        self.started = time.perf_counter()

    def add(self, nll: Tensor, tokens: Tensor) -> None:
        """Add a micro-batch: summed loss in nats and trained tokens, both 0-dimensional."""
        # fp64: exact token counts, and the same sum whatever the order of ranks
        wide = torch.float32 if nll.device.type == "mps" else torch.float64
        nll, tokens = nll.to(wide), tokens.to(wide)
        self.nll = nll if self.nll is None else self.nll + nll
        self.tokens = tokens if self.tokens is None else self.tokens + tokens

    def close(self, reduce: Callable[..., Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return summed loss, trained tokens and tokens per second over all ranks; start anew."""
        if self.nll is None or self.tokens is None:
            raise RuntimeError("an optimizer step without a training step before it")
        both = reduce(torch.stack([self.nll, self.tokens]), reduce_op="sum")
        self.nll = self.tokens = None
        now = time.perf_counter()
        rate = both[1].item() / max(now - self.started, 1e-9)
        self.started = now
        return both[0], both[1], rate
