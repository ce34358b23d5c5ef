"""What every adapter method promises, on every layer type and on whole models.

A new method is one line in ``METHODS``; a new layer type is one line in ``LAYERS``. Tests that
hold for one method only (equations, defaults) live in that method's own test file.
"""

import copy
import io
import math
import pickle
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_adapters import (
    DoRA,
    Gaussian,
    Kaiming,
    LLaMAAdapter,
    LoRA,
    LoRAGA,
    MiLoRA,
    OLoRA,
    PiSSA,
    PrefixTuning,
    attach,
    detach,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from lit_adapters.adapters import Adapter, AdapterSpec
from lit_adapters.initialisers import Initialiser
from lit_adapters.weights import read_weight, write_weight
from tests.models import (
    VOCAB,
    assert_base_again,
    base_bytes,
    batch,
    fingerprint,
    gpt2,
    llama,
    logits,
    shake,
    shape_of,
    snapshot,
    trainable,
)

IN, OUT = 12, 10


class Method(NamedTuple):
    """Settings, and the start they are given if it is not the default."""

    spec: AdapterSpec
    start: Initialiser | None = None


STARTS = {
    "kaiming": None,
    "gaussian": Gaussian(),
    "pissa": PiSSA(),
    "olora": OLoRA(),
    "milora": MiLoRA(),
    "ga": LoRAGA(),
}
# What changes a layer's matrix: tested on every layer type and on whole models.
MATRIX_METHODS = {
    **{f"lora-{name}": Method(LoRA(rank=4, alpha=8), start) for name, start in STARTS.items()},
    **{f"dora-{name}": Method(DoRA(rank=4, alpha=8), start) for name, start in STARTS.items()},
    "lora-rslora": Method(LoRA(rank=4, alpha=8, rslora=True)),
    "lora-rslora-pissa": Method(LoRA(rank=4, alpha=8, rslora=True), PiSSA(niter=None)),
    "lora-dropout": Method(LoRA(rank=4, alpha=8, dropout=0.3)),
    "lora-patterns": Method(
        LoRA(
            rank=4,
            alpha=8,
            rank_pattern={"layer|q_proj|c_attn": 2},
            alpha_pattern={"layer|down_proj|c_proj": 12},
        )
    ),
    "lora-rank-1": Method(LoRA(rank=1, alpha=0.5)),
    "dora-dropout": Method(DoRA(rank=4, alpha=8, dropout=0.3)),
}
# What acts inside attention: tested on whole models.
PROMPT_METHODS = {
    "llama-adapter": Method(LLaMAAdapter(prompt_length=3, top_layers=2)),
    "prefix": Method(PrefixTuning(length=3)),
}
# What is trained beside the method, in other layers: tested on whole models.
SEEN = int(batch()["input_ids"][0, 0])  # a token whose row of the embedding gets a gradient
BESIDE = {
    "lora-whole": Method(LoRA(rank=4, alpha=8, modules_to_save=["1.mlp"]), PiSSA()),
    "lora-bias": Method(LoRA(rank=4, alpha=8, bias="all")),
    "dora-bias": Method(DoRA(rank=4, alpha=8, bias="adapter")),
    "dora-tokens": Method(DoRA(rank=4, alpha=8, new_tokens=[SEEN, 9])),
}
METHODS = {**MATRIX_METHODS, **PROMPT_METHODS, **BESIDE}
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear-no-bias": lambda: nn.Linear(IN, OUT, bias=False),
    "conv1d": lambda: _filled(Conv1D(OUT, IN)),
    "torch-conv1d": lambda: nn.Conv1d(IN, OUT, 3, stride=2, padding=1),
    "torch-conv2d": lambda: nn.Conv2d(IN, OUT, (3, 2), padding="same", padding_mode="circular"),
    "torch-conv2d-groups": lambda: nn.Conv2d(IN, OUT, 3, groups=2, dilation=2, bias=False),
    "embedding": lambda: nn.Embedding(VOCAB, OUT),
    "embedding-padding": lambda: nn.Embedding(VOCAB, OUT, padding_idx=0),
}
MODELS = {"llama": llama, "gpt2": gpt2}
TARGETS = {
    "all-linear": {"llama": "all-linear", "gpt2": "all-linear"},
    "embedding-too": {"llama": ["embed_tokens", "v_proj"], "gpt2": ["wte", "c_attn"]},
}

