"""Gradients of frozen weights: against autograd on an ordinary model, and what is left behind."""

import random
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lit_adapters import LoRA, LoRAGA, attach, gradient_factors, initialise
from lit_adapters.adapters import Adapted
from lit_adapters.attachment import adapted_layers, bypassed
from lit_adapters.gradients import each_gradient, mean_loss
from lit_adapters.initialisers import Factored
from lit_adapters.weights import as_matrix
from tests import models

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
WIDE = {"llama": LoRA(rank=2, targets=["q_proj", "down_proj", "embed_tokens", "lm_head"])}


def adapted_model(kind="llama", spec=None, **changes):
    model = models.BUILDERS[kind](**changes)
    attach(model, spec or LoRA(rank=2, targets=TARGETS.get(kind, "all-linear")))
    models.shake(model)  # adapters that are no no-op: they must be bypassed
    return model


def batches(count, rows=2):
    """Batches of different length, so of different numbers of tokens."""
    return [models.batch(rows=rows, length=6 + 3 * n, seed=n) for n in range(count)]


def whole(gradient):
    return gradient.dense() if isinstance(gradient, Factored) else gradient.clone()


@pytest.fixture(params=["whole", "factored"])
def form(request, monkeypatch):
    """Options of `each_gradient`; factored, whatever is smaller: layers of tests are tiny."""
    monkeypatch.setattr(gradient_factors, "is_smaller", lambda *_: True)
    return {"factored": request.param == "factored"}


def gradients(model, data, **options):
    found = {}
    each_gradient(
        model,
        list(adapted_layers(model)),
        data,
        lambda one, gradient: found.__setitem__(one.name, whole(gradient)),
        **options,
    )
    return found


def reference(model, data):
    """Of summed loss over summed tokens, by plain autograd on the base alone."""
    layers = [(name, layer) for name, layer, _ in adapted_layers(model)]
    weights = [layer.weight for _, layer in layers]
    for *_, adapter in adapted_layers(model):
        adapter.active = False
    for weight in weights:
        weight.requires_grad_(True)
    tokens = [(one["labels"][:, 1:] != -100).sum() for one in data]
    losses = [model(**one).loss * n for one, n in zip(data, tokens, strict=True)]
    found = torch.autograd.grad(sum(losses) / sum(tokens), weights)
    for *_, adapter in adapted_layers(model):
        adapter.active = True
    for weight in weights:
        weight.requires_grad_(False)
    return {n: as_matrix(m, g) for (n, m), g in zip(layers, found, strict=True)}


def assert_close(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        distance = (found[name] - gradient).norm() / gradient.norm()
        assert distance < tolerance, (name, distance)


# --- the right numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma"])
def test_the_average_is_the_gradient_of_all_tokens_together(kind, count, form):
    model = adapted_model(kind)
    data = batches(count)
    assert_close(gradients(model, data, **form), reference(model, data))


def test_batches_weigh_by_their_trained_tokens():
    model, data = adapted_model(), batches(2)
    plain = [gradients(model, [one]) for one in data]
    unweighted = {name: (plain[0][name] + plain[1][name]) / 2 for name in plain[0]}
    with pytest.raises(AssertionError):
        assert_close(unweighted, gradients(model, data), 1e-2)


def test_a_batch_counts_the_same_however_it_is_cut():
    model = adapted_model("qwen2")
    whole = models.batch(rows=6, length=11)
    parts = [{k: v[:1] for k, v in whole.items()}, {k: v[1:] for k, v in whole.items()}]
    assert_close(gradients(model, parts), gradients(model, [whole]))


# Fp32 sums take 4096 bytes for q and o (32 x 32), 2048 for k and v (16 x 32), 6144 for gate, up and
# down (32 x 48): 30,720 a layer, in two layers. 20,000 bytes hold q k v o gate; then up, down and
# the next layer's q and k (18,432, and v would be 480 too much); then v o gate up; then down.
@pytest.mark.parametrize(("budget", "groups"), [(1, 14), (20_000, 4), (10**9, 1)])
def test_a_byte_budget_changes_the_passes_and_not_the_result(budget, groups):
    model, data = adapted_model(), batches(3)
    passes = []

    def counted(model, batch):
        passes.append([id(one) for one in data].index(id(batch)))
        return mean_loss(model, batch)

    limited = gradients(model, data, loss=counted, gradient_bytes=budget)
    assert_close(limited, gradients(model, data), 1e-6)
    assert passes == [0, 1, 2] * groups


def test_a_tied_weight_gets_the_gradient_of_its_own_use():
    spec = LoRA(rank=2, targets=["embed_tokens"])
    tied = adapted_model("llama-tied", spec)
    untied = models.llama()
    untied.load_state_dict(
        {k: v for k, v in models.llama_tied().state_dict().items()}, strict=False
    )
    untied.lm_head.weight.data.copy_(untied.model.embed_tokens.weight)
    attach(untied, spec)
    data = batches(1)
    assert_close(gradients(tied, data), reference(untied, data))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


@pytest.mark.parametrize("count", [1, 2])
def test_embeddings_and_heads_are_layers_like_others(count, form):
    model, data = adapted_model("llama", WIDE["llama"]), batches(count)
    assert_close(gradients(model, data, **form), reference(model, data))


def test_a_sparse_gradient_is_a_gradient():
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3))
    attach(model, LoRA(rank=1, targets=["0", "1"]))
    ids = torch.tensor([[1, 2, 2]])
    loss = lambda model, ids: (model(ids).square().mean(), torch.tensor(1))  # noqa: E731
    found = gradients(model, [ids], loss=loss)
    model[0].sparse = False
    assert_close(found, gradients(model, [ids], loss=loss), 1e-7)


