"""The product with ``B`` is added in place where nobody can tell, elsewhere beside the output."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from lit_adapters import LoRA, attach
from lit_adapters.attachment import adapted_layers
from lit_adapters.weights import add_scaled
from tests.models import llama, shake

SCALE = 1.5
LAYERS = {
    "linear": lambda: nn.Linear(6, 5, bias=False),
    "with a bias": lambda: nn.Linear(6, 5),
    "Conv1D": lambda: Conv1D(5, 6),
}


class Squashing(nn.Linear):
    """Its backward pass needs what it returned."""

    def forward(self, x):
        return super().forward(x).tanh()


def tensors(*shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, 6, generator=generator, requires_grad=True)
    hidden = torch.randn(*shape, 3, generator=generator, requires_grad=True)
    B = torch.randn(5, 3, generator=generator, requires_grad=True)
    return x, hidden, B


def plain(layer, output, hidden, B, scale):
    return output + scale * hidden @ B.T


def run(add, layer, dtype, shape=(2, 4), autocast=False):
    """What comes out of an adapted layer, and the gradients of what went in."""
    given = [t.detach().to(dtype).requires_grad_() for t in tensors(*shape)]
    x, hidden, B = given
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = add(layer, layer(x), hidden.to(torch.bfloat16) if autocast else hidden, B, SCALE)
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


def added_to(layer, x):
    """What the layer returned, as it was and as it is, and the sum."""
    _, hidden, B = tensors(*x.shape[:-1])
    output = layer(x)
    before = output.detach().clone()
    return before, output, add_scaled(layer, output, hidden, B, SCALE)


def overwritten(layer, x=None):
    before, output, added = added_to(layer, tensors(2, 4)[0] if x is None else x)
    is_same = added.data_ptr() == output.data_ptr()
    assert is_same != torch.equal(output.detach(), before)
    return is_same


@pytest.mark.parametrize("kind", LAYERS)
def test_the_sum_stands_in_the_output_of_a_layer(kind):
    layer = LAYERS[kind]().requires_grad_(False)
    assert overwritten(layer)
    with torch.no_grad():
        assert overwritten(layer)


def hooked(layer):
    layer.register_forward_hook(lambda *_: None)
    layer.register_forward_hook(lambda *_: None)  # either may be the one that calls adapters


def patched(layer):
    forward = layer.forward
    layer.forward = lambda x: forward(x)


@pytest.mark.parametrize("change", [hooked, patched])
def test_an_output_that_somebody_may_have_kept_is_left_alone(change):
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    change(layer)
    assert not overwritten(layer)


def test_a_hook_on_all_modules_counts():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    layer.register_forward_hook(lambda *_: None)
    assert overwritten(layer)
    handle = register_module_forward_hook(lambda *_: None)
    try:
        assert not overwritten(layer)
    finally:
        handle.remove()


def test_a_layer_whose_gradient_needs_its_output_keeps_it():
    layer = Squashing(6, 5, bias=False).requires_grad_(False)
    assert not overwritten(layer)
    found = run(add_scaled, layer, torch.float32)
    for one, truth in zip(found, run(plain, layer.double(), torch.float64), strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-5, atol=1e-6)


def test_rows_that_do_not_follow_each_other_are_left_alone():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    x, hidden, B = tensors(2, 4)
    output = layer(x).transpose(0, 1)
    added = add_scaled(layer, output, hidden.transpose(0, 1), B, SCALE)
    torch.testing.assert_close(added, output + SCALE * hidden.transpose(0, 1) @ B.T)


def test_second_derivatives_are_exact():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False).double()

    def out(x, hidden, B):
        return add_scaled(layer, layer(x), hidden, B, SCALE).sin()

    given = tuple(t.detach().double().requires_grad_() for t in tensors(2, 2))
    assert torch.autograd.gradcheck(out, given)
    assert torch.autograd.gradgradcheck(out, given)


def test_selective_checkpointing_that_keeps_products_recomputes_the_same():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)
    keeping = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def checkpointed(layer, x, *others):
        def block(x, *others):
            return add_scaled(layer, layer(x), *others).sin()

        return checkpoint(block, x, *others, use_reentrant=False, context_fn=keeping)

    def plainly(layer, x, *others):
        return plain(layer, layer(x), *others).sin()

    given = tensors(2, 4)
    found, expected = (
        torch.autograd.grad(block(layer, *given, SCALE).sum(), given)
        for block in (checkpointed, plainly)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_transforms_of_functions_are_those_of_the_plain_sum():
    layer = nn.Linear(6, 5, bias=False).requires_grad_(False)

    def gradients(add):
        def loss(x, hidden, B):
            return add(layer, layer(x), hidden, B, SCALE).square().sum()

        each = torch.func.vmap(torch.func.grad(loss, (0, 1, 2)), (0, 0, None))
        return each(*(t.detach() for t in tensors(3, 4)))

    for one, other in zip(gradients(add_scaled), gradients(plain), strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_whose_layers_are_watched_computes_the_same_and_shows_what_the_layers_returned():
    model = llama().requires_grad_(False)
    ids = torch.arange(12).view(2, 6)
    returned = {}

    def watch(name):
        return lambda _module, _args, output: returned.update({name: output})

    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    layer.register_forward_hook(watch("layer"))
    attach(model, LoRA(rank=4))
    shake(model)
    watched = model(ids).logits
    assert torch.equal(
        returned["layer"],
        layer.forward(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))),
    )
    adapted = sum(1 for _ in adapted_layers(model))
    assert adapted > 1
    del layer._forward_hooks[next(iter(layer._forward_hooks))]
    torch.testing.assert_close(model(ids).logits, watched)
