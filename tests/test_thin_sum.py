"""The product with ``B`` is added to an output in place, and beside what takes no writes."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lit_adapters.weights import add_scaled

SCALE = 1.5
LAYERS = {
    "linear": lambda: nn.Linear(6, 5, bias=False),
    "with a bias": lambda: nn.Linear(6, 5),
    "Conv1D": lambda: Conv1D(5, 6),
}


def tensors(*shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 6, generator=generator, requires_grad=True)
    hidden = torch.randn(*shape, 3, generator=generator, requires_grad=True)
    B = torch.randn(5, 3, generator=generator, requires_grad=True)
    return x, hidden, B


def plain(output, hidden, B, scale):
    return output + scale * hidden @ B.T


def run(add, layer, dtype, shape=(2, 4), autocast=False):
    """What comes out of an adapted layer, and the gradients of what went in."""
    given = [t.detach().to(dtype).requires_grad_() for t in tensors(*shape)]
    x, hidden, B = given
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = add(layer(x), hidden.to(torch.bfloat16) if autocast else hidden, B, SCALE)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), *(t.grad for t in given)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 1, 2), (0, 3)])
@pytest.mark.parametrize("kind", LAYERS)
def test_sums_and_gradients_are_those_of_float64(kind, shape):
    layer = LAYERS[kind]().requires_grad_(False)
    found = run(add_scaled, layer, torch.float32, shape)
    expected = run(plain, layer.double(), torch.float64, shape)
    for one, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_its_dtype_and_gives_factors_gradients_of_their_own():
    layer = nn.Linear(6, 5).requires_grad_(False)
    found = run(add_scaled, layer, torch.float32, autocast=True)
    assert [one.dtype for one in found] == [torch.bfloat16, *[torch.float32] * 3]
    expected = run(plain, layer.double(), torch.float64)
    for one, truth in zip(found, expected, strict=True):
        assert (one - truth).norm() < 2**-7 * truth.norm()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_sum_stands_in_the_output_of_a_layer(kind, grad):
    layer = LAYERS[kind]().requires_grad_(False)
    x, hidden, B = tensors(2, 4)
    with torch.set_grad_enabled(grad):
        output = layer(x)
        assert add_scaled(output, hidden, B, SCALE).data_ptr() == output.data_ptr()


def strided(output):
    return output.transpose(0, 1).contiguous().transpose(0, 1)


def part(output):
    return torch.cat([output, output])[:2]


class Tagged(torch.Tensor):
    """Of a class of its own."""


OTHERS = {
    "strided": strided,
    "a part": part,
    "a leaf": lambda output: output.detach().requires_grad_(),
    "a subclass": lambda output: output.as_subclass(Tagged),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_takes_no_writes_is_left_alone(kind):
    x, hidden, B = tensors(2, 4)
    output = OTHERS[kind](nn.Linear(6, 5).requires_grad_(False)(x))
    before = output.detach().clone()
    added = add_scaled(output, hidden, B, SCALE)
    assert torch.equal(output.detach(), before)
    torch.testing.assert_close(added, output + SCALE * hidden @ B.T)


class Opaque(Function):
    """Its output is a view, made where no gradients are noted: as of bitsandbytes' product."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, slope):
        return slope @ ctx.saved_tensors[0], None, slope.sum((0, 1))


@pytest.mark.parametrize("trained", ["x", "bias", "both"])
def test_gradients_pass_through_a_function_that_returns_a_view(trained):
    layer = nn.Linear(6, 5).requires_grad_(False)
    given = {}
    for product in (F.linear, Opaque.apply):
        x, hidden, B = tensors(2, 4)
        bias = layer.bias.clone().requires_grad_(trained != "x")
        x = x.detach().requires_grad_(trained != "bias")
        output = product(x, layer.weight, bias)
        assert output._base is not None
        add_scaled(output, hidden, B, SCALE).sin().sum().backward()
        given[product] = [t.grad for t in (x, bias, hidden, B)]
    for one, other in zip(*given.values(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_one_row_may_be_a_view_of_a_column():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, hidden, B = (t.detach() for t in tensors(1))
    output = (layer.weight @ x.T).T
    assert output.is_contiguous()
    expected = output + SCALE * hidden @ B.T
    torch.testing.assert_close(add_scaled(output, hidden, B, SCALE), expected)


def test_inference_tensors_are_added_to_outside_of_inference_mode():
    _, hidden, B = (t.detach() for t in tensors(2, 4))
    with torch.inference_mode():
        output = torch.ones(2, 4, 5)
    torch.testing.assert_close(add_scaled(output, hidden, B, SCALE), 1 + SCALE * hidden @ B.T)


def test_a_gradient_of_fp16_overflows_no_earlier_than_the_loss():
    hidden, B = torch.full((8, 1), 200.0, dtype=torch.float16), torch.zeros(1, 1).half()
    B.requires_grad_()
    output = torch.zeros(8, 1, dtype=torch.float16)
    add_scaled(output, hidden, B, 0.25).backward(torch.full((8, 1), 80.0, dtype=torch.float16))
    assert B.grad.item() == 32000  # four times that is no number of fp16


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_knows_the_sum():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, hidden, B = (t.detach() for t in tensors(2, 4))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(hidden, torch.ones_like(hidden))
        slope = forward_ad.unpack_dual(add_scaled(layer(x), dual, B, SCALE)).tangent
    torch.testing.assert_close(slope, SCALE * torch.ones_like(hidden) @ B.T)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_computes_the_sum():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, hidden, B = (t.detach() for t in tensors(2, 4))

    def out(x, hidden):
        return add_scaled(layer(x), hidden, B, SCALE)

    traced = torch.jit.trace(out, (x, hidden))
    torch.testing.assert_close(traced(x + 1, hidden), plain(layer(x + 1), hidden, B, SCALE))


def test_second_derivatives_are_exact():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False).double()

    def out(x, hidden, B):
        return add_scaled(layer(x), hidden, B, SCALE).sin()

    given = tuple(t.detach().double().requires_grad_() for t in tensors(2, 2))
    assert torch.autograd.gradcheck(out, given)
    assert torch.autograd.gradgradcheck(out, given)


def test_transforms_of_functions_are_those_of_the_plain_sum():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)

    def gradients(add):
        def loss(x, hidden, B):
            return add(layer(x), hidden, B, SCALE).square().sum()

        each = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, None))
        return each(*(t.detach() for t in tensors(3, 4)))

    for one, other in zip(gradients(add_scaled), gradients(plain), strict=True):
        torch.testing.assert_close(one, other)