every_method = pytest.mark.parametrize("method", MATRIX_METHODS)
every_layer = pytest.mark.parametrize("kind", LAYERS)
# Equations of convolutions are in test_convolutions.py.
every_flat_layer = pytest.mark.parametrize(
    "kind", [kind for kind in LAYERS if not kind.startswith("torch-conv")]
)
every_model = pytest.mark.parametrize("family", MODELS)
PAIRS = [
    (f, m)
    for m in METHODS
    for f in MODELS
    if not (m in PROMPT_METHODS and f == "gpt2") and not (m.endswith("bias") and f == "llama")
]
every_model_and_method = pytest.mark.parametrize(("family", "method"), PAIRS)
# A prefix takes part in every softmax, so it cannot start without effect.
every_model_and_quiet_method = pytest.mark.parametrize(
    ("family", "method"), [pair for pair in PAIRS if pair[1] != "prefix"]
)
every_model_and_matrix_method = pytest.mark.parametrize(
    ("family", "method"), [pair for pair in PAIRS if pair[1] not in PROMPT_METHODS]
)
every_target = pytest.mark.parametrize("targets", TARGETS)


class OneLayer(nn.Module):
    """The smallest model with a layer to adapt."""

    def __init__(self, layer: nn.Module, kind: str = "linear"):
        super().__init__()
        self.layer = layer
        self.kind = kind

    @property
    def input_dtype(self):
        return torch.long if self.kind.startswith("embedding") else self.layer.weight.dtype

    def forward(self, x):
        return self.layer(x)


def _filled(layer):
    nn.init.normal_(layer.bias)  # zero by default
    return layer


def one_layer(kind, seed=0):
    torch.manual_seed(seed)
    return OneLayer(LAYERS[kind](), kind).eval()


def inputs(kind, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind.startswith("embedding"):
        return torch.randint(0, VOCAB, (3, 7), generator=generator)
    if kind.startswith("torch-conv"):
        size = (9,) if kind == "torch-conv1d" else (9, 8)
        return torch.randn(3, IN, *size, generator=generator)
    return torch.randn(3, 7, IN, generator=generator)


def adapt(model, method, targets, seed=0):
    """Attach the method, the start included; prompts choose their own targets."""
    spec, start = METHODS[method]
    if method not in PROMPT_METHODS:
        spec = replace(spec, targets=targets)
    names = attach(model, spec, seed=seed)
    if start is not None and isinstance(model, OneLayer):
        data = [{"x": inputs(model.kind).to(model.input_dtype)}]
        initialise(model, start, data, seed, loss=_mean_square)
    elif start is not None:
        initialise(model, start, [batch()], seed)
    return names


def _mean_square(model, data):
    return model(data["x"]).float().square().mean(), torch.tensor(1)


def adapted_layer(kind, method, seed=0, shaken=True):
    model = one_layer(kind)
    adapt(model, method, ["layer"], seed)
    return shake(model) if shaken else model


def adapted_model(family, method, targets="all-linear", seed=0, shaken=True):
    model = MODELS[family]()
    adapt(model, method, TARGETS[targets][family], seed)
    return shake(model, std=0.1) if shaken else model


def adapter_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, Adapter)]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- start: nothing changes


@every_layer
@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_leaves_the_layer_output_to_the_bit(kind, method, dtype, training):
    model = one_layer(kind).to(dtype).train(training)
    x = inputs(kind) if kind.startswith("embedding") else inputs(kind).to(dtype)
    before = model(x)
    adapt(model, method, ["layer"])
    after = model(x)
    assert after.dtype == dtype
    assert torch.equal(after, before)


@every_model_and_quiet_method
@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_leaves_the_model_output_to_the_bit(family, method, targets, dtype):
    model = MODELS[family]().to(dtype)
    before = logits(model)
    names = adapt(model, method, TARGETS[targets][family])
    assert names
    assert_base_again(logits(model), before, model)


@every_layer
@every_method
def test_a_moved_adapter_is_heard(kind, method):
    x = inputs(kind)
    assert not torch.allclose(adapted_layer(kind, method)(x), one_layer(kind)(x), atol=1e-3)


