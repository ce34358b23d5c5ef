"""Linear layers whose weight gradient arrives projected, against the gradient that torch forms."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

import lit_adapters.callbacks  # noqa: F401 - says what a projected layer computes
from lit_adapters.model_loss import obstacle
from lit_adapters.optim import SHADOW, GaLoreEngine, Projection
from lit_adapters.optim.projected_linear import ProjectedLinear, divert, restore
from lit_adapters.optim.projection import Projector, project, projected_shape, sides
from lit_adapters.weights import foreign_forward

every_side = pytest.mark.parametrize("side", ["left", "right", "full"])
ROWS, COLUMNS, RANK = 20, 12, 3


def basis(rows, rank, dtype):
    return torch.linalg.qr(torch.randn(rows, rank, dtype=dtype)).Q


def made(side, bias=True, dtype=torch.float64):
    """A diverted layer, its stock copy, and a list whose last entry is the present subspace."""
    torch.manual_seed(0)
    stock = nn.Linear(COLUMNS, ROWS, bias=bias, dtype=dtype)
    layer = copy.deepcopy(stock)
    left, right = sides((ROWS, COLUMNS), side)
    P = Projector(
        basis(ROWS, RANK, dtype) if left else None,
        basis(COLUMNS, RANK, dtype).T if right else None,
    )
    shadow = nn.Parameter(torch.zeros(projected_shape((ROWS, COLUMNS), RANK, side), dtype=dtype))
    layer.register_parameter(SHADOW, shadow)
    present = [P]
    divert(layer, RANK, lambda: present[-1])
    return layer, stock, shadow, present


@every_side
@pytest.mark.parametrize("shape", [(), (5,), (2, 0), (2, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_those_of_the_layer_and_the_weight_s_is_projected(
    side, shape, bias
):
    layer, stock, shadow, (P,) = made(side, bias)
    x = torch.randn(*shape, COLUMNS, dtype=torch.float64)
    inputs = [x.clone().requires_grad_() for _ in "ab"]
    for module, given in zip((layer, stock), inputs, strict=True):
        y = module(given)
        assert y.shape == (*shape, ROWS)
        F.relu(y, inplace=True).square().sum().backward()
        F.softplus(module(given)).sum().backward()  # accumulates
    assert layer.weight.grad is None
    torch.testing.assert_close(shadow.grad, project(stock.weight.grad, P))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, stock.bias.grad)


def test_a_subspace_that_is_not_there_in_the_backward_pass_leaves_the_gradient_whole():
    layer, stock, shadow, present = made("right")
    x = torch.randn(5, COLUMNS, dtype=torch.float64)
    for at_forward, at_backward in [(True, False), (False, True), (False, False)]:
        layer.zero_grad()
        present.append(present[0] if at_forward else None)
        y = layer(x)
        present.append(present[0] if at_backward else None)
        y.square().sum().backward()
        stock.zero_grad()
        stock(x).square().sum().backward()
        torch.testing.assert_close(layer.weight.grad, stock.weight.grad)
        assert shadow.grad is None


def test_autograd_grad_gives_the_projected_gradient_and_refuses_the_whole_one():
    layer, stock, shadow, (P,) = made("right")
    x = torch.randn(5, COLUMNS, dtype=torch.float64)
    (whole,) = torch.autograd.grad(stock(x).square().sum(), stock.weight)
    (projected,) = torch.autograd.grad(layer(x).square().sum(), shadow)
    torch.testing.assert_close(projected, project(whole, P))
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(layer(x).square().sum(), layer.weight)


@every_side
def test_under_autocast_it_is_as_near_as_the_gradient_in_bf16(side):
    layer, stock, shadow, (P,) = made(side, dtype=torch.float32)
    x = torch.randn(64, COLUMNS)
    F.softplus(stock(x)).sum().backward()
    exact = project(stock.weight.grad, P)
    stock.zero_grad()
    for module in (layer, stock):
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.softplus(module(x)).float().sum()
        loss.backward()
    rounded = project(stock.weight.grad, P)
    assert shadow.grad.dtype == torch.float32
    assert (shadow.grad - exact).norm() <= 0.01 * exact.norm()
    assert (shadow.grad - exact).norm() <= 2 * (rounded - exact).norm()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_it_gives_the_same(reentrant):
    found = []
    for recomputes in (False, True):
        layer, _, shadow, _ = made("left")
        x = torch.randn(5, COLUMNS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if recomputes else layer(x)
        y.square().sum().backward()
        found.append((shadow.grad, x.grad, layer.weight.grad))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_can_be_differentiated_twice():
    """As penalties on the gradient of inputs are."""
    layer, stock, shadow, (P,) = made("right")
    for module in (layer, stock):
        x = torch.ones(5, COLUMNS, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(F.softplus(module(x)).sum(), x, create_graph=True)
        slope.square().sum().backward()
    expected = project(stock.weight.grad, P)
    direct = project(layer.weight.grad, P)  # what the slope has by the weight itself comes whole
    assert min(shadow.grad.norm(), direct.norm()) > 0.1
    torch.testing.assert_close(shadow.grad + direct, expected)


@every_side
def test_no_tensor_as_large_as_the_weight_is_made(side):
    layer, stock, _, _ = made(side)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found = op(*args, **(kwargs or {}))
            if isinstance(found, torch.Tensor) and found._base is None:
                self.most = max(self.most, found.numel())
            return found

    peaks = []
    for module in (layer, stock):
        loss = module(torch.randn(2, COLUMNS, dtype=torch.float64)).square().sum()
        with Largest() as largest:
            loss.backward()
        peaks.append(largest.most)
    assert peaks[0] < ROWS * COLUMNS <= peaks[1]


class Blocks(nn.Sequential):
    def __init__(self, count):
        torch.manual_seed(0)
        super().__init__(*(nn.Linear(COLUMNS, COLUMNS) for _ in range(count)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_layers_get_gradients_whole_and_the_engine_projects_them():
    """One compilation serves all layers of a kind: of those whose input needs a gradient or not."""
    compiled, grads = [], []

    def backend(graph, example_inputs):
        compiled.append(graph)
        return graph.forward

    for compiles in (False, True):
        model = Blocks(5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        engine = GaLoreEngine(dict(model.named_children()), optimizer, Projection(RANK), seed=0)
        for layer in model if compiles else ():
            layer.compile(backend=backend)
        for seed in (1, 2, 3):
            optimizer.zero_grad()
            x = torch.randn(5, COLUMNS, generator=torch.Generator().manual_seed(seed))
            model(x).square().sum().backward()
            optimizer.step()
        assert [one.steps for one in engine.projected.values()] == [3] * 5
        grads.append([one.shadow.grad for one in engine.projected.values()])
    torch.testing.assert_close(*grads)
    assert len(compiled) == 2
    torch._dynamo.reset()


def test_what_computes_something_else_or_would_not_gain_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    changed = nn.Linear(8, 8)
    changed.forward = lambda x: x
    others = [Scaled(8, 8), changed, nn.Embedding(8, 8)]
    for layer, rank in [*((other, 2) for other in others), (nn.Linear(8, 8), 5)]:
        before, kind = dict(layer.__dict__), type(layer)
        divert(layer, rank, lambda: None)
        assert (type(layer), layer.__dict__) == (kind, before)
        restore(layer)
        assert (type(layer), layer.__dict__) == (kind, before)


def test_a_projected_head_is_a_plain_one_to_the_loss_and_to_whoever_names_layers():
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    GaLoreEngine({"lm_head": model.lm_head}, optimizer, Projection(2), seed=0)
    assert type(model.lm_head) is ProjectedLinear
    assert foreign_forward(model.lm_head) is None
    assert obstacle(model) is None


def test_the_engine_diverts_and_restores():
    model = Blocks(2)
    model[1].requires_grad_(False)
    before = [dict(layer.__dict__) for layer in model]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine = GaLoreEngine({"0": model[0]}, optimizer, Projection(2), seed=0)
    for _ in "ab":
        optimizer.zero_grad()
        model(torch.randn(3, COLUMNS)).sum().backward()
        assert model[0].get_parameter(SHADOW).grad is not None
        optimizer.step()
    with torch.no_grad():
        assert not model(torch.randn(3, COLUMNS)).requires_grad
    assert [type(layer) for layer in model] == [ProjectedLinear, nn.Linear]
    engine.remove()
    assert [type(layer) for layer in model] == [nn.Linear] * 2
    assert [layer.__dict__.keys() for layer in model] == [b.keys() for b in before]
