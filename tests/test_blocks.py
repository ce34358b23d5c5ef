"""Lean blocks compute what stock ones do, keep less, and stand aside where somebody looks."""

import copy
import pickle
from contextlib import nullcontext
from io import BytesIO

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from lit_adapters import AdapterFineTuneModule, DoRA, FullFineTuning, LoRA, attach, detach, merge
from lit_adapters.blocks import make_lean, make_stock
from lit_adapters.estimate import Rehearsal, Training, estimate
from lit_adapters.recompute import recompute_activations
from tests.models import batch, gemma, gpt2, llama, mistral, qwen2, shake

SPECS = {
    "lora": LoRA(rank=4),
    "dropout": LoRA(rank=4, dropout=0.3),
    "dora": DoRA(rank=4),
    "attention only": LoRA(rank=4, targets=["q_proj", "o_proj"]),
    "down only": LoRA(rank=4, targets=["down_proj"]),
    "full": FullFineTuning(),
}


def adapted(spec=SPECS["lora"], build=llama, dtype=torch.float32):
    model = build().to(dtype)
    attach(model, spec)
    return shake(model).train()


def gradients(model, context=nullcontext):
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    with context():
        loss = model(**batch(), use_cache=False).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def assert_near(found, expected, most):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= most * value.norm(), name


def swapped(model):
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_the_mlps_and_norms_of_llama_and_its_relatives_are_of_known_form():
    norms = [f"model.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")]
    mlps = [f"model.layers.{i}.mlp" for i in (0, 1)]
    for build in (llama, mistral, qwen2):
        assert sorted(make_lean(build())) == sorted([*norms, *mlps, "model.norm"])
    assert make_lean(gemma()) == mlps  # its norm adds 1 to its weight
    assert make_lean(gpt2()) == []


@pytest.mark.parametrize("build", [llama, qwen2, gemma])
@pytest.mark.parametrize("spec", SPECS)
def test_losses_are_the_same_to_the_bit_and_gradients_to_rounding(spec, build):
    stock = adapted(SPECS[spec], build)
    lean = copy.deepcopy(stock)
    assert make_lean(lean)
    expected, found = gradients(stock), gradients(lean)
    assert torch.equal(found["loss"], expected["loss"])
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_rounded_in_the_same_places(autocast):
    def context():
        return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()

    stock = adapted(dtype=torch.float32 if autocast else torch.bfloat16)
    lean = copy.deepcopy(stock)
    make_lean(lean)
    expected, found = gradients(stock, context), gradients(lean, context)
    assert torch.equal(found["loss"], expected["loss"])
    assert_near(found, expected, 2e-2)