@every_model
@every_target
def test_attach_names_exactly_the_layers_that_carry_an_adapter(family, targets):
    model = MODELS[family]()
    names = attach(model, LoRA(rank=2, targets=TARGETS[targets][family]))
    assert sorted(names) == sorted(n.removesuffix(".adapter") for n in adapter_names(model))
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------- keys, types, frozen base


@every_model_and_method
@every_target
def test_base_keys_types_and_bytes_stay_as_they_were_under_an_adapter(family, method, targets):
    stock = MODELS[family]()
    model = adapted_model(family, method, targets)
    assert base_bytes(model) == base_bytes(stock)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(m) for name, m in stock.named_modules()}.items() <= kinds.items()


@every_model_and_method
@every_target
def test_only_adapter_parameters_are_trainable_and_all_of_them_get_gradients(
    family, method, targets
):
    model = adapted_model(family, method, targets).train()
    model(**batch()).loss.backward()
    adapters = tuple(f"{name}." for name in adapter_names(model))
    for name, parameter in model.named_parameters():
        if name.endswith(("lora_A0", "lora_B0")):
            assert not parameter.requires_grad, name
        elif name.startswith(adapters):
            assert parameter.requires_grad, name
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert not parameter.requires_grad, name
            assert parameter.grad is None, name


@every_model_and_method
@every_target
def test_twenty_adamw_steps_lower_the_loss_and_leave_the_base_bytes(family, method, targets):
    model = adapted_model(family, method, targets, shaken=False)
    before, data = base_bytes(model), batch()
    start = model(**data).loss.item()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        model(**data).loss.backward()
        optimizer.step()
    assert base_bytes(model) == before
    assert model.eval()(**data).loss.item() < 0.9 * start


@every_method
def test_an_optimizer_over_all_parameters_still_leaves_the_base_bytes(method):
    model = adapted_model("llama", method)
    before = base_bytes(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.5)
    model(**batch()).loss.backward()
    optimizer.step()
    assert base_bytes(model) == before


# ---------------------------------------------------------------- LoRA's equation, in plain tensors


@every_flat_layer
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_output_is_the_equation(kind, rslora):
    model = one_layer(kind)
    attach(model, LoRA(rank=4, alpha=6, rslora=rslora, targets=["layer"]))
    shake(model)
    x, layer = inputs(kind), model.layer
    A, B = layer.adapter.lora_A, layer.adapter.lora_B
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    assert layer.adapter.scale == pytest.approx(scale)
    if kind.startswith("embedding"):
        expected = layer.weight[x] + scale * A.T[x] @ B.T
    elif kind == "conv1d":
        expected = x @ (layer.weight + scale * (B @ A).T) + layer.bias
    else:
        expected = F.linear(x, layer.weight + scale * B @ A, layer.bias)
    close(model(x), expected)


@pytest.mark.usefixtures("drawn_alike")
@pytest.mark.parametrize("kind", ["linear", "linear-no-bias", "conv1d"])
def test_dropout_acts_on_the_branch_input_and_only_in_training(kind):
    model = one_layer(kind)
    attach(model, LoRA(rank=3, alpha=3, dropout=0.5, targets=["layer"]))
    shake(model)
    base, x, adapter = one_layer(kind), inputs(kind), model.layer.adapter
    torch.manual_seed(7)
    noisy = model.train()(x)
    torch.manual_seed(7)
    expected = base(x) + F.dropout(x, 0.5) @ adapter.lora_A.T @ adapter.lora_B.T
    close(noisy, expected)
    clean = base(x) + x @ adapter.lora_A.T @ adapter.lora_B.T
    close(model.eval()(x), clean)


def test_dropout_leaves_embeddings_alone():
    model = one_layer("embedding")
    attach(model, LoRA(rank=3, alpha=3, dropout=0.5, targets=["layer"]))
    shake(model)
    x = inputs("embedding")
    assert torch.equal(model.train()(x), model.eval()(x))


