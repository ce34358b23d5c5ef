"""Dropout by 16 bits an element: as likely as was asked for, independent, repeatable, cheap."""

import copy
import math

import pytest
import torch

from lit_adapters import LoRA, attach
from lit_adapters.recompute import recompute_activations
from lit_adapters.weights.dropout import dropout, growth, keep_mask
from tests.models import batch, llama, shake

COUNT = 1 << 20


@pytest.mark.parametrize("probability", [1e-4, 0.05, 0.3, 0.5, 0.999])
def test_as_many_are_zeroed_as_was_asked_for(probability):
    keep = keep_mask(torch.empty(COUNT), probability)
    deviation = math.sqrt(COUNT * probability * (1 - probability))
    assert abs((keep == 0).sum().item() - COUNT * probability) < 5 * deviation


@pytest.mark.parametrize("probability", [1e-9, 1e-4, 0.05, 1 / 3, 0.5, 0.9, 1 - 1e-9])
def test_the_expected_value_is_exact_for_the_probability_that_is_drawn(probability, monkeypatch):
    """Which is the one asked for to 1 / 131072; every level of a draw is as likely as another."""
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: every.view(torch.int64))
    share = keep_mask(torch.empty(1 << 16), probability).double().mean().item()
    assert share * growth(probability) == pytest.approx(1, abs=1e-12)
    assert abs(share - (1 - probability)) <= (
        1 / 131072 if 1e-6 < probability < 1 - 1e-6 else 1 / 65536
    )


def test_elements_are_independent():
    """Of their neighbours, of which four come from one number, and of those of the next draw."""
    x = torch.empty(COUNT)
    first, second = ((keep_mask(x, 0.5).float() - 0.5) * 2 for _ in range(2))
    pairs = [first[:-lag] * first[lag:] for lag in (1, 2, 3, 4, 5, 8)] + [first * second]
    for product in pairs:
        assert abs(product.sum().item()) < 5 * math.sqrt(len(product))
    places = first.view(-1, 4).mean(0)  # within a number
    assert places.abs().max() < 5 / math.sqrt(COUNT / 4)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (0, 4)])
def test_any_shape_and_the_same_from_the_same_seed(shape):
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append(keep_mask(torch.empty(shape), 0.5))
    assert masks[0].shape == shape
    assert masks[0].dtype == torch.uint8
    assert torch.equal(masks[0], masks[1])


def test_what_stays_grows_and_gets_the_gradient():
    x = torch.randn(50, 40, requires_grad=True)
    y = dropout(x, 0.25)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    torch.testing.assert_close(x.grad, kept / 0.75)


def test_layers_that_are_recomputed_draw_the_same():
    plain = llama()
    attach(plain, LoRA(rank=4, dropout=0.4))
    shake(plain).train()
    again = copy.deepcopy(plain)
    recompute_activations(again)
    for model in (plain, again):
        torch.manual_seed(3)
        model(**batch(), use_cache=False).loss.backward()
    for one, other in zip(plain.parameters(), again.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)
