"""The branch is autograd's own product; in place where that can be, and with less kept."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import Function
from torch.nn import functional as F
from torch.nn.utils.parametrize import register_parametrization
from transformers.pytorch_utils import Conv1D

from lit_adapters.weights.branch import THIN, add_branch, narrow_products

SCALE = 1.5
LAYERS = {
    "linear": lambda: nn.Linear(6, 5, bias=False),
    "with a bias": lambda: nn.Linear(6, 5),
    "Conv1D": lambda: Conv1D(5, 6),
}


def tensors(*shape, rank=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 6, generator=generator, requires_grad=True)
    A = torch.randn(rank, 6, generator=generator, requires_grad=True)
    B = torch.randn(5, rank, generator=generator, requires_grad=True)
    return x, A, B


def frozen(kind="linear"):
    torch.manual_seed(1)
    return LAYERS[kind]().requires_grad_(False)


def plain(layer, output, x, A, B, scale, dropout=0.0):
    branch = scale * F.linear(F.linear(F.dropout(x, dropout).to(A.dtype), A), B)
    return output + branch.to(output.dtype)


def ready(layer, output, x, A, B, scale, dropout=0.0):
    """With the narrow product of two layers made before."""
    hidden = narrow_products(x, [A, torch.ones(2, 6, dtype=A.dtype)])[0]
    return add_branch(layer, output, x, A, B, scale, dropout, None if dropout else hidden)


def run(add, layer, dtype, shape=(2, 4), autocast=False, dropout=0.0, base=None, rank=3):
    """What comes out of an adapted layer, gradients of what went in, and random numbers after."""
    x, A, B = given = [t.detach().to(dtype).requires_grad_() for t in tensors(*shape, rank=rank)]
    x = x.to(base or dtype)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = add(layer, layer(x), x, A, B, SCALE, dropout)
        rest = torch.rand(3)
    (out.to(dtype) * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), *(t.grad for t in given), rest


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (2, 1, 2), (0, 3)])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rank", [1, THIN - 1, THIN])
@pytest.mark.parametrize("add", [add_branch, ready])
def test_sums_and_gradients_are_those_of_float64(add, rank, kind, shape):
    layer = frozen(kind)
    found = run(add, layer, torch.float32, shape, rank=rank)
    expected = run(plain, layer.double(), torch.float64, shape, rank=rank)
    for one, truth in zip(found[:4], expected[:4], strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("drawn_alike")
@pytest.mark.parametrize("add", [add_branch, ready])
def test_dtypes_and_random_numbers_are_autograds(add, base, dropout, autocast):
    layer = frozen().to(base)
    options = {"dropout": dropout, "base": base}
    found, expected = (
        run(one, layer, torch.float32, autocast=autocast, **options) for one in (add, plain)
    )
    assert [one.dtype for one in found] == [one.dtype for one in expected]
    assert torch.equal(found[-1], expected[-1])
    # Where something rounds to bf16, neither is far from what float64 gives.
    exact = run(plain, layer.double(), torch.float64, dropout=dropout)
    rounds = autocast or base == torch.bfloat16
    for one, truth in zip(found[:4], exact[:4], strict=True):
        assert (one - truth).norm() < (2**-7 if rounds else 1e-6) * truth.norm()


@pytest.mark.parametrize("still", ["x", "A", "B"])
def test_what_is_frozen_gets_no_gradient(still):
    given = dict(zip("xAB", tensors(2, 4), strict=True))
    given[still].requires_grad_(False)
    layer = frozen()
    add_branch(layer, layer(given["x"]), *given.values(), SCALE, 0.5).sum().backward()
    assert [name for name, t in given.items() if t.grad is None] == [still]


@pytest.mark.parametrize(("dtype", "dropout"), [(torch.float32, 0.1), (torch.bfloat16, 0.0)])
def test_inputs_are_kept_once_however_many_layers_read_them(dtype, dropout):
    """Dropped, an element costs a byte a layer; cast, nothing."""
    layers = [frozen().to(dtype) for _ in range(3)]
    x, A, B = tensors(2, 20)
    inner = x.to(dtype) * 1
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        for layer in layers:
            add_branch(layer, layer(inner), inner, A, B, SCALE, dropout)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    own = {t.data_ptr() for t in (A, B, *(layer.weight for layer in layers))}
    masks = 3 * inner.numel() if dropout else 0
    hidden = 3 * 40 * len(A) * 4
    kept = sum(size for place, size in storages.items() if place not in own)
    assert kept == inner.numel() * dtype.itemsize + hidden + masks


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("grad", [True, False])
def test_the_sum_stands_in_the_output_of_a_layer(kind, grad):
    layer = frozen(kind)
    x, A, B = tensors(2, 4)
    with torch.set_grad_enabled(grad):
        output = layer(x)
        added = add_branch(layer, output, x, A, B, SCALE)
        assert added.data_ptr() == output.data_ptr()


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
    x, A, B = tensors(2, 4)
    layer = frozen("with a bias")
    output = OTHERS[kind](layer(x))
    before = output.detach().clone()
    added = add_branch(layer, output, x, A, B, SCALE)
    assert torch.equal(output.detach(), before)
    torch.testing.assert_close(added, plain(layer, output, x, A, B, SCALE))


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
    layer = frozen("with a bias")
    given = {}
    for product in (F.linear, Opaque.apply):
        x, A, B = tensors(2, 4)
        bias = layer.bias.clone().requires_grad_(trained != "x")
        x = x.detach().requires_grad_(trained != "bias")
        output = product(x, layer.weight, bias)
        assert output._base is not None
        add_branch(layer, output, x, A, B, SCALE).sin().sum().backward()
        given[product] = [t.grad for t in (x, bias, A, B)]
    for one, other in zip(*given.values(), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_one_row_may_be_a_view_of_a_column():
    layer = frozen()
    x, A, B = (t.detach() for t in tensors(1))
    output = (layer.weight @ x.T).T
    assert output.is_contiguous()
    expected = plain(layer, output, x, A, B, SCALE)
    torch.testing.assert_close(add_branch(layer, output, x, A, B, SCALE), expected)


def test_inference_tensors_are_added_to_outside_of_inference_mode():
    x, A, B = (t.detach() for t in tensors(2, 4))
    with torch.inference_mode():
        output = torch.ones(2, 4, 5)
    added = add_branch(frozen(), output, x, A, B, SCALE)
    torch.testing.assert_close(added, plain(None, torch.ones(2, 4, 5), x, A, B, SCALE))


def test_a_gradient_of_fp16_overflows_no_earlier_than_the_loss():
    x, A = torch.full((8, 1), 200.0).half(), torch.ones(1, 1).half()
    B = torch.zeros(1, 1).half().requires_grad_()
    output = torch.zeros(8, 1, dtype=torch.float16)
    added = add_branch(nn.Linear(1, 1), output, x, A, B, 0.25)
    added.backward(torch.full((8, 1), 80.0, dtype=torch.float16))
    assert B.grad.item() == 32000  # four times that is no number of fp16


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_mode_knows_the_sum():
    layer = frozen()
    x, A, B = (t.detach() for t in tensors(2, 4))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(A, torch.ones_like(A))
        slope = forward_ad.unpack_dual(add_branch(layer, layer(x), x, dual, B, SCALE)).tangent
    torch.testing.assert_close(slope, SCALE * x @ torch.ones_like(A).T @ B.T)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_trace_computes_the_sum():
    layer = frozen()
    x, A, B = (t.detach() for t in tensors(2, 4))

    def out(x, A):
        return add_branch(layer, layer(x), x, A, B, SCALE)

    traced = torch.jit.trace(out, (x, A))
    torch.testing.assert_close(traced(x + 1, A), plain(layer, layer(x + 1), x + 1, A, B, SCALE))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("add", [add_branch, ready])
def test_second_derivatives_are_exact(kind, add):
    layer = frozen(kind).double()

    def out(x, A, B):
        return add(layer, layer(x), x, A, B, SCALE).sin()

    given = tuple(t.detach().double().requires_grad_() for t in tensors(2, 2))
    assert torch.autograd.gradcheck(out, given)
    assert torch.autograd.gradgradcheck(out, given)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_of_many_sums_may_be_asked_for_at_once(kind, dropout):
    layer = frozen(kind)
    given = tensors(2, 4)
    added = add_branch(layer, layer(given[0]), *given, SCALE, dropout).flatten()
    many = torch.eye(len(added))

    def gradients(slope, **more):
        return torch.autograd.grad(added, given, slope, retain_graph=True, **more)

    each = [torch.stack(those) for those in zip(*map(gradients, many), strict=True)]
    for at_once in (gradients(many, is_grads_batched=True), torch.func.vmap(gradients)(many)):
        for batched, apart in zip(at_once, each, strict=True):
            torch.testing.assert_close(batched, apart)


def test_transforms_of_functions_are_those_of_the_plain_sum():
    layer = frozen()

    def gradients(add):
        def loss(x, A, B):
            return add(layer, layer(x), x, A, B, SCALE).square().sum()

        each = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, None))
        x, A, B = (t.detach() for t in tensors(3, 4))
        return each(x, torch.stack([A, A + 1, 2 * A]), B)

    for one, other in zip(gradients(add_branch), gradients(plain), strict=True):
        torch.testing.assert_close(one, other)


# --- the base's own product ----------------------------------------------------------------------


def through_base(added):
    """Whether the gradient of an input passes the base's product on its own way."""
    node = added.grad_fn
    while type(node).__name__ == "ViewBackward0":
        node = node.next_functions[0][0]
    return node.next_functions[0][0] is not None


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 1, 2)])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_frozen_product_gives_its_gradient_with_the_branch(kind, shape, leaf):
    layer = frozen(kind)
    x, A, B = tensors(*shape)
    x = x if leaf else x * 1
    assert not through_base(add_branch(layer, layer(x), x, A, B, SCALE))


