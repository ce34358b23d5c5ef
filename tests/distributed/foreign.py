"""GaLore in somebody else's module, in this process or as one of two ranks (`python foreign.py`).

A step sees two micro-batches: one of each rank, or both by accumulation. Each names the expert that
it is led through, so that ranks differ in what they use.
"""

import os
import sys
from itertools import chain

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lit_adapters import GaLore, SpikeGuard
from tests.distributed.train import TIMEOUT, main

# The third is never used, the second at first by rank 1 alone.
EXPERTS = [(0, 0), (0, 1), (1, 1), (1, 0), (0, 0), (0, 1)]


class Experts(LightningModule):
    """Every layer a Linear; by hand, two backward passes make a window."""

    def __init__(self, manual=False, bias=True):
        super().__init__()
        self.automatic_optimization = not manual
        self.first = nn.Linear(10, 16, bias=bias)
        self.experts = nn.ModuleList(nn.Linear(16, 12, bias=bias) for _ in range(3))
        self.double()

    def training_step(self, batch, batch_idx):
        x, y, expert, factor = batch
        x, y = x.to(self.first.weight), y.to(self.first.weight)
        loss = factor * F.mse_loss(self.experts[expert](self.first(x).tanh()), y)
        if self.automatic_optimization:
            return loss
        optimizer = self.optimizers()
        self.manual_backward(loss / 2)
        self.manual_backward(F.mse_loss(self.experts[expert](self.first(x).tanh()), y) / 2)
        optimizer.step()
        optimizer.zero_grad()
        return None

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1, eps=1e-6)


def batches(rank, world, infinite=None):
    """Micro-batches of a rank, or of both in turn; the loss of one may be infinite."""
    generator = torch.Generator().manual_seed(5)
    made = [
        (
            torch.randn(4, 10, generator=generator, dtype=torch.float64),
            torch.randn(4, 12, generator=generator, dtype=torch.float64),
            expert,
            torch.inf if number == infinite else 1.0,
        )
        for number, expert in enumerate(chain.from_iterable(EXPERTS))
    ]
    return DataLoader(made[rank::world], batch_size=None)


def run(case):
    """Fit; return the weights before and after."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    seed_everything(rank if case.get("another_start") else 0, verbose=False)
    module = Experts(case.get("manual", False), case.get("bias", True))
    torch.manual_seed(0)
    if case.get("unseeded"):
        os.environ.pop("PL_GLOBAL_SEED")  # which ranks start with again
        torch.seed()
    module.to(getattr(torch, case.get("dtype", "float64")))

    def fit(*callbacks):
        trainer = Trainer(
            default_root_dir=case["folder"],
            accelerator="cpu",
            devices=world,
            strategy=DDPStrategy(timeout=TIMEOUT, find_unused_parameters=True)
            if world > 1
            else "auto",
            use_distributed_sampler=False,
            accumulate_grad_batches=2 if world == 1 and not case.get("manual") else 1,
            max_epochs=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=list(callbacks),
        )
        trainer.fit(module, batches(rank, world, case.get("infinite")))
        return trainer

    projects = GaLore(**{"rank": 3, "update_gap": 2, "scale": 1.0, **case.get("galore", {})})
    fit(projects, *([SpikeGuard("skip")] if "infinite" in case else []))
    state = {name: p.detach().clone() for name, p in module.named_parameters()}
    after = {}
    if case.get("again"):
        fit()  # without it: DDP is to average everything
        after = {f"again.{name}": p.detach().clone() for name, p in module.named_parameters()}
    return {"state": {**state, **after}}


if __name__ == "__main__":
    main(*sys.argv[1:], run=run)