@every_layer
def test_the_adapter_follows_its_layers_training_flag(kind):
    model = adapted_layer(kind, "lora-dropout")
    assert not model.layer.adapter.training
    model.train()
    assert model.layer.adapter.training
    model.layer.eval()
    assert not model.layer.adapter.training


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_alpha_zero_gives_the_base_to_the_bit(kind, dtype, training):
    model = one_layer(kind).to(dtype)
    x = inputs(kind) if kind.startswith("embedding") else inputs(kind).to(dtype)
    before = model(x)
    attach(model, LoRA(rank=4, alpha=0, dropout=0.2, targets=["layer"]))
    shake(model).train(training)
    assert torch.equal(model(x), before)


def test_alpha_zero_gives_the_base_model_to_the_bit():
    model = llama().bfloat16()
    before = logits(model)
    attach(model, LoRA(rank=4, alpha=0))
    assert torch.equal(logits(shake(model)), before)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_kaiming_draws_a_uniform_within_one_over_root_in_and_zero_b(kind):
    model = OneLayer(nn.Linear(400, 300) if kind == "linear" else Conv1D(300, 400))
    attach(model, LoRA(rank=64, targets=["layer"]), seed=0)
    for _ in range(2):  # the default at attach, and the initialiser by name
        A, B = model.layer.adapter.lora_A, model.layer.adapter.lora_B
        bound = 1 / math.sqrt(400)
        assert A.shape == (64, 400)
        assert B.shape == (300, 64)
        assert 0.99 * bound < A.abs().max() <= bound * (1 + 1e-6)
        assert A.var().item() == pytest.approx(1 / (3 * 400), rel=0.03)
        assert torch.count_nonzero(B) == 0
        initialise(shake(model), Kaiming())


def test_gaussian_draws_a_with_std_one_over_rank_and_zero_b():
    model = OneLayer(nn.Linear(500, 300))
    attach(model, LoRA(rank=20, targets=["layer"]), seed=0)
    shake(model)
    initialise(model, Gaussian())
    A, B = model.layer.adapter.lora_A, model.layer.adapter.lora_B
    assert A.std().item() == pytest.approx(1 / 20, rel=0.03)
    assert abs(A.mean().item()) < 0.005
    assert A.abs().max() > 2.5 / 20  # normal, not uniform
    assert torch.count_nonzero(B) == 0


@pytest.mark.parametrize("initialiser", [None, Kaiming(), Gaussian()])
def test_embedding_factors_start_with_zero_a_and_normal_b(initialiser):
    model = OneLayer(nn.Embedding(300, 400))
    attach(model, LoRA(rank=32, targets=["layer"]), seed=0)
    if initialiser is not None:
        initialise(shake(model), initialiser)
    A, B = model.layer.adapter.lora_A, model.layer.adapter.lora_B
    assert A.shape == (32, 300)
    assert B.shape == (400, 32)
    assert torch.count_nonzero(A) == 0
    assert B.std().item() > 0
    if initialiser is None:
        assert B.std().item() == pytest.approx(1, rel=0.03)


@every_model
@pytest.mark.parametrize("initialiser", [Kaiming(), Gaussian()])
def test_initialise_restores_the_base_output_and_is_repeatable(family, initialiser):
    model = adapted_model(family, "lora-kaiming", "embedding-too")
    initialise(model, initialiser, seed=3)
    first = trainable(model)
    assert torch.equal(logits(model), logits(MODELS[family]()))
    torch.manual_seed(99)
    initialise(shake(model), initialiser, seed=3)
    assert all(torch.equal(first[name], value) for name, value in trainable(model).items())
    assert base_bytes(model) == base_bytes(MODELS[family]())


# ---------------------------------------------------------------- seeds


def test_the_same_seed_gives_the_same_adapter_whatever_else_drew_or_was_attached():
    few, many = llama(), llama()
    attach(few, LoRA(targets=["v_proj"]), seed=3)
    torch.manual_seed(1234)
    torch.randn(77)
    attach(many, LoRA(targets=["down_proj", "v_proj", "q_proj"]), seed=3)
    wanted, found = trainable(few), trainable(many)
    assert wanted.keys() < found.keys()
    for name, value in wanted.items():
        assert torch.equal(value, found[name]), name