def mlp(act="silu"):
    torch.manual_seed(0)
    config = llama(hidden_act=act).config
    made = LlamaMLP(config)
    attach(made, LoRA(rank=2, targets=["gate_proj", "up_proj", "down_proj"]))
    return shake(made)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gradients_of_an_mlp_are_autograds_to_the_bit(act):
    stock = mlp(act)
    lean = copy.deepcopy(stock)
    assert make_lean(lean) == [""]
    given = {}
    for model in (stock, lean):
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = model(x)
        out.sin().sum().backward()
        given[model] = [out, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert len(given[lean]) == 8
    assert all(torch.equal(a, b) for a, b in zip(given[stock], given[lean], strict=True))


def norm(size=16, dtype=torch.float32):
    made = LlamaRMSNorm(size).to(dtype).requires_grad_(False)
    with torch.no_grad():
        made.weight.copy_(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_gradients_of_a_norm_are_those_of_float64(size):
    made = norm()
    generator = torch.Generator().manual_seed(0)
    x = (size * torch.randn(2, 3, 16, generator=generator)).requires_grad_()
    slope = torch.randn(2, 3, 16, generator=generator)
    make_lean(made)
    made(x).backward(slope)
    exact = x.detach().double().requires_grad_()
    root = (exact.square().mean(-1, keepdim=True) + made.variance_epsilon).sqrt()
    (made.weight.double() * exact / root).backward(slope.double())
    assert (x.grad - exact.grad).norm() < 1e-6 * exact.grad.norm()


def kept(model):
    """Bytes of distinct memory, parameters aside, that the backward pass of a model waits for."""
    held = []
    embedded = torch.randn(2, 20, 32, dtype=next(model.parameters()).dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        model(inputs_embeds=embedded * 1, use_cache=False).logits.sum()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(size for place, size in storages.items() if place not in own)


@pytest.mark.parametrize(("spec", "fewer"), [("lora", 2), ("attention only", 2), ("full", 1)])
def test_of_a_gated_mlp_only_the_halves_are_kept(spec, fewer):
    """Of the activation, its product and the halves; a trained last layer keeps its input."""
    model = adapted(SPECS[spec])
    before = kept(model)
    for layer in model.model.layers:
        make_lean(layer.mlp)
    wide = 40 * model.config.intermediate_size * 4
    stock = 4 if spec != "attention only" else 3  # a frozen last layer keeps no input
    saved = (before - kept(model)) / wide / model.config.num_hidden_layers
    assert saved == fewer - (4 - stock)


def test_a_norm_in_bf16_keeps_its_input_and_not_that_in_fp32():
    model = adapted(dtype=torch.bfloat16)
    before = kept(model)
    norms = [model.model.norm, *(layer.input_layernorm for layer in model.model.layers)]
    assert all(make_lean(one) for one in norms)
    assert before - kept(model) == len(norms) * 40 * 32 * (4 - 2)


def test_an_estimate_of_memory_knows_what_is_kept(tmp_path):
    llama().save_pretrained(tmp_path)
    most = {}
    for lean in (False, True):
        module = AdapterFineTuneModule(str(tmp_path), LoRA(rank=2), lean_blocks=lean)
        most[lean] = estimate(Rehearsal(Training(module, 4, 32))).largest["activations"]
    assert most[True] < 0.85 * most[False]


def first_mlp(model):
    return model.model.layers[0].mlp


def noticed(seen):
    def notice(module, args, output):
        seen.append(type(module).__name__)

    return notice


def test_hooks_of_every_child_are_called():
    model, seen = adapted(), []
    make_lean(model)
    for child in first_mlp(model).children():
        child.register_forward_hook(noticed(seen))
    gradients(model)
    assert sorted(seen) == ["Linear", "Linear", "Linear", "SiLUActivation"]


def test_a_product_that_is_written_to_before_its_use_gives_gradients_of_what_was_used():
    found = {}
    for lean in (False, True):
        model = adapted()
        first_mlp(model).down_proj.register_forward_pre_hook(written)
        if lean:
            make_lean(model)
        found[lean] = gradients(model)
    assert_near(found[True], found[False], 1e-5)


def doubled(module, args):
    return (2 * args[0],)


def written(module, args):
    args[0].mul_(2)


OTHERS = {
    "an activation of its own": lambda mlp: setattr(mlp, "act_fn", nn.Softplus()),
    "a function": lambda mlp: (delattr(mlp, "act_fn"), setattr(mlp, "act_fn", F.silu)),
    "a hooked activation": lambda mlp: mlp.act_fn.register_forward_hook(lambda *_: None),
    "a changed input": lambda mlp: mlp.act_fn.register_forward_pre_hook(doubled),
    "a hook for gradients": lambda mlp: mlp.act_fn.register_full_backward_hook(lambda *_: None),
    "a changed gradient": lambda mlp: mlp.act_fn.register_full_backward_pre_hook(doubled),
    "in place": lambda mlp: setattr(mlp, "act_fn", nn.SiLU(inplace=True)),
    "wrapped": lambda mlp: setattr(mlp.act_fn, "forward", F.softplus),
    "of several functions": lambda mlp: setattr(mlp, "act_fn", ACT2FN["gelu_python_tanh"]),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("other", OTHERS)
def test_other_activations_are_computed_by_autograd(other, when):
    found = {}
    for lean in (False, True):
        model = mlp()
        if lean and when == "after":
            make_lean(model)
        OTHERS[other](model)
        if lean and when == "before":
            make_lean(model)
        x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = model(x)
        assert "GatedProduct" not in str(nodes(out.grad_fn))
        out.sin().sum().backward()
        found[lean] = x.grad
    assert torch.equal(found[True], found[False])


def nodes(node):
    """All of a graph, by depth."""
    return [] if node is None else [node, *(n for f, _ in node.next_functions for n in nodes(f))]


def test_an_activation_given_later_is_trained():
    model = mlp()
    make_lean(model)
    model.act_fn = nn.PReLU()
    model(torch.randn(2, 32)).sum().backward()
    assert model.act_fn.weight.grad.any()


def test_hooks_of_every_module_are_called():
    model, seen = mlp(), []
    make_lean(model)
    handle = nn.modules.module.register_module_forward_hook(noticed(seen))
    try:
        model(torch.randn(2, 32))
    finally:
        handle.remove()
    assert "SiLUActivation" in seen


def test_whoever_keeps_the_product_may_save_it():
    model, inputs, file = mlp(), [], BytesIO()
    make_lean(model)
    model.down_proj.register_forward_pre_hook(lambda layer, args: inputs.extend(args))
    model(torch.randn(2, 32))
    torch.save(inputs, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)[0], inputs[0])


def test_the_input_of_a_norm_may_be_named():
    made = norm()
    x = torch.randn(2, 16, requires_grad=True)
    expected = made(hidden_states=x)
    make_lean(made)
    assert torch.equal(made(hidden_states=x), expected)


def test_a_symbolic_trace_is_of_the_stock_computation():
    model, x = nn.Sequential(norm(32), mlp()), torch.randn(2, 32)
    make_lean(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


class Sparse(LlamaMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).relu() * self.up_proj(x))


def test_code_of_its_own_stays():
    model = llama()
    other = Sparse(model.config)
    replaced = LlamaMLP(model.config)
    replaced.forward = lambda x: x
    assert make_lean(nn.ModuleList([other, replaced])) == []


def test_a_trained_norm_has_its_gradient():
    model = adapted()
    model.model.norm.weight.requires_grad_(True)
    expected = gradients(model)
    make_lean(model)
    found = gradients(model)
    assert "model.norm.weight" in found
    assert_near(found, expected, 1e-5)


@pytest.mark.parametrize("form", ["mlp", "norm"])
def test_second_derivatives_are_exact(form):
    torch.manual_seed(0)
    if form == "mlp":
        model = mlp().double()
        x = torch.randn(1, 2, 32, dtype=torch.float64, requires_grad=True)
    else:  # it computes in fp32, whatever it is given
        model, x = norm(4), torch.randn(2, 4, requires_grad=True)
    found = []
    for lean in (False, True):
        if lean:
            make_lean(model)
        (slope,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        found.append(torch.autograd.grad(slope.square().sum(), wanted))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_hook_for_gradients_is_called_once_where_there_are_second_derivatives():
    model = mlp()
    model.gate_proj.register_forward_hook(lambda *args: args[2].register_hook(tripled) and None)
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = []
    for lean in (False, True):
        if lean:
            make_lean(model)
        found.append(torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)[0])
    torch.testing.assert_close(*found)


def tripled(slope):
    return 3 * slope


@pytest.mark.parametrize("form", ["mlp", "norm"])
def test_gradients_of_many_sums_may_be_asked_for_at_once(form):
    model, x = mlp() if form == "mlp" else norm(32), torch.randn(2, 32, requires_grad=True)
    make_lean(model)
    out = model(x).flatten()

    def gradient(slope, **more):
        return torch.autograd.grad(out, x, slope, retain_graph=True, **more)[0]

    many = torch.randn(5, len(out))
    each = torch.stack([gradient(slope) for slope in many])
    for at_once in (gradient(many, is_grads_batched=True), torch.func.vmap(gradient)(many)):
        assert (at_once - each).norm() < 1e-5 * each.norm()


def test_transforms_of_functions_see_the_stock_computation():
    model = adapted()
    expected = gradients(model)
    make_lean(model)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        more = {"labels": batch()["labels"], "use_cache": False}
        inputs = (batch()["input_ids"],)
        return torch.func.functional_call(model, values, inputs, more).loss

    for name, value in torch.func.grad(loss)(trained).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_recomputed_layers_compute_the_same():
    model = adapted(SPECS["dropout"])
    expected = gradients(model)
    make_lean(model)
    recompute_activations(model)
    assert_near(gradients(model), expected, 1e-5)


@pytest.mark.parametrize("undo", [make_stock, merge, detach])
def test_a_stock_model_is_left(undo):
    model = adapted()
    make_lean(model)
    assert swapped(model)
    undo(model)
    assert not swapped(model)


def test_what_somebody_has_wrapped_around_stays():
    model = adapted()
    make_lean(model)
    mine = first_mlp(model)
    inner = mine.forward
    mine.forward = lambda x: inner(x)
    make_stock(model)
    assert swapped(model) == ["model.layers.0.mlp"]
    assert torch.isfinite(model(**batch()).loss)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_computes_with_its_own_weights(again):
    model = adapted()
    make_lean(model)
    before = gradients(model)
    other = again(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    found = gradients(other)
    assert all(torch.equal(found[name], value) for name, value in before.items())


def test_evaluation_is_the_same_to_the_bit():
    model = adapted().eval()
    with torch.no_grad():
        expected = model(**batch()).logits
        make_lean(model)
        assert torch.equal(model(**batch()).logits, expected)


@pytest.mark.parametrize(
    ("settings", "lean"),
    [({}, True), ({"lean_blocks": False}, False), ({"compile": "eager"}, False)],
)
def test_the_module_makes_its_model_lean_unless_told_not_to(settings, lean):
    model = llama()
    for given in ({}, settings):  # the second time it is passed in as the first has left it
        module = AdapterFineTuneModule(model, **given)
        module.configure_model()
    assert ("model.layers.0.mlp" in swapped(module.model)) == lean


def test_a_lean_model_passed_in_is_stock_again_if_that_is_asked_for():
    module = AdapterFineTuneModule(llama())
    module.configure_model()
    AdapterFineTuneModule(module.model, lean_blocks=False).configure_model()
    assert not swapped(module.model)


def test_every_listed_activation_is_one_of_transformers():
    """And none of them draws random numbers or has parameters."""
    for name in ("silu", "swish", "gelu", "gelu_pytorch_tanh"):
        model = mlp(name)
        assert make_lean(model) == [""], name
    assert isinstance(ACT2FN["silu"], SiLUActivation)
    for name in ("linear", "relu2", "xielu"):
        assert make_lean(mlp(name)) == [], name
