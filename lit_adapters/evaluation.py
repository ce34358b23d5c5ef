"""Sums over an evaluation, by data loader: loss, trained tokens, tokens ranked first."""

from collections.abc import Callable

import torch
from torch import Tensor

from lit_adapters.losses import TokenLoss


class EvaluationSums:
    """Collects batches; what comes out is the same however tokens were batched."""

    def __init__(self) -> None:
        self.by_loader: dict[int, Tensor] = {}  # (3,): as `TokenLoss`

    def add(self, batch: TokenLoss, loader: int) -> None:
        """Add a batch of a loader."""
        # fp64: exact token counts, and the same sum whatever the order of ranks
        wide = torch.float32 if batch.nll.device.type == "mps" else torch.float64
        sums = torch.stack([value.to(wide) for value in batch])
        self.by_loader[loader] = self.by_loader.get(loader, 0) + sums

    def close(self, reduce: Callable[..., Tensor], loaders: int) -> list[TokenLoss]:
        """Return the sums over all ranks: of all loaders together, then of each."""
        some = next(iter(self.by_loader.values()))  # every rank has a batch of the first loader
        rows = [self.by_loader.get(i, torch.zeros_like(some)) for i in range(loaders)]
        sums = reduce(torch.stack(rows), reduce_op="sum")
        return [TokenLoss(*sums.sum(0)), *(TokenLoss(*row) for row in sums)]
