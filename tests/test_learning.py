"""What a method is for, in seconds: PiSSA learns faster than LoRA at the same scale and rate.

The paper's own toy (arXiv:2404.02948, figure 2): a network that knows the odd digits is fine-tuned
on the even ones.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_adapters import Kaiming, LoRA, PiSSA, attach, initialise
from tests.models import base_bytes

load_digits = pytest.importorskip("sklearn.datasets").load_digits

SEEDS = range(4)
STEPS = 30  # early: with equal scales the two draw level after some hundred steps


@pytest.fixture(scope="module")
def digits():
    """Images (n, 64) in 0..1 and labels of the odd and of the even digits."""
    data = load_digits()
    images, labels = torch.tensor(data.data / 16).float(), torch.tensor(data.target)
    odd = labels % 2 == 1
    return {"odd": (images[odd], labels[odd]), "even": (images[~odd], labels[~odd])}


def train(model, data, steps, lr, size, seed):
    """Adam; returns the loss over all the data after the last step."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        rows = torch.randint(0, len(images), (size,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
    with torch.no_grad():
        return F.cross_entropy(model(images), labels).item()


@pytest.fixture(scope="module")
def pretrained(digits):
    """One network for each seed that knows the odd digits."""
    models = []
    for seed in SEEDS:
        torch.manual_seed(seed)
        sizes = [(64, 128), (128, 128), (128, 10)]
        linears = [nn.Linear(*size) for size in sizes]
        model = nn.Sequential(linears[0], nn.ReLU(), linears[1], nn.ReLU(), linears[2])
        assert train(model, digits["odd"], 300, 1e-3, 64, seed) < 0.1
        models.append(model)
    return models


@pytest.mark.parametrize("lr", [2e-4, 1e-3])
def test_pissa_learns_faster_than_lora_on_every_seed(digits, pretrained, lr):
    ratios = []
    for seed, base in zip(SEEDS, pretrained, strict=True):
        losses = []
        for start in (PiSSA(niter=None), Kaiming()):
            model = copy.deepcopy(base)
            attach(model, LoRA(rank=8, alpha=8), seed=seed)
            initialise(model, start, seed=seed)
            before = base_bytes(model)
            start_loss = train(model, digits["even"], 0, lr, 64, seed)
            losses.append(train(model, digits["even"], STEPS, lr, 64, seed))
            assert losses[-1] < start_loss
            assert base_bytes(model) == before
        ratios.append(losses[0] / losses[1])
    assert max(ratios) <= 0.9, ratios