def test_seeds_and_layer_names_give_different_values():
    one, two = llama(), llama()
    attach(one, LoRA(targets=["q_proj", "o_proj"]), seed=3)
    attach(two, LoRA(targets=["q_proj", "o_proj"]), seed=4)
    drawn = [v for model in (one, two) for n, v in trainable(model).items() if "lora_A" in n]
    assert len(drawn) == 8
    assert len({fingerprint(value) for value in drawn}) == 8


def test_seeded_attach_leaves_the_global_random_state():
    model, state = llama(), torch.get_rng_state()
    attach(model, LoRA(targets=["q_proj"]), seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_explicit_seed_makes_initialise_independent_of_the_global_one():
    model = llama()
    attach(model, LoRA(targets=["q_proj"]))
    drawn = []
    for global_seed, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(global_seed)
        initialise(model, Gaussian(), seed=seed)
        drawn.append(trainable(model))
    name = next(name for name in drawn[0] if name.endswith("lora_A"))
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[1][name], drawn[2][name])


def test_default_dtype_and_device_do_not_change_what_is_drawn():
    plain, odd = llama(), llama()
    attach(plain, LoRA(targets=["q_proj", "embed_tokens"]), seed=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            attach(odd, LoRA(targets=["q_proj", "embed_tokens"]), seed=3)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, value in trainable(plain).items():
        found = odd.get_parameter(name)
        assert found.device.type == "cpu", name
        assert found.dtype == torch.float32, name
        assert torch.equal(found, value), name


def test_without_a_seed_the_global_seed_makes_attach_repeatable():
    drawn = []
    for _ in range(2):
        model = llama()
        torch.manual_seed(5)
        attach(model, LoRA(targets=["q_proj"]))
        drawn.append(trainable(model))
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


# ---------------------------------------------------------------- merge and detach


@every_layer
@every_method
def test_merge_keeps_the_layer_output(kind, method):
    model, x = adapted_layer(kind, method), inputs(kind)
    before = model(x)
    assert merge(model) is model
    close(model(x), before)


@every_model_and_matrix_method
def test_merge_keeps_the_model_output(family, method):
    model = adapted_model(family, method)
    before = logits(model)
    close(logits(merge(model)), before)


def test_merge_keeps_the_output_of_an_adapted_embedding():
    model = llama()
    attach(model, LoRA(rank=4, targets=["embed_tokens", "v_proj", "lm_head"]))
    before = logits(shake(model, std=0.1))
    close(logits(merge(model)), before)


@every_layer
@every_method
@pytest.mark.parametrize("finish", [merge, detach])
def test_a_layer_is_stock_after_merge_and_detach(kind, method, finish):
    model = finish(adapted_layer(kind, method))
    assert shape_of(model) == shape_of(one_layer(kind))


@every_model_and_matrix_method
def test_a_model_is_stock_after_merge(family, method):
    model = adapted_model(family, method)
    model(**batch()).loss.backward()
    assert merge(model) is model
    assert shape_of(model) == shape_of(MODELS[family]())
    assert adapter_names(model) == []


@every_model_and_method
def test_a_model_is_stock_after_detach(family, method):
    model = adapted_model(family, method)
    model(**batch()).loss.backward()
    assert detach(model) is model
    assert shape_of(model) == shape_of(MODELS[family]())
    assert adapter_names(model) == []


@pytest.mark.parametrize("method", PROMPT_METHODS)
def test_prompts_cannot_be_merged_and_the_model_keeps_them(method):
    model = adapted_model("llama", method)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot be merged.*adapter folder"):
        merge(model)
    assert snapshot(model) == before


@every_model_and_method
@every_target
def test_detach_gives_back_the_base_to_the_bit(family, method, targets):
    stock, model = MODELS[family](), adapted_model(family, method, targets)
    detach(model)
    assert base_bytes(model) == base_bytes(stock)
    assert torch.equal(logits(model), logits(stock))


@every_method
def test_a_model_can_be_adapted_again_after_merge_and_detach(method):
    model = adapted_model("llama", method)
    merge(model)
    before = logits(model)
    adapt(model, method, ["q_proj", "up_proj"])
    assert torch.equal(logits(model), before)
    shake(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    detach(model)
    assert torch.equal(logits(model), before)


def test_merge_adds_in_fp32_and_rounds_once():
    model = OneLayer(nn.Linear(64, 48)).bfloat16()
    W = model.layer.weight.detach().clone()
    attach(model, LoRA(rank=4, alpha=6, targets=["layer"]))
    shake(model)
    A, B = (p.detach().clone() for p in (model.layer.adapter.lora_A, model.layer.adapter.lora_B))
    exact = W.double() + 1.5 * B.double() @ A.double()
    merge(model)
    assert model.layer.weight.dtype == torch.bfloat16
    wrong = (model.layer.weight != exact.to(torch.bfloat16)).double().mean().item()
    assert wrong < 0.005  # ties only; rounding the product first gives a fifth


def test_the_merged_model_saves_and_loads_as_a_stock_checkpoint(tmp_path):
    model = adapted_model("llama", "lora-kaiming")
    before = logits(model)
    merge(model).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, local_files_only=True).eval()
    close(logits(loaded), before)


# ---------------------------------------------------------------- copies


@every_layer
@every_method
def test_state_dict_round_trip_is_strict_and_exact(kind, method):
    source, target = adapted_layer(kind, method), adapted_layer(kind, method, seed=8, shaken=False)
    x = inputs(kind)
    assert not torch.equal(target(x), source(x))
    target.load_state_dict(source.state_dict(), strict=True)
    assert torch.equal(target(x), source(x))


@every_layer
@every_method
def test_a_deep_copy_carries_an_adapter_of_its_own(kind, method):
    model, x = adapted_layer(kind, method), inputs(kind)
    before = model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), before)
    shake(twin, seed=5)
    assert not torch.allclose(twin(x), before, atol=1e-3)
    assert torch.equal(model(x), before)
    detach(twin)
    assert torch.equal(model(x), before)


