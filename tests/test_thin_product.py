"""The product with ``A`` is autograd's own; what it keeps is less."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lit_adapters import LoRA, attach
from lit_adapters.weights.thin_product import thin_product
from tests.models import llama

DTYPES = [torch.float32, torch.bfloat16]


def plain(x, A, dropout):
    return F.linear(F.dropout(x, dropout).to(A.dtype), A)


def run(product, dtype, dropout, autocast, exactly=False):
    """Output, gradients and the random numbers that follow; ``exactly`` computes in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, 24, generator=generator).to(dtype)
    A = torch.randn(3, 24, generator=generator)
    x, A = (t.double() if exactly else t for t in (x, A))
    x.requires_grad_()
    A.requires_grad_()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = product(x, A, dropout)
        rest = torch.rand(3)  # the stream of random numbers goes on at the same place
    (y.to(A.dtype) * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y, x.grad, A.grad, rest


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("drawn_alike")
def test_value_gradients_and_random_numbers_are_autograds(dtype, dropout, autocast):
    ours, theirs = (run(product, dtype, dropout, autocast) for product in (thin_product, plain))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
    assert torch.equal(ours[3], theirs[3])
    if dtype == torch.float32 and not autocast:
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        return
    # Both round to bf16, in places of their own: neither is far from what float64 gives.
    exact = run(plain, dtype, dropout, False, exactly=True)
    for one, truth in zip(ours[:3], exact[:3], strict=True):
        assert (one - truth).norm() < 2**-8 * truth.norm()  # half of bf16's last place


@pytest.mark.parametrize("frozen", ["x", "A"])
def test_what_is_frozen_gets_no_gradient(frozen):
    x, A = torch.randn(2, 5, 8), torch.randn(2, 8)
    trained = {"x": A, "A": x}[frozen].requires_grad_()
    thin_product(x, A, 0.5).sum().backward()
    assert trained.grad is not None
    assert (x if frozen == "x" else A).grad is None


def kept(model, embedded):
    """Bytes of distinct memory, parameters aside, that the backward pass of a model waits for."""
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        model(inputs_embeds=embedded, use_cache=False).logits.sum()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_inputs_are_kept_once_however_many_layers_read_them(monkeypatch, dtype, dropout):
    """Dropped, an element costs a byte a layer; cast, nothing."""
    base = llama(num_hidden_layers=1).to(dtype)
    embedded = torch.randn(2, 20, 32, dtype=dtype, requires_grad=True)

    def bytes_kept(product):
        monkeypatch.setattr("lit_adapters.weights.dense.thin_product", product)
        model = copy.deepcopy(base)
        attach(model, LoRA(rank=4, dropout=dropout, targets=["q_proj", "k_proj", "v_proj"]))
        return kept(model.train(), embedded)

    elements = embedded.numel()
    copies = 3 * elements * 4  # of q, k and v, in fp32; with dropout their noise is kept as well
    own = elements * dtype.itemsize
    lost = own + (3 * elements if dropout else 0)
    saved = bytes_kept(plain) - bytes_kept(thin_product)
    assert saved == (2 if dropout else 1) * copies - lost
