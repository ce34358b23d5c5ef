"""An adapter overwrites what its layer returned, and never what somebody else has."""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from lit_adapters import DoRA, LoRA, attach
from tests.models import llama, shake

LAYERS = {
    "linear": lambda: nn.Linear(6, 5, bias=False),
    "with a bias": lambda: nn.Linear(6, 5),
    "Conv1D": lambda: Conv1D(5, 6),
}


def adapted(layer, spec=LoRA):
    model = nn.Sequential(layer).requires_grad_(False)
    attach(model, spec(rank=2, targets=["0"]))
    return shake(model)


def given(*shape):
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(0))


def expected(layer, x):
    """By the weight, in float64."""
    own = layer.adapter
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
    merged = weight.double() + own.scale * own.lora_B.double() @ own.lora_A.double()
    bias = 0 if layer.bias is None else layer.bias.double()
    return (x.double() @ merged.T + bias).float()


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_that_nobody_has_is_overwritten(kind, shape, context):
    model = adapted(LAYERS[kind]())
    places = []

    def run(forward, x):
        output = forward(x)
        places.append(output.data_ptr())
        return output

    forward = model[0].forward
    model[0].forward = lambda x: run(forward, x)
    with context():
        x = given(*shape)
        out = model(x)
    assert out.data_ptr() == places[0]
    torch.testing.assert_close(out.clone(), expected(model[0], x), rtol=1e-5, atol=1e-5)


# --- who may have it -----------------------------------------------------------------------------


@contextmanager
def hooked(layer, kept, keep=lambda output: output, once=False):
    def hook(module, args, output):
        kept.append(keep(output))
        if once:
            handle.remove()

    handle = layer.register_forward_hook(hook, prepend=True)
    yield
    handle.remove()


@contextmanager
def watched(layer, kept):
    handle = register_module_forward_hook(
        lambda module, args, output: kept.append(output) if module is layer else None
    )
    yield
    handle.remove()


@contextmanager
def replaced(layer, kept):
    linear = F.linear

    def keeping(*args):
        kept.append(linear(*args))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "linear", keeping)
        yield


@contextmanager
def functions(layer, kept):
    class Keeping(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            if function is F.linear and not kept:
                kept.append(found)
            return found

    with Keeping():
        yield


@contextmanager
def operators(layer, kept):
    class Keeping(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            found = operator(*args, **(kwargs or {}))
            if operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and not kept:
                kept.append(found)
            return found

    with Keeping():
        yield


HOLDERS = {
    "a hook": hooked,
    "a hook that takes itself away": partial(hooked, once=True),
    "a hook that keeps a view": partial(hooked, keep=lambda output: output.detach()),
    "a hook on all modules": watched,
    "another linear": replaced,
    "a function mode": functions,
    "an operator mode": operators,
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("holder", HOLDERS)
def test_what_somebody_else_has_stays_as_it_was(holder, bias):
    model, kept = adapted(nn.Linear(6, 5, bias=bias)), []
    x = given(3)
    alone = model[0].forward(x)
    with HOLDERS[holder](model[0], kept):
        out = model(x)
    assert torch.equal(kept[0], alone)
    torch.testing.assert_close(out, expected(model[0], x), rtol=1e-5, atol=1e-5)


class Squashing(nn.Linear):
    """Its backward pass needs what it returned."""

    def forward(self, x):
        return super().forward(x).tanh()


@pytest.mark.parametrize("spec", [LoRA, DoRA])
def test_a_backward_pass_that_needs_the_output_has_it(spec):
    from lit_adapters.weights import matrix_shape

    matrix_shape.register(Squashing, matrix_shape.dispatch(nn.Linear))
    model = adapted(Squashing(6, 5), spec)
    x = given(3).requires_grad_()
    model(x).sum().backward()
    assert x.grad.isfinite().all()


def test_selective_checkpointing_that_keeps_products_recomputes_the_same():
    model, x = adapted(nn.Linear(6, 5, bias=False)), given(2, 4).requires_grad_()
    keeping = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])

    def block(x):
        return model(x).sin()

    wanted = [x, model[0].adapter.lora_A, model[0].adapter.lora_B]
    expected = torch.autograd.grad(block(x).sum(), wanted)
    again = checkpoint(block, x, use_reentrant=False, context_fn=keeping)
    for one, other in zip(torch.autograd.grad(again.sum(), wanted), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_hook_that_is_gone_when_a_layer_is_recomputed_changes_nothing():
    model, x = adapted(nn.Linear(6, 5, bias=False)), given(2, 4).requires_grad_()
    expected = torch.autograd.grad(model(x).sin().sum(), x)
    with hooked(model[0], []):
        out = checkpoint(lambda x: model(x).sin(), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x), expected)


def test_every_layer_of_a_model_is_written_in_place(monkeypatch):
    model = llama()
    attach(model, LoRA(rank=4, targets="all-linear"))
    copies = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda *args, **kwargs: copies.append(args))
    model.train()(torch.arange(12).view(2, 6)).logits.sum().backward()
    assert not copies