def _pickled(model):
    return pickle.loads(pickle.dumps(model))


def _torch_saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_model_and_method
@pytest.mark.parametrize("clone", [_pickled, _torch_saved, copy.deepcopy])
def test_a_whole_model_survives_copying_with_its_adapter_alive(family, method, clone):
    model = adapted_model(family, method)
    before = logits(model)
    twin = clone(model)
    assert torch.equal(logits(twin), before)
    assert not torch.allclose(logits(shake(twin, seed=5)), before, atol=1e-3)
    assert torch.equal(logits(model), before)
    assert shape_of(detach(twin)) == shape_of(MODELS[family]())


# ---------------------------------------------------------------- training, folders, resuming


def _trained(model, steps=20, optimizer=None):
    model.train()
    masters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(masters, lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)  # dropout
        model(**batch()).loss.backward()
        optimizer.step()
    model.eval()
    return optimizer


@every_model_and_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_twenty_steps_a_folder_gives_the_same_on_a_fresh_base(
    family, method, dtype, tmp_path
):
    model = MODELS[family]().to(dtype)
    adapt(model, method, TARGETS["embedding-too"][family])
    before = base_bytes(model)
    _trained(model)
    assert base_bytes(model) == before
    save_adapter(model, tmp_path)
    torch.manual_seed(12345)  # no start may be drawn or decomposed again
    fresh = MODELS[family]().to(dtype)
    load_adapter(fresh, tmp_path)
    close(logits(fresh), logits(model))
    assert not torch.allclose(logits(fresh), logits(MODELS[family]().to(dtype)), atol=1e-2)
    for name, value in trainable(model).items():
        # PEFT keeps a prefix's keys rotated, and a rotation there and back rounds.
        close(fresh.get_parameter(name), value, 1e-6 if method == "prefix" else 0.0)


@every_model_and_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_resumes_to_the_bit_from_a_file_read_with_weights_only(
    family, method, dtype, tmp_path
):
    whole = MODELS[family]().to(dtype)
    adapt(whole, method, TARGETS["embedding-too"][family])
    optimizer = _trained(whole, 3)
    torch.save((whole.state_dict(), optimizer.state_dict()), tmp_path / "file.pt")
    _trained(whole, 3, optimizer)

    spec = METHODS[method].spec
    if method not in PROMPT_METHODS:
        spec = replace(spec, targets=TARGETS["embedding-too"][family])
    resumed = MODELS[family]().to(dtype)
    attach(resumed, spec, seed=99)  # without its start: the file knows where that was
    state, moments = torch.load(tmp_path / "file.pt", weights_only=True)
    resumed.load_state_dict(state, strict=True)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=0.01)
    optimizer.load_state_dict(moments)
    _trained(resumed, 3, optimizer)
    assert torch.equal(logits(resumed), logits(whole))