def replaced(layer, x):
    """By another product of the same input."""
    layer.register_forward_hook(lambda module, args, output: args[0] @ torch.ones(6, 5))
    return layer(x)


def noticed(layer, x):
    output = layer(x)
    output.register_hook(lambda slope: 3 * slope)
    return output


def retained(layer, x):
    output = layer(x)
    output.retain_grad()
    return output


def trained(layer, x):
    layer.requires_grad_(True)
    return layer(x)


def wrapped(layer, x):
    layer.forward = lambda x: F.linear(x, torch.ones(5, 6))
    return layer(x)


def of_a_mode(layer, x):
    with torch.autocast("cpu", torch.bfloat16):
        return layer(x)


class Doubling(torch.Tensor):
    """A weight that layers multiply with as it says: as of a quantised one, with its scales."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = args
            return F.linear(x, 2 * weight.as_subclass(torch.Tensor), bias)
        return super().__torch_function__(function, types, args, kwargs)


def of_a_class(layer, x):
    if isinstance(layer, Conv1D):  # which calls another function
        return layer(2 * x)
    del layer._parameters["weight"]
    layer.weight = torch.nn.Parameter(frozen().weight.as_subclass(Doubling), requires_grad=False)
    return layer(x)


class Noisy(nn.Module):
    """What a frozen weight is replaced with, each time that it is read."""

    def forward(self, weight):
        return weight + torch.randn_like(weight)


def noisy(layer, x):
    register_parametrization(layer, "weight", Noisy())
    torch.manual_seed(2)
    return layer(x)


OTHER_WAYS = {
    "doubled": lambda layer, x: layer(x) * 2,
    "of something else": lambda layer, x: layer(x.sin()),
    "of one part": lambda layer, x: layer((x * 1).split(2)[0]),
    "strided": lambda layer, x: layer(strided(x) if isinstance(layer, nn.Linear) else 2 * x),
    **{f.__name__: f for f in (noticed, retained, trained, wrapped, of_a_mode, of_a_class, noisy)},
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", OTHER_WAYS)
def test_gradients_take_every_other_way(way, kind):
    """As autograd's do, step by step."""
    found = {}
    for add in (add_branch, plain):
        layer = frozen(kind)
        x, A, B = tensors(2, 4)
        output = OTHER_WAYS[way](layer, x)
        added = add(layer, output, x, A, B, SCALE)
        assert through_base(added)
        (added * torch.linspace(-1, 1, added.numel()).view(added.shape)).sum().backward()
        found[add] = [t.grad for t in (x, A, B, output if way == "retained" else x)]
    tolerance = 3e-2 if way == "of_a_mode" else 1e-5
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_a_weight_that_autocast_has_cast_is_left_to_autograd():
    layer = frozen()
    x, A, B = tensors(2, 4)
    inner = x.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        added = add_branch(layer, layer(inner), inner, A, B, SCALE)
    assert through_base(added)
    added.sum().backward()
    expected = layer.weight.sum(0) + SCALE * (B.sum(0) @ A)
    torch.testing.assert_close(x.grad, expected.expand_as(x).detach(), rtol=3e-2, atol=3e-2)


