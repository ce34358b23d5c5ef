"""Settings every test runs under: offline, one thread, seeded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from torch.nn import functional as F

from lit_adapters.weights.dropout import growth, keep_mask


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def drawn_alike(monkeypatch):
    """Let torch's dropout draw as the library's does; that one is tested in test_dropout.py."""

    def dropout(x, p=0.5, training=True, inplace=False):
        return x * keep_mask(x, p) * growth(p) if training and p else x

    monkeypatch.setattr(F, "dropout", dropout)
