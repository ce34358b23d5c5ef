"""The length of DoRA's rows: autograd's gradients of the same formula, nothing kept beside."""

import pytest
import torch
from torch import nn

from lit_adapters import DoRA, attach
from lit_adapters.adapters.magnitude import scaled


def formula(product, ratio, bias, dtype):
    """What autograd differentiates by itself."""
    return ((product * ratio) + (0 if bias is None else (1 - ratio) * bias)).to(dtype)


def tensors(shape, ratio_shape, dtype, with_bias):
    torch.manual_seed(0)
    product = torch.randn(shape, dtype=dtype, requires_grad=True)
    ratio = torch.randn(ratio_shape, dtype=dtype, requires_grad=True)
    bias = torch.randn(ratio_shape, dtype=dtype, requires_grad=True) if with_bias else None
    return product, ratio, bias


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "ratio_shape"), [((3, 5), (5,)), ((2, 3, 5), (5,)), ((2, 5, 3), (5, 1))]
)
def test_gradients_are_those_of_differences_and_so_are_theirs(shape, ratio_shape, with_bias):
    inputs = tensors(shape, ratio_shape, torch.float64, with_bias)
    run = lambda *given: scaled(*given, torch.float64)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 1e-5)]
)
def test_a_ratio_of_zero_and_less_has_the_gradient_of_the_formula(dtype, tolerance, with_bias):
    """In fp16, where what comes out is too small to be read back, too."""
    found, expected = (tensors((64, 5), (5,), torch.float32, with_bias) for _ in range(2))
    for inputs, function in ((found, scaled), (expected, formula)):
        with torch.no_grad():
            inputs[1].copy_(torch.tensor([1.0, 0.0, -2.0, 1e-6, 1e-9]))
        weights = torch.linspace(-1, 1, 5)  # squares would have a gradient of 0 at 0
        (function(*inputs, dtype).float() * weights).sum().backward()
    for one, other in zip(found[: 2 + with_bias], expected, strict=False):
        size = other.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance * size)


def test_the_start_is_the_product_to_the_bit():
    product, _, bias = tensors((2, 3, 5), (5,), torch.float32, True)
    assert torch.equal(scaled(product, torch.ones(5), bias, torch.float32), product)


def test_each_example_has_a_gradient_by_torch_func():
    x = torch.randn(4, 3, 5)
    ratio = torch.rand(5) + 0.5

    def loss(r, one):
        return scaled(one, r, None, torch.float32).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(ratio, x)
    torch.testing.assert_close(found, 2 * ratio * x.square().sum(1))


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6, bias=False)

    def forward(self, x):
        return self.layer(x).mul_(2)


def test_a_model_that_overwrites_the_result_is_told_so():
    model = Overwriting()
    attach(model, DoRA(rank=2, targets=["layer"]))
    with pytest.raises(RuntimeError, match="in place.*exclude"):
        model(torch.randn(3, 4)).sum().backward()


def test_an_activation_after_it_shares_what_is_kept():
    model = nn.Sequential(nn.Linear(64, 512, bias=False), nn.SiLU())
    attach(model, DoRA(rank=2, targets=["0"]))
    x, kept = torch.randn(256, 64), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    large = [t for t in kept.values() if t.shape == (256, 512)]
    assert len(large) == 1