@pytest.mark.parametrize("count", [1, 2])
def test_bf16_bases_give_fp32_gradients(count, form):
    exact, rounded = adapted_model(), adapted_model().bfloat16()
    data = batches(count)
    found = gradients(rounded, data, **form)
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    assert_close(found, gradients(exact, data), 0.1)


def test_batches_without_trained_tokens_are_left_out():
    model, data = adapted_model(), batches(2)
    silent = {**data[0], "labels": torch.full_like(data[0]["labels"], -100)}
    expected = gradients(model, data)
    assert_close(gradients(model, [silent, *data, silent]), expected, 1e-6)

    def undefined(model, batch):  # a mean over nothing
        mean, tokens = mean_loss(model, batch)
        return (mean if tokens else sum(p.sum() for p in model.parameters()) * torch.nan), tokens

    assert_close(gradients(model, [silent, *data], loss=undefined), expected, 1e-6)


# --- dropout, checkpointing, repetition --------------------------------------------------------


def dropping(kind="gpt2"):
    rates = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    return adapted_model("gpt2", **rates).train()


@pytest.mark.parametrize("count", [1, 2])
def test_dropout_is_off_and_results_repeat(count, form):
    data = batches(count)
    found = gradients(dropping(), data, **form)
    assert_close(found, gradients(adapted_model("gpt2"), data), 1e-6)
    torch.manual_seed(99)
    again = gradients(dropping(), data, **form)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_and_gives_the_same(reentrant, form):
    data = batches(1)
    expected = gradients(adapted_model("llama"), data)
    model = adapted_model("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda *_: calls.append(block.training))
    assert_close(gradients(model, data, **form), expected, 1e-6)
    assert calls == [False, False]  # once forward, once again in the backward pass
    assert model.model.layers[0].training


def test_checkpointed_layers_do_not_drop_by_their_own_flag(form):
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=models.VOCAB, hidden_size=16, ffn_dim=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, dropout=0.5, word_embed_proj_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(config)
    attach(model, LoRA(rank=2))
    data = batches(1)
    expected = gradients(model.eval(), data)
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert_close(gradients(model, data, **form), expected, 1e-6)


class Twice(nn.Module):
    """One layer in two reentrant checkpoints: autograd delivers its gradient in two parts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.other = nn.Linear(6, 6)

    def forward(self, x):
        for _ in range(2):
            x = checkpoint(self.layer, x, use_reentrant=True)
        return self.other(x)


def test_a_gradient_in_two_parts_is_summed(form):
    model = Twice()
    attach(model, LoRA(rank=2, targets=["layer", "other"]))
    x = torch.randn(3, 6, requires_grad=True)
    loss = lambda model, x: (model(x).square().mean(), torch.tensor(1))  # noqa: E731
    found = gradients(model, [x], loss=loss, **form)
    model.layer.weight.requires_grad_(True)
    model(x).square().mean().backward()
    assert_close({"layer": found["layer"]}, {"layer": model.layer.weight.grad}, 1e-6)


class Reader(nn.Module):
    """Calls a layer once, and multiplies by its weight once more."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return nn.functional.linear(self.layer(input=x), self.layer.weight)


def test_a_weight_that_is_read_as_well_gets_the_gradient_of_both_uses(form):
    model, x = Reader(), torch.randn(3, 6)
    attach(model, LoRA(rank=2, targets=["layer"]))
    found = gradients(model, [x], loss=deep_loss, **form)
    weight = model.layer.weight.detach().requires_grad_()
    (weight @ (x @ weight.T + model.layer.bias).T).square().mean().backward()
    assert_close(found, {"layer": weight.grad}, 1e-6)


class Halves(nn.Module):
    """Calls a layer on two parts of its input, one of which does not matter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return torch.cat([self.layer(x[:2]), 0 * self.layer(x[2:])])


@pytest.mark.parametrize(("most", "kind"), [(1, torch.Tensor), (3, torch.Tensor), (5, Factored)])
def test_a_layer_that_is_called_twice_is_started_from_the_sum(most, kind, monkeypatch):
    monkeypatch.setattr(gradient_factors, "is_smaller", lambda tokens, _: tokens <= most)
    model, x = Halves(), torch.randn(5, 6)
    attach(model, LoRA(rank=2, targets=["layer"]))
    found = []
    each_gradient(
        model, list(adapted_layers(model)), [x], lambda _, g: found.append(g), deep_loss,
        factored=True,
    )  # fmt: skip
    output = model.layer(x[:2])
    assert [type(gradient) for gradient in found] == [kind]
    assert_close({"": whole(found[0])}, {"": 2 * output.T @ x[:2] / 30}, 1e-6)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 2, 3, 6), (3, 0, 6)])
def test_inputs_of_any_number_of_dimensions(shape, form):
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    attach(model, LoRA(rank=2, targets=["0", "2"]))
    x = torch.randn(shape)
    loss = lambda model, x: (model(x).square().sum(), torch.tensor(1))  # noqa: E731
    found = gradients(model, [x], loss=loss, **form)
    expected = {n: model[int(n)].weight.requires_grad_() for n in ("0", "2")}
    loss(model, x)[0].backward()
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight.grad, atol=1e-6)


def changes_input(layer):
    layer.register_forward_pre_hook(lambda layer, args: (2 * args[0],))


def changes_output(layer):
    layer.register_forward_hook(lambda layer, args, output: 2 * output)


def masks_weight(layer):
    kept = []

    def put(layer, args):
        kept.append(layer.weight)
        layer._parameters["weight"] = layer.weight * torch.eye(6)

    def restore(layer, args, output):
        layer._parameters["weight"] = kept.pop()

    layer.register_forward_pre_hook(put)
    layer.register_forward_hook(restore)


def fetches_weight(layer):
    value = 2 * layer.weight.detach()
    layer.register_forward_pre_hook(lambda layer, args: setattr(layer.weight, "data", value))


def computes_otherwise(layer):
    layer.forward = lambda x: nn.functional.linear(x.relu(), layer.weight)


@pytest.mark.parametrize(
    "change", [changes_input, changes_output, masks_weight, fetches_weight, computes_otherwise]
)
def test_what_others_did_to_a_layer_is_differentiated_too(change, form):
    model, x = Deep(depth=2, width=6), torch.randn(3, 6)
    attach(model, LoRA(rank=2, targets=["layers.0", "layers.1"]))
    change(model.layers[0])
    found = gradients(model, [x], loss=deep_loss, **form)
    weights = {f"layers.{n}": layer.weight for n, layer in enumerate(model.layers)}
    for weight in weights.values():
        weight.requires_grad_(True)
    with bypassed(model):
        deep_loss(model, x)[0].backward()
    assert_close(found, {name: weight.grad for name, weight in weights.items()}, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_is_formed_only_where_factors_would_take_more_room(dtype):
    model, shapes = Deep().to(dtype), []
    attach(model, LoRA(rank=2, targets=[f"layers.{n}" for n in range(6)]))

    def consume(one, gradient):
        shapes.append(gradient.left.shape if isinstance(gradient, Factored) else gradient.shape)

    adapted = list(adapted_layers(model))
    for tokens in (18, 19):  # of 37 columns each: 2 * 18 * 37 < 37 * 37 < 2 * 19 * 37
        data, formed = [torch.randn(tokens, 37).to(dtype)], tokens == 19 and dtype != torch.float32
        with Living(37 * 37, [layer.weight for layer in model.layers]) as mode:
            each_gradient(model, adapted, data, consume, deep_loss, factored=True)
        assert bool(mode.most) == formed
        assert shapes[-6:] == [(37 if formed else tokens, 37)] * 6


def test_neither_an_output_nor_an_input_is_copied(monkeypatch):
    monkeypatch.setattr(gradient_factors, "is_smaller", lambda *_: True)
    model = nn.Sequential(nn.Linear(4, 90), nn.Tanh(), nn.Linear(90, 4))
    attach(model, LoRA(rank=2, targets=["0", "2"]))
    inputs, makers, found = [], [], {}
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0].data_ptr()))
        layer.register_forward_hook(lambda layer, args, out: makers.append(out.grad_fn.name()))
    consume = lambda one, gradient: found.__setitem__(one.name, gradient)  # noqa: E731
    data = [torch.randn(3, 4)]
    each_gradient(model, list(adapted_layers(model)), data, consume, deep_loss, factored=True)
    assert makers == ["_WatchedBackward"] * 2  # no clone
    assert [found[name].right.data_ptr() for name in "02"] == inputs


def test_a_start_that_knows_no_factors_is_given_whole_gradients(monkeypatch):
    monkeypatch.setattr(gradient_factors, "is_smaller", lambda *_: True)

    class Mine(LoRAGA):
        reads_gradient = True

        def __call__(self, weight, *rest, gradient, **more):
            assert gradient.shape == weight.shape
            return super().__call__(weight, *rest, gradient=gradient + 0, **more)

    model = adapted_model()
    assert len(initialise(model, Mine(), batches(1))) == 14


# --- memory ------------------------------------------------------------------------------------


class Living(TorchDispatchMode):
    """Counts the memories of ``size`` elements that were computed and are alive at once."""

    def __init__(self, size, known):
        super().__init__()
        self.size, self.known = size, {t.untyped_storage().data_ptr() for t in known}
        self.tensors, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() == self.size:
                self.tensors.append(ref(leaf))  # lives as long as autograd holds the tensor, too
        alive = {
            tensor.untyped_storage().data_ptr()  # views of one memory are one
            for tensor in (living() for living in self.tensors)
            if tensor is not None
        }
        self.most = max(self.most, len(alive - self.known))
        return result


class Deep(nn.Module):
    def __init__(self, depth=6, width=37):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def living(run):
    """The most gradients alive at once while ``run`` works on an adapted model."""
    model = Deep()
    attach(model, LoRA(rank=2, targets=[f"layers.{n}" for n in range(6)]))
    with Living(37 * 37, [layer.weight for layer in model.layers]) as mode:
        run(model)
    return mode.most


def deep_loss(model, x):
    return model(x).square().mean(), torch.tensor(1)


def test_one_batch_never_holds_two_gradients():
    x = torch.randn(5, 37)

    def estimate(model, data):
        each_gradient(model, list(adapted_layers(model)), data, lambda *_: None, deep_loss)

    def train(model):
        model.requires_grad_(True)
        deep_loss(model, x)[0].backward()

    assert living(lambda model: estimate(model, [x])) == 1
    assert living(lambda model: estimate(model, [x, x])) >= 6  # sums in host memory
    assert living(train) == 6  # the measure sees what autograd alone holds


def test_a_consumed_gradient_is_gone_before_the_next(form):
    model, alive, most = adapted_model(), [], []

    def consume(one, gradient):
        alive.append(ref(gradient))
        most.append(sum(r() is not None for r in alive))
        assert all(layer.weight.grad is None for _, layer, _ in adapted_layers(model))

    each_gradient(model, list(adapted_layers(model)), batches(1), consume, **form)
    assert max(most) == 1
    assert len(most) == 14


# --- nothing is left behind --------------------------------------------------------------------


def traces(model):
    with bypassed(model):
        pass  # leaves a flag on each adapter
    return {
        **models.snapshot(model),
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in named(model)},
        "cache": model.config.use_cache,
        "functions": [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()],
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "python": random.getstate(),
    }


def named(model):
    return model.named_parameters(remove_duplicate=False)


def same(before, after):
    assert before.keys() == after.keys()
    for key in before.keys() - {"grads"}:
        assert before[key] == after[key], key
    for name, grad in before["grads"].items():
        other = after["grads"][name]
        assert (grad is None) == (other is None), name
        assert grad is None or torch.equal(grad, other), name


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_the_model_and_the_random_state_are_as_before(fails, checkpointing, count, form):
    model = dropping()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.transformer.ln_f.eval()  # modes that differ
    model.transformer.ln_f.weight.requires_grad_(True)  # trained beside the adapters
    model(**models.batch()).loss.backward()

    def loss(model, batch):
        torch.rand(3), np.random.rand(), random.random()
        mean, tokens = mean_loss(model, batch)
        if fails:
            raise ZeroDivisionError
        return mean, tokens

    before = traces(model)
    try:
        gradients(model, batches(count), loss=loss, **form)
    except ZeroDivisionError:
        assert fails
    same(before, traces(model))


def test_a_forward_that_fails_leaves_the_base_whole(form):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(7, 6))
    attach(model, LoRA(rank=2, targets=["0", "1"]))
    weight, hooks = model[1].weight, dict(model[1]._forward_hooks)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        gradients(model, [torch.ones(3, 6)], loss=deep_loss, **form)
    assert model[1].weight is weight
    assert not weight.requires_grad
    assert (dict(model[1]._forward_hooks), len(model[1]._forward_pre_hooks)) == (hooks, 0)


def test_a_consumer_that_fails_leaves_the_base_whole(form):
    model = adapted_model()
    before = traces(model)

    def consume(one, gradient):
        raise KeyError(one.name)

    with pytest.raises(KeyError):
        each_gradient(model, list(adapted_layers(model)), batches(1), consume, **form)
    same(before, traces(model))


def test_it_works_where_gradients_are_switched_off(form):
    model, data = adapted_model(), batches(1)
    expected = gradients(model, data)
    for switched_off in (torch.no_grad, torch.inference_mode):
        with switched_off():
            assert_close(gradients(model, data, **form), expected, 1e-6)


def test_a_compiled_model_is_run_as_it_is(form):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model, x = Deep(depth=2, width=6), torch.randn(3, 6)
    attach(model, LoRA(rank=2, targets=["layers.0", "layers.1"]))
    expected = gradients(model, [x], loss=deep_loss)
    model.compile(backend=backend)
    assert_close(gradients(model, [x], loss=deep_loss, **form), expected, 1e-6)
    assert not graphs
    model(x)
    assert graphs  # the stance is as it was


# --- refusals ----------------------------------------------------------------------------------


def test_no_batches_are_refused():
    with pytest.raises(ValueError, match="no batches"):
        gradients(adapted_model(), [])


def test_labels_are_asked_for():
    batch = models.batch()
    del batch["labels"]
    with pytest.raises(ValueError, match=r"'labels', got \['attention_mask', 'input_ids'\]"):
        gradients(adapted_model(), [batch])
    with pytest.raises(ValueError, match="'labels', got Tensor"):
        gradients(adapted_model(), [batch["input_ids"]])


@pytest.mark.parametrize("count", [1, 2])
def test_batches_that_train_nothing_are_refused(count):
    silent = models.batch()
    silent["labels"][:] = -100
    silent["labels"][:, 0] = 5  # predicted from nothing
    with pytest.raises(ValueError, match="train no token"):
        gradients(adapted_model(), [silent] * count)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("reduce", [None, lambda sums: sums], ids=["one device", "ranks"])
def test_a_layer_without_gradient_is_named(count, reduce):
    model = models.llama()
    model.spare = nn.Linear(4, 4)
    attach(model, LoRA(rank=2, targets=["q_proj", "spare"]))
    with pytest.raises(ValueError, match="no gradient reached 1 of 3 .*'spare'.*exclude"):
        gradients(model, batches(count), reduce=reduce)


def test_a_loss_without_graph_names_a_layer():
    model = adapted_model()
    loss = lambda model, batch: (torch.tensor(1.0), torch.tensor(3))  # noqa: E731
    with pytest.raises(ValueError, match="no gradient reached 14 of 14"):
        gradients(model, batches(1), loss=loss)


def packed(layer):
    """As 4-bit storage looks: bytes of another shape."""
    layer.weight = nn.Parameter(torch.zeros(18, 1, dtype=torch.uint8), requires_grad=False)


def packed_as_float(layer):
    layer.weight = nn.Parameter(torch.zeros(9, 1, dtype=torch.bfloat16), requires_grad=False)


def quantised(layer):
    """As 8-bit storage looks."""
    layer.weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)


def on_meta(layer):
    layer.weight = nn.Parameter(torch.zeros(6, 6, device="meta"))


@pytest.mark.parametrize("store", [packed, packed_as_float, quantised, on_meta])
def test_a_weight_that_cannot_be_differentiated_is_named(store):
    layer = nn.Linear(6, 6)
    store(layer)
    one = Adapted("block.proj", layer, SimpleNamespace())
    with pytest.raises(TypeError, match=r"'block.proj' \(Linear\).*no gradient; estimate on a flo"):
        each_gradient(nn.Sequential(layer), [one], [None], print)


def test_initialise_names_the_layer_and_asks_for_batches():
    model = adapted_model()
    with pytest.raises(ValueError, match="LoRAGA reads gradients; pass real training batches"):
        initialise(model, LoRAGA())
    with pytest.raises(ValueError, match="no batches"):
        initialise(model, LoRAGA(), iter(()))
    zero = lambda model, b: (0 * model(**b).loss, torch.tensor(1))  # noqa: E731
    with pytest.raises(ValueError, match=r"model\.layers\.\d\..*_proj: LoRAGA got a gradient that"):
        initialise(model, LoRAGA(), batches(1), loss=zero)