def test_a_hook_beside_ours_may_have_replaced_the_output():
    layer = frozen()
    x, A, B = tensors(2, 4)
    layer.register_forward_hook(lambda *_: None)  # in the place of ours
    add_branch(layer, replaced(layer, x), x, A, B, SCALE).sum().backward()
    expected = torch.full((2, 4, 6), 5.0) + SCALE * (B.sum(0) @ A)
    torch.testing.assert_close(x.grad, expected)


def test_a_view_made_without_gradients_gets_none():
    layer = frozen()
    x, A, B = tensors(4)
    inner = x * 1
    with torch.no_grad():
        inner = inner.view(4, 6)
    assert inner.requires_grad
    add_branch(layer, layer(inner), inner, A, B, SCALE).sum().backward()
    assert x.grad is None
    assert A.grad.any()


def test_the_right_one_of_several_outputs_gets_the_gradient():
    layer = frozen()
    x, A, B = tensors(2, 8)
    first, second = x.split(4, 1)
    add_branch(layer, layer(second), second, A, B, SCALE).sum().backward()
    expected = layer.weight.sum(0) + SCALE * (B.sum(0) @ A)
    torch.testing.assert_close(x.grad[:, 4:], expected.expand(2, 4, 6).detach())
    assert not x.grad[:, :4].any()