# ---------------------------------------------------------------- torch.compile, checkpointing


def _gradients(model, run):
    model.zero_grad()
    run().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _same_gradients(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


@every_layer
@pytest.mark.parametrize("method", ["lora-kaiming", "lora-dropout", "lora-pissa", "dora-kaiming"])
def test_a_layer_compiles_without_graph_breaks(kind, method):
    torch.compiler.reset()
    model, x = adapted_layer(kind, method), inputs(kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(x), model(x))
    _same_gradients(
        _gradients(model, lambda: compiled(x).square().mean()),
        _gradients(model, lambda: model(x).square().mean()),
    )


@every_model
def test_a_model_compiles_without_graph_breaks(family):
    torch.compiler.reset()
    model = adapted_model(family, "lora-kaiming", "embedding-too").train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    data = {"input_ids": batch()["input_ids"], "labels": batch()["labels"], "use_cache": False}
    _same_gradients(
        _gradients(model, lambda: compiled(**data).loss),
        _gradients(model, lambda: model(**data).loss),
    )


def _checkpoint(model):
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # the other name goes in transformers 6
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


@every_model_and_method
@every_target
def test_gradient_checkpointing_gives_the_same_gradients(family, method, targets):
    model = adapted_model(family, method, targets).train()

    def run():
        torch.manual_seed(3)  # the same dropout masks
        return model(**batch(), use_cache=False).loss

    expected = _gradients(model, run)
    _checkpoint(model)
    _same_gradients(_gradients(model, run), expected, 1e-6)


@every_model_and_method
@every_target
def test_cached_greedy_generation_equals_uncached(family, method, targets):
    model = adapted_model(family, method, targets)
    prompt = batch(rows=1, length=9, seed=4)["input_ids"][:, :6]
    generate = partial(
        model.generate,
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
    )
    cached, uncached = generate(use_cache=True), generate(use_cache=False)
    assert cached.shape == (1, 14)
    assert torch.equal(cached, uncached)


# ---------------------------------------------------------------- precision

CASTS = {
    "bfloat16()": lambda model: model.bfloat16(),
    "half()": lambda model: model.half(),
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "to(device, dtype)": lambda model: model.to("cpu", torch.bfloat16),
    "there and back": lambda model: model.bfloat16().float(),
}


@every_model_and_method
@pytest.mark.parametrize("cast", CASTS)
def test_casting_the_model_keeps_adapter_masters_in_fp32_to_the_bit(family, method, cast):
    model = adapted_model(family, method, "embedding-too")
    before, objects = trainable(model), dict(model.named_parameters())
    CASTS[cast](model)
    for name, value in before.items():
        parameter = model.get_parameter(name)
        assert parameter is objects[name], name  # an optimizer made earlier still steps it
        assert parameter.dtype == torch.float32, name
        assert parameter.requires_grad, name
        assert torch.equal(parameter, value), name
    if cast != "there and back":
        adapters = tuple(f"{name}." for name in adapter_names(model))
        base = [p for name, p in model.named_parameters() if not name.startswith(adapters)]
        assert all(p.dtype in (torch.bfloat16, torch.float16) for p in base)


@every_layer
def test_casting_while_moving_to_another_device_moves_but_keeps_fp32(kind):
    model = adapted_layer(kind, "lora-kaiming").to("meta", torch.bfloat16)
    assert model.layer.weight.dtype == torch.bfloat16
    for parameter in model.layer.adapter.parameters():
        assert parameter.device.type == "meta"
        assert parameter.dtype == torch.float32


@every_model_and_method
@every_target
def test_attach_to_a_bf16_base_makes_fp32_adapters_that_train(family, method, targets):
    model = MODELS[family]().bfloat16()
    adapt(model, method, TARGETS[targets][family])
    before = base_bytes(model)
    masters = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in masters)
    start = model(**batch()).loss.item()
    optimizer = torch.optim.AdamW(masters, lr=0.02)
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
    assert model(**batch()).loss.item() < start
    assert logits(model).dtype == torch.bfloat16
    assert base_bytes(model) == before


@every_flat_layer
@pytest.mark.parametrize("method", ["lora-kaiming", "lora-rslora", "lora-dropout", "lora-patterns"])
def test_on_a_bf16_base_the_branch_is_computed_in_fp32_and_cast_once(kind, method):
    model, base = adapted_layer(kind, method).bfloat16(), one_layer(kind).bfloat16()
    x = inputs(kind) if kind.startswith("embedding") else inputs(kind).bfloat16()
    adapter = model.layer.adapter
    if kind.startswith("embedding"):
        branch = adapter.lora_A.T[x] @ adapter.lora_B.T
    else:
        branch = x.float() @ adapter.lora_A.T @ adapter.lora_B.T
    found, expected = model(x), base(x) + (adapter.scale * branch).bfloat16()
    assert found.dtype == torch.bfloat16
    wrong = (found != expected).float().mean().item()
    assert wrong < 0.02  # a tie rounded the other way; bf16 products differ in a third


@every_model_and_quiet_method
def test_bf16_autocast_on_an_fp32_base_starts_at_the_base_and_trains_fp32_masters(family, method):
    stock, model = MODELS[family](), adapted_model(family, method, shaken=False)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = logits(stock), logits(model)
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        loss = shake(model, std=0.05).train()(**batch()).loss
    loss.backward()
    assert torch.isfinite(loss)
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad.dtype == torch.float32
            assert torch.isfinite(parameter.grad).all()


@every_flat_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_layers_input(kind, dtype):
    if kind.startswith("embedding"):
        pytest.skip("token ids have no gradient")
    model = adapted_layer(kind, "lora-kaiming").to(dtype)
    x = inputs(kind).to(dtype).requires_grad_()
    model(x).float().sum().backward()
    adapter, weight = model.layer.adapter, model.layer.weight.float()
    weight = weight.T if kind == "conv1d" else weight  # (out, in)
    effective = weight + adapter.scale * adapter.lora_B @ adapter.lora_A
    expected = effective.sum(0).expand_as(x)
    close(x.grad.float(), expected, 1e-5 if dtype == torch.float32 else 3e-2)


def test_the_padding_token_of_an_embedding_is_not_trained():
    model = one_layer("embedding-padding")
    attach(model, LoRA(rank=3, targets=["layer"]))
    model(torch.tensor([[0, 5, 0, 9]])).sum().backward()
    touched = model.layer.adapter.lora_A.grad.abs().sum(0).nonzero().flatten()
    assert touched.tolist() == [5, 9]


# ---------------------------------------------------------------- weights: dense fp32 (out, in)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_read_weight_is_dense_fp32_out_by_in(kind, dtype):
    layer = one_layer(kind).to(dtype).layer
    stored = layer.weight.detach().float()
    expected = stored.flatten(1) if kind.startswith(("linear", "torch")) else stored.T
    found = read_weight(layer)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert not found.requires_grad


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_weight_writes_in_place_in_the_layers_dtype(kind, dtype):
    layer = one_layer(kind).to(dtype).layer
    parameter, wanted = layer.weight, torch.randn(read_weight(layer).shape)
    write_weight(layer, wanted)
    assert layer.weight is parameter  # a tied partner sees the write
    assert layer.weight.dtype == dtype
    assert layer.weight.is_contiguous()
    assert torch.equal(read_weight(layer), wanted.to(dtype).float())


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding"])
@pytest.mark.parametrize("shape", [(3, 3), (1, 1)])
def test_write_weight_refuses_another_shape_and_leaves_the_layer(kind, shape):
    layer = one_layer(kind).layer
    before = fingerprint(layer.weight)
    with pytest.raises((ValueError, RuntimeError)):  # (1, 1) would fit by broadcasting
        write_weight(layer, torch.zeros(shape))
    assert fingerprint(layer.weight) == before


def test_a_layer_type_without_a_reader_is_refused_by_name():
    with pytest.raises((TypeError, NotImplementedError), match="LayerNorm"):
        read_weight(nn.LayerNorm(4))
    with pytest.raises((TypeError, NotImplementedError), match="LayerNorm"):
        write_weight(nn.LayerNorm(4), torch.zeros(4, 4))
