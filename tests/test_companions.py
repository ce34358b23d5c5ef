"""What LoRA and DoRA train beside their factors: whole modules, biases, rows of new tokens.

With ``alpha=0`` the factors do nothing, so a model with companions must train exactly as a stock
model in which torch trains the same parameters in place; that model is the reference.
"""

import copy
import io
import json
import pickle
import re
import warnings
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_adapters import (
    DoRA,
    LoRA,
    OLoRA,
    PiSSA,
    attach,
    check_adapters_fire,
    detach,
    export_merged,
    initialise,
    load_adapter,
    merge,
    save_adapter,
)
from lit_adapters.attachment import bypassed
from lit_adapters.base_model import load_base, load_tokenizer
from lit_adapters.generation import generate
from lit_adapters.io import peft_config
from lit_adapters.weights import branch
from tests.models import (
    assert_base_again,
    base_bytes,
    batch,
    fingerprint,
    gemma,
    gpt2,
    llama,
    llama_tied,
    logits,
    qwen2,
    shake,
    shape_of,
    snapshot,
    trainable,
)
from tests.reference import close

WEIGHTS = "adapter_model.safetensors"
IDS = batch()["input_ids"]
TOKENS = [int(IDS[0, 3]), 71, int(IDS[1, 1])]  # two of the batch, one that only the head sees

MEANING = re.compile(r"(.*)\.(trained_copy\.own|new_rows)\.(.*)")
TIED = {"lm_head", "model.embed_tokens", "transformer.wte"}


class Block(nn.Module):
    """A nested module with a norm over channels."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 6)
        self.conv = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x))


class Images(nn.Module):
    """Convolutions with biases and each kind of norm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.block = Block()
        self.last = nn.LayerNorm(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.block(self.norm(torch.relu(self.stem(x))))
        return self.head(self.last(x.mean((2, 3))))


def images():
    torch.manual_seed(0)
    model = Images()
    for name, parameter in model.named_parameters():
        if "norm" in name or "last" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


def pixels(seed=0, dtype=torch.float32):
    return torch.randn(5, 3, 7, 6, generator=torch.Generator().manual_seed(seed)).to(dtype)


def output(model, seed=0):
    if hasattr(model, "config"):
        return logits(model, seed)
    with torch.no_grad():
        return model.eval()(pixels(seed, next(model.parameters()).dtype))


def loss_of(model, seed=0):
    if hasattr(model, "config"):
        return model(**batch(seed=seed)).loss
    return model(pixels(seed)).square().mean()


@dataclass
class Case:
    """A model and companions, and the stock parameters that they stand for."""

    build: object
    settings: dict
    trained: list[str]  # of a stock model, or patterns of their names
    method: type = LoRA
    targets: list[str] = field(default_factory=list)

    @property
    def is_language_model(self):
        return self.build is not images

    def spec(self, **changes):
        default = {gpt2: ["c_attn", "mlp.c_proj"], images: ["stem", "block.conv"]}
        targets = self.targets or default.get(self.build, ["q_proj", "v_proj", "down_proj"])
        return self.method(**{"rank": 2, "targets": targets, **self.settings, **changes})

    def adapted(self, dtype=torch.float32, **changes):
        model = self.build().to(dtype)
        attach(model, self.spec(**changes), seed=0)
        return model

    def stock_names(self):
        names = [name for name, _ in self.build().named_parameters(remove_duplicate=False)]
        return [n for n in names if any(re.fullmatch(pattern, n) for pattern in self.trained)]


WHOLE_HEAD = {"modules_to_save": ["lm_head"]}
ROWS = {"new_tokens": TOKENS}
BIAS = r".*bias"
CASES = {
    "head": Case(llama, WHOLE_HEAD, [r"lm_head\.weight"]),
    "head-tied": Case(llama_tied, WHOLE_HEAD, [r"lm_head\.weight"]),
    "head-gpt2": Case(gpt2, WHOLE_HEAD, [r"lm_head\.weight"], DoRA),
    "embedding": Case(llama, {"modules_to_save": ["embed_tokens"]}, [r"model\.embed_tokens.*"]),
    "embedding-gemma": Case(
        gemma, {"modules_to_save": ["embed_tokens"]}, [r"model\.embed_tokens.*"]
    ),
    "norms": Case(
        gemma,
        {"modules_to_save": ["norm", "input_layernorm"]},
        [r"model\.norm\.weight", r".*\.input_layernorm\.weight"],
    ),
    "norms-gpt2": Case(
        gpt2, {"modules_to_save": ["ln_f", "1.ln_2"]}, [r".*ln_f.*", r".*1\.ln_2.*"]
    ),
    "mlp": Case(qwen2, {"modules_to_save": ["0.mlp"]}, [r".*0\.mlp\..*"], DoRA),
    "attention": Case(qwen2, {"modules_to_save": ["1.self_attn"]}, [r".*1\.self_attn\..*"]),
    "layer": Case(llama, {"modules_to_save": ["layers.1"]}, [r"model\.layers\.1\..*"]),
    "bias-adapter-gpt2": Case(
        gpt2, {"bias": "adapter"}, [r".*c_attn\.bias", r".*mlp\.c_proj\.bias"], DoRA
    ),
    "bias-adapter-qwen2": Case(qwen2, {"bias": "adapter"}, [r".*[qv]_proj\.bias"]),
    "bias-all-gpt2": Case(gpt2, {"bias": "all"}, [BIAS]),
    "bias-all-qwen2": Case(qwen2, {"bias": "all"}, [BIAS], DoRA),
    "rows": Case(llama, ROWS, [r"lm_head\.weight", r"model\.embed_tokens\.weight"]),
    "rows-tied": Case(llama_tied, ROWS, [r"model\.embed_tokens\.weight"]),
    "rows-gemma": Case(gemma, ROWS, [r"model\.embed_tokens\.weight"], DoRA),
    "rows-gpt2": Case(gpt2, ROWS, [r"transformer\.wte\.weight"]),
    "together-qwen2": Case(
        qwen2,
        {"modules_to_save": ["norm"], "bias": "all", **ROWS},
        [r"model\.norm\.weight", BIAS, r"lm_head\.weight", r"model\.embed_tokens\.weight"],
    ),
    "together-gpt2": Case(
        gpt2,
        {"modules_to_save": ["0.mlp"], "bias": "all", **ROWS},
        [r".*\.0\.mlp\..*", BIAS, r"transformer\.wte\.weight"],
        DoRA,
    ),
    "images-norms": Case(
        images, {"modules_to_save": ["norm", "last"]}, [r"norm\..*", r"last\..*", r"block\.norm.*"]
    ),
    "images-block": Case(images, {"modules_to_save": ["block"]}, [r"block\..*"], targets=["stem"]),
    "images-bias": Case(images, {"bias": "all"}, [BIAS], DoRA),
    "images-together": Case(
        images,
        {"modules_to_save": ["head", "norm"], "bias": "all"},
        [r"head\..*", r"(block\.)?norm\..*", BIAS],
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
LANGUAGE = {name: case for name, case in CASES.items() if case.is_language_model}
every_language_case = pytest.mark.parametrize("case", LANGUAGE.values(), ids=LANGUAGE)


def companions(model):
    """Trainable parameters that belong to no method: what each means in a stock model."""
    found = {}
    for name, parameter in model.named_parameters():
        if match := MEANING.fullmatch(name):
            module, slot, rest = match.groups()
            meant = f"{module}.{'weight' if slot == 'new_rows' else rest}"
            found[meant] = (parameter, slot == "new_rows")
    return found


def untied(model, names):
    """Give the ends of a tie weights of their own where one of them is copied."""
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    return model


class Reference:
    """A stock model in which torch trains parameters in place."""

    def __init__(self, case):
        self.model = case.build().requires_grad_(False)
        if any(n in TIED for n in (n.rpartition(".")[0] for n in case.stock_names())):
            whole = [n for n, _ in self.model.named_modules() if n in TIED and self.copied(case, n)]
            untied(self.model, whole)
        self.parameters = {n: self.model.get_parameter(n) for n in case.stock_names()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.rows = {
            name: TOKENS
            for name in self.parameters
            if "new_tokens" in case.settings and name.rpartition(".")[0] in TIED
        }

    @staticmethod
    def copied(case, name):
        return name.rpartition(".")[2] in case.settings.get("modules_to_save", [])

    def backward(self, seed):
        loss_of(self.model, seed).backward()
        for name, rows in self.rows.items():  # only these are trained
            gradient = self.parameters[name].grad
            kept = gradient[rows].clone()
            gradient.zero_()[rows] = kept

    def value(self, name, tensor):
        return tensor[self.rows[name]] if name in self.rows else tensor


def refusal(function, *args):
    """What the refusal says; None if it was not refused."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return None


# ---------------------------------------------------------------- step 0 and what is trained


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_case
def test_step_0_is_the_base_to_the_bit(case, dtype):
    model = case.adapted(dtype)
    found = output(model)
    assert found.dtype == dtype
    assert_base_again(found, output(case.build().to(dtype)), model)


@every_case
def test_exactly_what_is_asked_for_is_trained(case):
    model = case.adapted()
    names = set(trainable(model))
    factors = {n for n in names if re.fullmatch(r".*\.adapter\.(lora_[AB]|magnitude)", n)}
    assert factors
    if case.method is LoRA:
        assert not any(n.endswith("magnitude") for n in names)
    beside = companions(model)
    assert len(beside) == len(names - factors)
    assert sorted(beside) == sorted(case.stock_names())
    stock = case.build()
    for name, (parameter, is_rows) in beside.items():
        full = stock.get_parameter(name)
        expected = full[TOKENS] if is_rows else full
        assert parameter.requires_grad
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, expected)
    by_module = {name.partition(".adapter.")[0] for name in factors}
    assert not {f"{module}.trained_copy.own.weight" for module in by_module} & names


def test_the_names_of_what_is_trained():
    spec = LoRA(rank=2, targets=["v_proj"], layers=[0], modules_to_save=["model.norm"], **ROWS)
    model = qwen2()
    assert attach(model, spec) == ["model.layers.0.self_attn.v_proj"]
    sizes = {name: tuple(value.shape) for name, value in trainable(model).items()}
    assert sizes == {
        "model.embed_tokens.new_rows.rows": (3, 32),
        "model.layers.0.self_attn.v_proj.adapter.lora_A": (2, 32),
        "model.layers.0.self_attn.v_proj.adapter.lora_B": (16, 2),
        "model.norm.trained_copy.own.weight": (32,),
        "lm_head.new_rows.rows": (3, 32),
    }
    again = gpt2()
    attach(again, LoRA(rank=2, targets=["1.attn.c_attn"], bias="adapter", **ROWS))
    assert {name: tuple(value.shape) for name, value in trainable(again).items()} == {
        "transformer.wte.new_rows.rows": (3, 32),
        "transformer.h.1.attn.c_attn.adapter.lora_A": (2, 32),
        "transformer.h.1.attn.c_attn.adapter.lora_B": (96, 2),
        "transformer.h.1.attn.c_attn.trained_copy.own.bias": (96,),
    }


# ---------------------------------------------------------------- training against torch


@every_case
def test_gradients_are_those_of_training_in_place(case):
    model, reference = case.adapted(alpha=0).train(), Reference(case)
    reference.model.train()
    close(loss_of(model), loss_of(reference.model), 1e-6)
    model.zero_grad()
    loss_of(model).backward()
    reference.backward(0)
    for name, (parameter, _) in companions(model).items():
        expected = reference.value(name, reference.parameters[name].grad)
        assert expected.abs().max() > 0 or TOKENS == []
        close(parameter.grad, expected, 1e-6)


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0, eps=1e-4),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@every_case
def test_three_steps_are_those_of_training_in_place(case, optimizer):
    model, reference = case.adapted(alpha=0).train(), Reference(case)
    reference.model.train()
    beside = companions(model)
    before = base_parameters(model)
    ours = optimizer([parameter for parameter, _ in beside.values()])
    theirs = optimizer(list(reference.parameters.values()))
    for seed in range(3):
        ours.zero_grad()
        theirs.zero_grad()
        loss_of(model, seed).backward()
        reference.backward(seed)
        ours.step()
        theirs.step()
    stock = case.build()
    for name, (parameter, _) in beside.items():
        expected = reference.value(name, reference.parameters[name])
        close(parameter, expected, 1e-6)
        start = reference.value(name, stock.get_parameter(name))
        assert (expected - start).abs().max() > 1e-4
    close(output(model.eval()), output(reference.model.eval()))
    assert base_parameters(model) == before


def base_parameters(model):
    held = base_bytes(model)
    return {n: value for n, value in held.items() if n in dict(model.named_parameters())}


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_a_tied_row_gets_the_gradients_of_both_uses(method):
    model = llama_tied()
    attach(model, method(rank=2, alpha=0, targets=["q_proj"], new_tokens=TOKENS))
    assert [n for n in trainable(model) if "new_rows" in n] == ["model.embed_tokens.new_rows.rows"]
    stock = untied(llama_tied(), ["lm_head"])
    loss_of(model).backward()
    loss_of(stock).backward()
    both = stock.model.embed_tokens.weight.grad + stock.lm_head.weight.grad
    assert stock.model.embed_tokens.weight.grad[TOKENS].abs().max() > 1e-3
    assert stock.lm_head.weight.grad[TOKENS].abs().max() > 1e-3
    close(model.model.embed_tokens.new_rows.rows.grad, both[TOKENS], 1e-6)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_trained_bias_is_added_unscaled_beside_moved_factors(kind):
    """``(m / ||V||) V x + b``: neither the scale nor the magnitude touches the bias."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    attach(model, {"lora": LoRA, "dora": DoRA}[kind](rank=2, targets=["0"], bias="adapter"))
    shake(model)
    x, layer = torch.randn(4, 6), model[0]
    V = layer.weight + layer.adapter.scale * layer.adapter.lora_B @ layer.adapter.lora_A
    if kind == "dora":
        V = layer.adapter.magnitude[:, None] * V / V.norm(dim=1, keepdim=True)
    assert (layer.trained_copy.own.bias - layer.bias).abs().max() > 0.1
    close(model(x), x @ V.T + layer.trained_copy.own.bias)


@pytest.mark.parametrize("build", [llama, llama_tied], ids=["untied", "tied"])
def test_rows_win_over_lora_on_embedding_and_head(build):
    """The rows of new tokens are all that they are: factors act on the other tokens alone."""
    model = build()
    attach(model, LoRA(rank=2, targets=["embed_tokens", "lm_head"], **ROWS))
    shake(model)
    rows = model.model.embed_tokens.new_rows.rows
    ids = torch.tensor([[TOKENS[1], 5, TOKENS[0]]])
    embedded = model.model.embed_tokens(ids)[0]
    close(embedded[0], rows[1])
    close(embedded[2], rows[0])
    adapter = model.model.embed_tokens.adapter
    moved = adapter.scale * adapter.lora_B @ adapter.lora_A[:, 5]
    close(embedded[1], model.model.embed_tokens.weight[5] + moved)
    x = torch.randn(1, 2, 32)
    head_rows = rows if build is llama_tied else model.lm_head.new_rows.rows
    close(model.lm_head(x)[..., TOKENS], x @ head_rows.T)


# ---------------------------------------------------------------- detach, dtypes, transforms


@every_case
def test_detaching_gives_back_the_base(case):
    model = case.build()
    before = {n: fingerprint(t) for n, t in model.state_dict().items()}
    form = shape_of(model)
    config = model.config.to_dict() if case.is_language_model else None
    attach(model, case.spec())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    model.eval()  # in training a frozen BatchNorm counts, as torch has it
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(output(model), output(case.build()))
    detach(model)
    assert {n: fingerprint(t) for n, t in model.state_dict().items()} == before
    assert shape_of(model) == form
    assert torch.equal(output(model), output(case.build().eval()))
    if case.is_language_model:
        assert model.config.to_dict() == config
        stock = case.build()
        tied = stock.get_input_embeddings().weight is stock.get_output_embeddings().weight
        assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


def test_the_batchnorm_of_the_base_does_not_count_what_its_copy_sees():
    case = CASES["images-norms"]
    model, reference = case.adapted(alpha=0).train(), Reference(case).model.train()
    before = {n: fingerprint(b) for n, b in case.build().named_buffers()}
    for seed in range(3):
        model(pixels(seed))
        reference(pixels(seed))
    copied = model.norm.trained_copy.own
    assert copied.num_batches_tracked == 3
    close(copied.running_mean, reference.norm.running_mean, 1e-6)
    close(copied.running_var, reference.norm.running_var, 1e-6)
    detach(model)
    assert {n: fingerprint(b) for n, b in model.named_buffers()} == before


@every_case
def test_masters_stay_fp32_on_a_bf16_base(case):
    model = shake(case.adapted(), std=0.05)
    before = {name: fingerprint(value) for name, value in trainable(model).items()}
    model.to(torch.bfloat16)
    assert {name: fingerprint(value) for name, value in trainable(model).items()} == before
    found = output(model)
    assert found.dtype == torch.bfloat16
    loss_of(model.to(torch.bfloat16)).backward() if case.is_language_model else None
    for name, (parameter, _) in companions(model).items():
        assert parameter.dtype == torch.float32
        if case.is_language_model:
            assert parameter.grad.dtype == torch.float32, name
    expected = output(shake(case.adapted(), std=0.05))
    assert (found.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert {p.dtype for n, p in model.named_parameters() if n not in before} == {torch.bfloat16}


@every_case
def test_autocast_computes_what_a_merged_model_computes_under_autocast(case):
    model = shake(case.adapted(), std=0.05)
    merged = merge(copy.deepcopy(model), untie=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = output(model), output(merged)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@every_case
def test_bypassed_is_the_base(case):
    model = shake(case.adapted())
    moved, base = output(model), output(case.build())
    assert not torch.equal(moved, base)
    with bypassed(model):
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), moved)


@every_case
def test_copies_of_the_model_compute_the_same_and_are_apart(case):
    model = shake(case.adapted())
    expected = output(model)
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    again = torch.load(stored, weights_only=False)
    for other in (twin, pickled, again):
        assert torch.equal(output(other), expected)
        shake(other, seed=2)
        assert not torch.equal(output(other), expected)
    assert torch.equal(output(model), expected)
    for other in (twin, pickled, again):  # a tied head follows the rows of its own model
        assert torch.equal(output(twin), output(other))


COMPILED = ["head-tied", "bias-all-gpt2", "together-qwen2"]


@pytest.mark.parametrize("name", [*COMPILED, "images-together"])
def test_a_model_compiles_without_graph_breaks(name, monkeypatch):
    monkeypatch.setattr(branch, "is_transformed", lambda: True)  # both sum in one order
    torch.compiler.reset()
    case = CASES[name]
    model = shake(case.adapted()).eval()
    call = torch.compile(model, fullgraph=True, backend="eager")
    if case.is_language_model:
        found = call(input_ids=IDS, use_cache=False).logits
        expected = model(input_ids=IDS, use_cache=False).logits
    else:
        found, expected = call(pixels()), model(pixels())
    close(found, expected, 1e-6)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter, _ in companions(model).values())


@every_language_case
def test_gradient_checkpointing_changes_nothing(case):
    gradients = []
    for recomputes in (False, True):
        model = shake(case.adapted()).train()
        if recomputes:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model(**batch(), use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        assert base_parameters(model) == base_parameters(case.adapted())
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        close(recomputed[name], value, 1e-6)


def test_checkpointing_a_small_model_with_a_copied_norm_gives_the_same_gradients():
    case = CASES["images-block"]
    grads = []
    for run in (lambda m, x: m(x), partial(checkpoint, use_reentrant=False)):
        model = shake(case.adapted()).train()
        run(model, pixels()).square().mean().backward()
        grads.append([parameter.grad for parameter, _ in companions(model).values()])
    for one, other in zip(*grads, strict=True):
        close(one, other, 1e-6)


@every_case
def test_every_companion_is_seen_to_fire(case):
    model = case.adapted()
    inputs = {"input_ids": IDS} if case.is_language_model else {"x": pixels()}
    check_adapters_fire(model, inputs)


class Around(nn.Module):
    """Uses one layer's weight without calling the layer."""

    def __init__(self, layer):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.layer = layer

    def forward(self, x):
        weight, bias = self.layer.weight, self.layer.bias
        return nn.functional.layer_norm(self.first(x), (6,), weight, bias)


@pytest.mark.parametrize("settings", [{"modules_to_save": ["layer"]}, {"bias": "all"}])
def test_a_companion_that_is_bypassed_is_found(settings):
    model = Around(nn.LayerNorm(6))
    attach(model, LoRA(rank=2, targets=["first"], **settings))
    with pytest.raises(RuntimeError, match=r"1 of \d adapters never ran .*: layer"):
        check_adapters_fire(model, {"x": torch.randn(2, 6)})


@pytest.mark.parametrize("seen", ["self_attn", "layers.0", "mlp"])
def test_generation_with_a_copied_module_is_that_of_the_merged_model(seen):
    """A module that writes the cache writes it once."""
    model = llama()
    attach(model, LoRA(rank=2, targets=["lm_head"], modules_to_save=[seen]))
    shake(model)
    prompt = {"input_ids": IDS, "attention_mask": batch()["attention_mask"].flip(1)}

    def scores(model, **settings):
        settings |= {"output_logits": True, "return_dict_in_generate": True}
        made = model.generate(**prompt, max_new_tokens=6, do_sample=False, **settings)
        return torch.stack(made.logits)

    cached = scores(model)
    close(cached, scores(model, use_cache=False), 1e-4)
    close(cached, scores(merge(model)), 1e-4)


class Draws(nn.Module):
    """A module with a random number in it."""

    def __init__(self):
        super().__init__()
        self.first, self.noisy = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))

    def forward(self, x):
        return self.noisy(self.first(x))


def test_a_copied_module_draws_random_numbers_once():
    torch.manual_seed(0)
    model, x = Draws().train(), torch.randn(4, 6)
    torch.manual_seed(1)
    expected = model(x)
    attach(model, LoRA(rank=2, targets=["first"], modules_to_save=["noisy"]))
    torch.manual_seed(1)
    assert torch.equal(model.train()(x), expected)


@pytest.mark.parametrize("seen", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("build", [llama, llama_tied, gpt2], ids=["untied", "tied", "gpt2"])
def test_rows_of_new_tokens_on_a_module_that_is_copied_as_well(build, seen):
    """Either refused in words, or right at step 0, after training and after merging."""
    whole = ["wte" if build is gpt2 and seen == "embed_tokens" else seen]
    model = build()
    before = snapshot(model)
    targets = ["c_attn"] if build is gpt2 else ["q_proj"]
    if said := refusal(attach, model, LoRA(rank=2, targets=targets, modules_to_save=whole, **ROWS)):
        assert {"new_tokens", "modules_to_save"} <= set(re.findall(r"\w+", said))
        assert snapshot(model) == before
        return
    assert_base_again(logits(model), logits(build()), model)
    shake(model)
    expected = logits(model)
    close(logits(merge(model, untie=True)), expected, 1e-4)


class Pair(nn.Module):
    """Two layers that share a weight."""

    def __init__(self):
        super().__init__()
        self.x, self.y = nn.Linear(6, 6), nn.Linear(6, 6)
        self.y.weight = self.x.weight

    def forward(self, x):
        return self.y(torch.relu(self.x(x)))


def test_a_weight_that_is_tied_inside_a_copied_module():
    """Either refused in words with nothing changed, or it stays one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Pair())
    x = torch.randn(3, 6)
    expected, before = model(x), snapshot(model)
    if said := refusal(attach, model, LoRA(rank=2, targets=["0"], modules_to_save=["1"])):
        assert "tied" in said
        assert snapshot(model) == before
        return
    assert torch.equal(model(x), expected)
    both = [p for n, p in model.named_parameters(remove_duplicate=False) if ".own.weight" in n]
    assert len({id(p) for p in both}) == 1
    shake(model)
    moved = model(x)
    close(merge(model)(x), moved)
    assert model[1].x.weight is model[1].y.weight


# ---------------------------------------------------------------- merge


@every_case
def test_merging_computes_the_same_and_leaves_a_stock_model(case):
    model = shake(case.adapted())
    expected = output(model)
    form = shape_of(case.build().eval())
    before, merged = snapshot(model), copy.deepcopy(model)
    if said := refusal(merge, model):
        assert re.search("tied.*untie", said)
        assert case.build in (llama_tied, gemma, gpt2)
        assert case.settings.keys() == {"modules_to_save"}
        assert snapshot(model) == before
    merge(merged, untie=bool(said))
    close(output(merged), expected, 1e-4)
    assert shape_of(merged.eval()) == form


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_untying_keeps_the_rows_of_new_tokens_at_both_ends(end, method):
    model = llama_tied()
    attach(model, method(rank=2, targets=["q_proj", end], new_tokens=TOKENS))
    shake(model)
    expected = logits(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="tied"):
        merge(model)
    assert snapshot(model) == before
    close(logits(merge(model, untie=True)), expected, 1e-4)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


@pytest.mark.parametrize("build", [llama, llama_tied], ids=["untied", "tied"])
def test_both_ends_of_a_model_can_be_copied(build):
    """Of a tied model each end gets a copy of its own, as in PEFT, and merging says so."""
    model = build()
    whole = ["embed_tokens", "lm_head"]
    attach(model, LoRA(rank=2, targets=["q_proj"], modules_to_save=whole))
    assert torch.equal(logits(model), logits(build()))
    assert sum("trained_copy" in name for name in trainable(model)) == 2
    shake(model)
    expected = logits(model)
    assert ("tied" in str(refusal(merge, copy.deepcopy(model)))) == (build is llama_tied)
    close(logits(merge(model, untie=True)), expected, 1e-4)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_torchs_fast_path_of_an_encoder_layer_is_not_taken_past_a_copy():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model, x = nn.Sequential(nn.Linear(8, 8), layer).eval(), torch.randn(2, 3, 8)
    attach(model, LoRA(rank=2, targets=["0"], modules_to_save=["1.linear1", "1.norm1"]))
    shake(model)
    found = model(x)
    with torch.no_grad():
        close(model(x), found)
    close(merge(model)(x), found)


class Wrapped(nn.Module):
    """A language model whose tied embedding is inside a container that can be copied."""

    def __init__(self):
        super().__init__()
        self.lm = llama_tied()
        self.extra = nn.Linear(72, 8)

    def forward(self, ids):
        return self.extra(self.lm(input_ids=ids, use_cache=False).logits)


def test_a_container_with_one_end_of_a_tie_is_not_merged_silently():
    torch.manual_seed(0)
    model = Wrapped()
    attach(model, LoRA(rank=2, targets=["extra"], modules_to_save=["lm.model"]))
    shake(model)
    expected = model(IDS)
    before = snapshot(model)
    if said := refusal(merge, model):
        assert "tied" in said
        assert snapshot(model) == before
        return
    close(model(IDS), expected, 1e-4)


@pytest.mark.parametrize("name", ["rows-tied", "rows-gpt2", "head", "together-qwen2", "head-tied"])
def test_a_merged_folder_is_a_stock_model(name, tmp_path):
    from transformers import AutoModelForCausalLM

    case = CASES[name]
    model = shake(case.adapted())
    expected, before = logits(model), snapshot(model)
    export_merged(model, tmp_path, untie=name == "head-tied")
    assert snapshot(model) == before
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    close(logits(loaded), expected, 1e-4)
    assert loaded.config.vocab_size == 72
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == (name in ("rows-tied", "rows-gpt2"))


@pytest.mark.parametrize("kind", [1, 2, 3])
@pytest.mark.parametrize("norm", ["BatchNorm", "InstanceNorm"])
def test_a_bias_of_channels_follows_the_channels(norm, kind):
    """Also unbatched, and where the other sides are as long as the channels."""
    torch.manual_seed(0)
    settings = {"affine": True}
    make = getattr(nn, f"{norm}{kind}d")
    convolution = getattr(nn, f"Conv{kind}d")
    model = nn.Sequential(convolution(6, 6, 1), make(6, **settings)).eval()
    shapes = [(6,) * (kind + 2)] + ([(6,) * (kind + 1)] if norm == "InstanceNorm" else [])
    if said := refusal(attach, model, LoRA(rank=1, targets=["0"], bias="all")):
        assert "cannot be trained alone" in said
        return
    shake(model)
    merged = merge(copy.deepcopy(model))
    for shape in shapes:
        x = torch.randn(shape)
        close(model(x), merged(x))


# ---------------------------------------------------------------- files


def read(folder):
    return load_file(folder / WEIGHTS)


def rewrite(folder, change):
    tensors = read(folder)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def peft_keys(case):
    """What PEFT calls each stock parameter that is trained beside the factors."""
    model, keys = case.build(), {}
    adapted = set(attach(case.build(), case.spec()))
    for name in case.stock_names():
        module, _, leaf = name.rpartition(".")
        tensor = model.get_parameter(name)
        if "new_tokens" in case.settings and module in TIED:
            keys[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"] = tensor[TOKENS]
        elif leaf == "bias" and module in adapted:
            keys[f"base_model.model.{module}.base_layer.bias"] = tensor
        else:
            keys[f"base_model.model.{name}"] = tensor
    buffers = {n for n, _ in model.named_buffers()} & model.state_dict().keys()
    for name, buffer in ((n, model.get_buffer(n)) for n in sorted(buffers)):
        copied = case.settings.get("modules_to_save", [])
        if any(f".{name}".startswith(f".{c}.") or f".{c}." in f".{name}" for c in copied):
            keys[f"base_model.model.{name}"] = buffer
    return keys


@every_case
def test_a_file_has_the_keys_and_shapes_of_peft(case, tmp_path):
    model = shake(case.adapted())
    save_adapter(model, tmp_path)
    stored = read(tmp_path)
    beside = {key: value for key, value in stored.items() if ".lora_" not in key}
    expected = peft_keys(case)
    assert {k: v.shape for k, v in beside.items()} == {k: v.shape for k, v in expected.items()}
    assert len(stored) > len(beside)
    for key, value in stored.items():
        integer = key.endswith("num_batches_tracked")
        assert value.dtype == (torch.int64 if integer else torch.float32)


@every_case
def test_saving_loading_and_saving_gives_the_same_bytes(case, tmp_path):
    model = shake(case.adapted())
    if case.build is images:
        model.train()(pixels())  # running statistics
        model.eval()
    first, second, third = (tmp_path / name for name in "abc")
    save_adapter(model, first)
    loaded = case.build()
    load_adapter(loaded, first)
    if case.build is images:
        for n, _ in case.build().named_buffers():
            copied = any(n.startswith(f"{c}.") for c in case.settings.get("modules_to_save", []))
            if not copied:  # a frozen BatchNorm counts by itself, as torch has it
                loaded.get_buffer(n).copy_(model.get_buffer(n))
    assert torch.equal(output(loaded), output(model))
    assert trainable(loaded).keys() == trainable(model).keys()
    save_adapter(loaded, second)
    held = shake(case.adapted(), seed=5)
    load_adapter(held, first)  # onto a model that holds the same
    save_adapter(held, third)
    for file in (WEIGHTS, "adapter_config.json", "lit_adapters.json"):
        content = (first / file).read_bytes()
        assert (second / file).read_bytes() == content, file
        assert (third / file).read_bytes() == content, file


@pytest.mark.parametrize("start", [PiSSA(), OLoRA()], ids=["pissa", "olora"])
@pytest.mark.parametrize(
    "name", ["head", "bias-adapter-qwen2", "rows-tied", "together-qwen2", "together-gpt2"]
)
def test_a_pinned_start_doubles_the_rank_and_leaves_companions_alone(name, start, tmp_path):
    case = CASES[name]
    model = case.adapted()
    initialise(model, start)
    assert_base_again(logits(model), logits(case.build()), model)
    shake(model, std=0.05)
    values = {n: p.detach().clone() for n, (p, _) in companions(model).items()}
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    stored = read(tmp_path)
    expected = peft_keys(case)
    beside = {key: v for key, v in stored.items() if ".lora_" not in key}
    assert {k: v.shape for k, v in beside.items()} == {k: v.shape for k, v in expected.items()}
    assert all(v.shape[0] == 4 for key, v in stored.items() if key.endswith("lora_A.weight"))
    loaded = case.build()
    load_adapter(loaded, tmp_path)
    close(logits(loaded), logits(model), 1e-6)
    for n, (parameter, _) in companions(loaded).items():
        assert torch.equal(parameter, values[n])
    assert any(n.endswith("lora_A0") for n, _ in loaded.named_parameters())


FAULTS = {
    "missing": lambda tensors, key: tensors.pop(key),
    "unexpected": lambda tensors, key: tensors.update({f"{key}s": tensors[key].clone()}),
    "shape": lambda tensors, key: tensors.update({key: torch.zeros(*tensors[key].shape, 2)}),
    "NaN": lambda tensors, key: tensors[key].view(-1)[0].fill_(float("nan")),
}
SAID = {"missing": "1 missing", "unexpected": "1 unexpected", "shape": "has shape", "NaN": "NaN"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("held", [False, True], ids=["bare", "held"])
@pytest.mark.parametrize("name", ["head-tied", "bias-all-gpt2", "rows", "images-together"])
def test_a_file_that_lacks_or_has_something_is_refused(name, held, fault, tmp_path):
    case = CASES[name]
    save_adapter(shake(case.adapted()), tmp_path)
    key = next(k for k, v in peft_keys(case).items() if v.is_floating_point())
    rewrite(tmp_path, lambda tensors: FAULTS[fault](tensors, key))
    model = case.adapted() if held else case.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=SAID[fault]) as caught:
        load_adapter(model, tmp_path)
    assert key in str(caught.value)
    assert WEIGHTS in str(caught.value)
    assert snapshot(model) == before


def test_a_folder_of_other_companions_is_not_loaded_onto_a_model_that_holds_some(tmp_path):
    save_adapter(shake(CASES["head"].adapted()), tmp_path)
    for settings in ({}, {"modules_to_save": ["norm"]}, ROWS):
        model = llama()
        attach(model, LoRA(rank=2, targets=["q_proj", "v_proj", "down_proj"], **settings))
        before = snapshot(model)
        with pytest.raises(ValueError, match="not those on the model .*lm_head|.*norm|.*embed"):
            load_adapter(model, tmp_path)
        assert snapshot(model) == before


def test_a_counter_of_batches_travels_and_must_be_an_integer(tmp_path):
    case = CASES["images-norms"]
    model = case.adapted().train()
    for _ in range(3):
        model(pixels())
    save_adapter(model.eval(), tmp_path)
    assert read(tmp_path)["base_model.model.norm.num_batches_tracked"] == 3
    loaded = case.build()
    load_adapter(loaded, tmp_path)
    counter = loaded.norm.trained_copy.own.num_batches_tracked
    assert counter == 3
    assert counter.dtype == torch.int64
    assert loaded.norm.num_batches_tracked == 0
    key = "base_model.model.norm.num_batches_tracked"
    rewrite(tmp_path, lambda tensors: tensors.update({key: torch.tensor(3.0)}))
    with pytest.raises(ValueError, match="num_batches_tracked.*dtype"):
        load_adapter(case.build(), tmp_path)


# ---------------------------------------------------------------- PEFT


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def quietly(function, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


JUNK = re.compile(r".*\.(modules_to_save|original_module)\..*")  # of PEFT's bias="all"


@every_case
def test_peft_reads_the_folder_and_writes_the_same_keys(case, tmp_path, peft):
    model = shake(case.adapted())
    save_adapter(model, tmp_path / "ours")
    config = peft_config(model)
    assert config["peft_type"] == "LORA"
    theirs = quietly(peft.PeftModel.from_pretrained, case.build(), str(tmp_path / "ours")).eval()
    close(peft_output(theirs, case), output(model), 1e-4)
    quietly(theirs.save_pretrained, str(tmp_path / "theirs"), save_embedding_layers=False)
    ours, back = read(tmp_path / "ours"), read(tmp_path / "theirs")
    back = {key: value for key, value in back.items() if not JUNK.fullmatch(key)}
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}
    for key, value in ours.items():
        assert torch.equal(back[key], value), key


@torch.no_grad()
def peft_output(model, case):
    if case.is_language_model:
        inputs = batch()
        return model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits  # fmt: skip
    return model(pixels())


def full_names(case):
    """What ours mean by ``modules_to_save``; PEFT takes any name with that end, dot or not."""
    endings = case.settings.get("modules_to_save", [])
    names = [name for name, _ in case.build().named_modules()]
    return [n for n in names if any(f".{n}".endswith(f".{e}") for e in endings)] or None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@every_case
def test_a_folder_of_peft_computes_the_same_here(case, dtype, tmp_path, peft):
    bias = {"adapter": "lora_only"}
    rows = case.settings.get("new_tokens")
    ends = [n.rpartition(".")[0] for n in case.stock_names() if n.rpartition(".")[0] in TIED]
    config = peft.LoraConfig(
        r=2,
        lora_alpha=16,
        use_dora=case.method is DoRA,
        target_modules=case.spec().targets,
        modules_to_save=full_names(case),
        bias=bias.get(case.settings.get("bias"), case.settings.get("bias", "none")),
        trainable_token_indices={end: rows for end in ends} if rows else None,
        fan_in_fan_out=case.build is gpt2,
    )
    theirs = quietly(peft.get_peft_model, case.build().to(dtype), config).eval()
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            shift = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
            parameter.data.add_((0.1 * shift).to(parameter.dtype))
    quietly(theirs.save_pretrained, str(tmp_path), save_embedding_layers=False)
    model = case.build().to(dtype)
    load_adapter(model, tmp_path)
    found, expected = output(model), peft_output_in(theirs, case, dtype)
    assert not torch.equal(found, output(case.build().to(dtype)))
    tolerance = 1e-5 if dtype == torch.float32 else 0.05 * float(expected.abs().max())
    assert (found - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max()))
    stored = read(tmp_path)
    for name, (parameter, _) in companions(model).items():
        module, _, leaf = name.rpartition(".")
        keys = [name, f"{module}.base_layer.{leaf}"]
        keys += [f"{module}.token_adapter.trainable_tokens_delta"]
        (value,) = [
            stored[f"base_model.model.{k}"] for k in keys if f"base_model.model.{k}" in stored
        ]
        assert torch.equal(parameter, value.float())


def peft_output_in(model, case, dtype):
    with torch.no_grad():
        return peft_output(model, case) if case.is_language_model else model(pixels(dtype=dtype))


@pytest.mark.parametrize("equal", [True, False])
def test_pefts_copies_of_frozen_embeddings_must_be_equal(equal, tmp_path, peft):
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        trainable_token_indices={"embed_tokens": TOKENS, "lm_head": TOKENS},
    )
    theirs = quietly(peft.get_peft_model, llama(), config)
    quietly(theirs.save_pretrained, str(tmp_path), save_embedding_layers=True)
    copies = [k for k in read(tmp_path) if k.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if not copies:  # PEFT skips layers with a token adapter
        weight = llama().model.embed_tokens.weight.detach().clone()
        rewrite(
            tmp_path, lambda t: t.update({"base_model.model.model.embed_tokens.weight": weight})
        )
        copies = ["base_model.model.model.embed_tokens.weight"]
    if not equal:
        rewrite(tmp_path, lambda tensors: tensors[copies[0]][7].add_(1))
    model = llama()
    before = snapshot(model)
    if equal:
        load_adapter(model, tmp_path)
        assert len(companions(model)) == 2
    else:
        with pytest.raises(ValueError, match=re.escape(copies[0])):
            load_adapter(model, tmp_path)
        assert snapshot(model) == before


def test_a_list_of_token_ids_means_the_embedding_alone_unless_tied(tmp_path, peft):
    for build, count in ((llama, 1), (llama_tied, 1)):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=TOKENS)
        theirs = quietly(peft.get_peft_model, build(), config).eval()
        delta = theirs.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta
        delta["default"].data.mul_(-2)
        folder = tmp_path / build.__name__
        quietly(theirs.save_pretrained, str(folder), save_embedding_layers=False)
        model = build()
        load_adapter(model, folder)
        assert sum("new_rows.rows" in n for n in trainable(model)) == count
        with torch.no_grad():
            expected = theirs(input_ids=IDS, attention_mask=batch()["attention_mask"]).logits
        close(logits(model), expected)


def test_what_peft_has_no_word_for_has_a_type_of_ours(tmp_path, peft):
    """PEFT puts no rows on a layer that has factors as well."""
    model = llama_tied()
    attach(model, LoRA(rank=2, targets=["embed_tokens", "q_proj"], **ROWS))
    shake(model)
    save_adapter(model, tmp_path)
    assert peft_config(model)["peft_type"].startswith("LIT_")
    loaded = llama_tied()
    load_adapter(loaded, tmp_path)
    assert torch.equal(logits(loaded), logits(model))


# ---------------------------------------------------------------- new tokens by text

TOOL = ["<tool>", "</tool>"]
TINY_VOCAB = 2048


@pytest.fixture(scope="module")
def _tiny():
    return load_base("tiny")


@pytest.fixture
def tiny(_tiny):
    """A fresh copy of the embedded base."""
    return lambda: copy.deepcopy(_tiny)


def words(*others):
    tokenizer = load_tokenizer("tiny")
    tokenizer.add_tokens(list(others))
    return tokenizer


def sizes(model):
    return (
        model.config.vocab_size,
        model.vocab_size,
        *model.model.embed_tokens.weight.shape[:1],
        model.model.embed_tokens.num_embeddings,
        *model.lm_head.weight.shape[:1],
        model.lm_head.out_features,
    )


def tensors_of(tokenizer, text="a <tool>b</tool> c"):
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_the_tiny_base_is_as_assumed(tiny):
    assert len(words()) == TINY_VOCAB
    assert set(sizes(tiny())) == {TINY_VOCAB}
    model = tiny()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_new_tokens_grow_tokenizer_and_model_and_start_at_the_mean(tiny):
    model, tokenizer = tiny(), words()
    spec = LoRA(rank=2, targets=["q_proj"], new_tokens=TOOL)
    attach(model, spec, tokenizer=tokenizer)
    assert tokenizer.convert_tokens_to_ids(TOOL) == [TINY_VOCAB, TINY_VOCAB + 1]
    assert len(tokenizer) == TINY_VOCAB + 2
    ids = tokenizer("a <tool>b</tool> c")["input_ids"]
    assert {TINY_VOCAB, TINY_VOCAB + 1} < set(ids)
    assert "<tool>" in tokenizer.decode(ids, skip_special_tokens=True)
    assert set(sizes(model)) == {TINY_VOCAB + 2}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    mean = tiny().model.embed_tokens.weight.mean(0)
    close(model.model.embed_tokens.new_rows.rows, mean.expand(2, -1), 1e-6)
    inputs = tensors_of(tokenizer)
    answer = model(**inputs, labels=inputs["input_ids"])
    assert answer.logits.shape[-1] == TINY_VOCAB + 2
    close(answer.logits[..., -2], answer.logits[..., -1], 1e-6)
    reference = nn.functional.cross_entropy(
        answer.logits[0, :-1].float(), inputs["input_ids"][0, 1:]
    )
    close(answer.loss, reference)
    answer.loss.backward()
    assert model.model.embed_tokens.new_rows.rows.grad.abs().amax(1).min() > 1e-5
    old = tensors_of(tokenizer, "a b c")
    close(model(**old).logits[..., :TINY_VOCAB], tiny()(**old).logits, 1e-6)
    detach(model)
    assert set(sizes(model)) == {TINY_VOCAB}
    assert snapshot(model)["state"] == snapshot(tiny())["state"]
    assert model.config.to_dict() == tiny().config.to_dict()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_new_token_is_generated_and_decoded(tiny):
    model, tokenizer = tiny(), words()
    attach(model, LoRA(rank=2, targets=["q_proj"], new_tokens=TOOL), tokenizer=tokenizer)
    prompt = tokenizer("a b", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        bos = torch.tensor([[tokenizer.bos_token_id]])
        hidden = model.model(input_ids=torch.cat([bos, prompt], 1)).last_hidden_state[0, -1]
        model.model.embed_tokens.new_rows.rows[0] = 10 * hidden
    (answer,) = generate(model, tokenizer, ["a b"], max_new_tokens=2)
    assert answer.startswith("<tool>")


@pytest.mark.parametrize("method", [LoRA, DoRA])
def test_all_linear_lora_with_four_new_tokens_trains_so_many_numbers(method, tiny):
    """r (in + out) for every linear layer, a magnitude for each output, four rows once (tied)."""
    model, tokenizer = tiny(), words()
    tokens = ["<a>", "<b>", "<c>", "<d>"]
    names = attach(model, method(rank=3, new_tokens=tokens), tokenizer=tokenizer)
    config = model.config
    shapes = [
        m.weight.shape
        for n, m in tiny().named_modules()
        if isinstance(m, nn.Linear) and n != "lm_head"
    ]
    assert len(names) == len(shapes) == 7 * config.num_hidden_layers
    expected = 4 * config.hidden_size + sum(3 * (a + b) for a, b in shapes)
    expected += sum(a for a, _ in shapes) if method is DoRA else 0
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.fixture
def saved(tiny, tmp_path):
    """A trained model with new tokens, its tokenizer, and its folder."""
    model, tokenizer = tiny(), words()
    attach(model, LoRA(rank=2, targets=["q_proj"], new_tokens=TOOL), tokenizer=tokenizer)
    shake(model, std=0.3)
    save_adapter(model, tmp_path)
    return model, tokenizer, tmp_path


def test_rows_follow_their_text_to_another_tokenizer(saved, tiny):
    model, tokenizer, folder = saved
    other, loaded = words("<x>", "</tool>"), tiny()
    load_adapter(loaded, folder, tokenizer=other)
    assert other.convert_tokens_to_ids(TOOL) == [TINY_VOCAB + 2, TINY_VOCAB + 1]
    ours, theirs = tensors_of(tokenizer), tensors_of(other)
    assert not torch.equal(ours["input_ids"], theirs["input_ids"])
    found, expected = loaded(**theirs).logits, model(**ours).logits
    close(found[..., :TINY_VOCAB], expected[..., :TINY_VOCAB])
    close(found[..., TINY_VOCAB + 2], expected[..., TINY_VOCAB])
    close(found[..., TINY_VOCAB + 1], expected[..., TINY_VOCAB + 1])
    assert set(sizes(loaded)) == {TINY_VOCAB + 3}
    save_adapter(loaded, folder / "again")
    third, back = words(), tiny()
    load_adapter(back, folder / "again", tokenizer=third)
    assert third.convert_tokens_to_ids(TOOL) == [TINY_VOCAB, TINY_VOCAB + 1]
    assert torch.equal(back(**ours).logits, model(**ours).logits)


def test_without_a_tokenizer_rows_go_where_they_were(saved, tiny):
    model, tokenizer, folder = saved
    loaded = tiny()
    load_adapter(loaded, folder)
    assert set(sizes(loaded)) == {TINY_VOCAB + 2}
    inputs = tensors_of(tokenizer)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    load_adapter(model, folder)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_new_rows_do_not_change_what_the_base_is_recognised_by(saved, tiny):
    model, _, folder = saved
    plain = tiny()
    attach(plain, LoRA(rank=2, targets=["q_proj"]))
    save_adapter(plain, folder / "plain")
    notes = [json.loads((f / "lit_adapters.json").read_text()) for f in (folder, folder / "plain")]
    assert notes[0]["base_fingerprint"] == notes[1]["base_fingerprint"]
    assert notes[0]["new_tokens"] == TOOL
    other = tiny()
    with torch.no_grad():
        other.model.embed_tokens.weight[0] += 1
    before = snapshot(other)
    with pytest.raises(ValueError, match="another base"):
        load_adapter(other, folder)
    assert snapshot(other) == before
    assert set(sizes(other)) == {TINY_VOCAB}


def test_a_merged_folder_with_new_tokens_is_loaded_with_its_vocabulary(saved, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer, _ = saved
    inputs = tensors_of(tokenizer)
    expected = model(**inputs).logits
    export_merged(model, tmp_path / "merged", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert again.convert_tokens_to_ids(TOOL) == [TINY_VOCAB, TINY_VOCAB + 1]
    assert set(sizes(loaded)) == {TINY_VOCAB + 2}
    close(loaded(**tensors_of(again)).logits, expected, 1e-4)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_peft_reads_new_tokens_on_a_base_that_was_resized(saved, tiny, peft):
    model, tokenizer, folder = saved
    base = tiny()
    base.resize_token_embeddings(TINY_VOCAB + 2, mean_resizing=False)
    theirs = quietly(peft.PeftModel.from_pretrained, base, str(folder)).eval()
    inputs = tensors_of(tokenizer)
    close(theirs(**inputs).logits, model(**inputs).logits, 1e-4)


def test_tokens_beside_lora_on_embedding_and_head(tiny, tmp_path):
    model, tokenizer = tiny(), words()
    spec = LoRA(rank=2, targets=["embed_tokens", "lm_head", "q_proj"], new_tokens=TOOL)
    attach(model, spec, tokenizer=tokenizer)
    shake(model, std=0.05)
    inputs = tensors_of(tokenizer)
    expected = model(**inputs).logits
    save_adapter(model, tmp_path)
    loaded = tiny()
    load_adapter(loaded, tmp_path, tokenizer=words())
    assert torch.equal(loaded(**inputs).logits, expected)
    with pytest.raises(ValueError, match="tied"):
        merge(model)
    close(merge(model, untie=True)(**inputs).logits, expected, 1e-4)
    detach(loaded)
    assert set(sizes(loaded)) == {TINY_VOCAB}
    other = tiny()
    before = snapshot(other)
    with pytest.raises(ValueError, match="lora_.*shape") as caught:
        load_adapter(other, tmp_path, tokenizer=words("<x>"))
    assert "tokenizer" in str(caught.value)  # it, and not the base, is what differs
    assert snapshot(other) == before


def test_new_tokens_on_an_untied_head_with_a_bias_grow_both():
    torch.manual_seed(0)
    model, tokenizer = llama(vocab_size=80), load_tokenizer("tiny")
    model.resize_token_embeddings(TINY_VOCAB, mean_resizing=False)
    model.lm_head.bias = nn.Parameter(torch.randn(TINY_VOCAB))
    stock = {n: fingerprint(t) for n, t in model.state_dict().items()}
    x = IDS[:, :4]
    expected = model(input_ids=x).logits
    attach(model, LoRA(rank=2, targets=["q_proj"], new_tokens=TOOL), tokenizer=tokenizer)
    found = model(input_ids=x).logits
    assert found.shape[-1] == TINY_VOCAB + 2
    close(found[..., :TINY_VOCAB], expected, 1e-6)
    shake(model)
    moved = model(input_ids=x).logits
    close(merge(copy.deepcopy(model))(input_ids=x).logits, moved, 1e-4)
    detach(model)
    assert {n: fingerprint(t) for n, t in model.state_dict().items()} == stock


# ---------------------------------------------------------------- errors


def refused(build, spec, message, **options):
    """Attaching fails with this message and leaves model and config alone."""
    model = build()
    before = snapshot(model)
    config = model.config.to_dict() if hasattr(model, "config") else None
    with pytest.raises(ValueError, match=message) as caught:
        attach(model, spec, **options)
    assert snapshot(model) == before
    assert config is None or model.config.to_dict() == config
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"modules_to_save": "lm_head"}, r"modules_to_save must be a list.*got 'lm_head'"),
        ({"modules_to_save": []}, r"modules_to_save must be a list.*got \[\]"),
        ({"modules_to_save": [""]}, "modules_to_save must be a list"),
        ({"modules_to_save": [7]}, "modules_to_save must be a list"),
        ({"bias": "lora_only"}, r"bias must be one of.*'adapter'.*got 'lora_only'"),
        ({"bias": None}, "bias must be one of"),
        ({"bias": True}, "bias must be one of"),
        ({"new_tokens": "<tool>"}, r"new_tokens must be a list.*got '<tool>'"),
        ({"new_tokens": []}, "new_tokens must be a list"),
        ({"new_tokens": [""]}, "new_tokens must be a list"),
        ({"new_tokens": [-1]}, r"new_tokens must be a list.*got \[-1\]"),
        ({"new_tokens": [True]}, "new_tokens must be a list"),
        ({"new_tokens": [1.0]}, "new_tokens must be a list"),
    ],
)
def test_settings_that_mean_nothing_are_refused(method, settings, said):
    with pytest.raises(ValueError, match=said):
        method(**settings)


@pytest.mark.parametrize(
    ("build", "settings", "said"),
    [
        (llama, {"modules_to_save": ["lm_haed"]}, "'lm_haed' matches no module.*lm_head"),
        (llama, {"modules_to_save": ["lm_head", "nowhere"]}, "'nowhere' matches no module"),
        (
            llama,
            {"targets": ["lm_head"], "modules_to_save": ["layers"]},
            "'model.layers', a ModuleList",
        ),
        (llama, {"modules_to_save": ["rotary_emb"]}, "'model.rotary_emb', a LlamaRotary"),
        (llama, {"modules_to_save": ["q_proj"]}, "trained whole.*modules_to_save"),
        (llama, {"modules_to_save": ["self_attn"]}, "trained whole.*modules_to_save"),
        (llama, {"bias": "all"}, "bias='all'.*nothing in the model.*'none'"),
        (llama, {"bias": "adapter"}, "bias='adapter'.*no adapted layer.*'none'"),
        (qwen2, {"targets": ["o_proj"], "bias": "adapter"}, "no adapted layer has a bias"),
        (llama, {"new_tokens": ["<tool>"]}, "new_tokens.*tokenizer"),
        (llama, {"new_tokens": [5, 5]}, "same row twice"),
        (llama, {"new_tokens": [71, 72]}, "id 72 lies beyond the 72 rows"),
        (images, {"targets": ["stem"], "new_tokens": [1]}, "new.tokens.*a Hugging Face model"),
        (images, {"targets": ["stem"], "modules_to_save": ["nrom"]}, "matches no module.*norm"),
    ],
)
def test_companions_that_do_not_fit_the_model_are_refused(build, settings, said):
    message = refused(build, LoRA(**{"rank": 2, "targets": ["q_proj"], **settings}), said)
    if "modules_to_save" in settings:  # the field that the person wrote
        assert "modules_to_save" in message
    assert "start_from_text" not in message


class Beside(nn.Module):
    """A layer that LoRA knows, and one whose weights are not read where it is called."""

    def __init__(self, odd):
        super().__init__()
        self.first, self.odd = nn.Linear(8, 8), odd

    def forward(self, x):
        x = self.first(x)
        out = self.odd(x, x, x) if isinstance(self.odd, nn.MultiheadAttention) else self.odd(x)
        return out[0] if isinstance(out, tuple) else out


ODD = {
    "lstm": (lambda: nn.LSTM(8, 8), "odd"),
    "attention": (lambda: nn.MultiheadAttention(8, 2), "odd.out_proj"),
    "transposed": (lambda: nn.ConvTranspose1d(5, 5, 3), "odd"),
    "instance": (lambda: nn.InstanceNorm1d(5, affine=True), "odd"),
}


@pytest.mark.parametrize("settings", [{"bias": "all"}, {"modules_to_save": ["odd"]}])
@pytest.mark.parametrize("kind", ODD)
def test_a_layer_that_reads_its_weights_elsewhere_is_trained_rightly_or_refused(kind, settings):
    torch.manual_seed(0)
    make, name = ODD[kind]
    model, x = Beside(make()), torch.randn(5, 8)
    for parameter in model.odd.parameters():
        nn.init.normal_(parameter)
    expected, before = model(x), snapshot(model)
    if said := refusal(attach, model, LoRA(rank=2, targets=["first"], **settings)):
        assert f"'{name}'" in said or "'odd'" in said
        assert next(iter(settings)) in said
        assert snapshot(model) == before
        attach(model, LoRA(rank=2, targets=["first"], bias="adapter"))  # this can be done
        assert set(companions(model)) == {"first.bias"}
        return
    assert torch.equal(model(x), expected)
    shake(model)
    moved = model(x)
    assert not torch.equal(moved, expected)
    moved.square().mean().backward()
    for parameter, _ in companions(model).values():
        assert parameter.grad is not None
    close(merge(copy.deepcopy(model))(x), moved)
    with torch.no_grad():
        close(model.eval()(x), moved)
    detach(model)
    assert torch.equal(model.train()(x), expected)


class Fails(nn.Module):
    """A module that fails within a call when told to."""

    def __init__(self):
        super().__init__()
        self.first, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))
        self.norm, self.error = nn.BatchNorm1d(6), None

    def forward(self, x):
        x = self.norm(self.first(x)) * self.scale
        if self.error is not None:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_call_that_fails_leaves_the_base_as_it_was(error, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Fails(), nn.Linear(6, 6)).to(dtype)
    x = torch.randn(4, 6).to(dtype)
    attach(model, LoRA(rank=2, targets=["1"], modules_to_save=["0"]))
    shake(model)
    before, expected = snapshot(model.eval()), model(x)
    model[0].error = error("stop")
    with pytest.raises(error, match="stop"):
        model(x)
    model[0].error = None
    assert snapshot(model) == before
    assert torch.equal(model(x), expected)
    detach(model)
    stock = torch.manual_seed(0) and nn.Sequential(Fails(), nn.Linear(6, 6)).to(dtype).eval()
    assert torch.equal(model(x), stock(x))


def test_a_module_that_is_called_within_its_own_call():
    """Weights are put back when the outer call ends, and are the copy's until then."""

    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(6))

        def forward(self, x, depth=2):
            return (self(x, depth - 1) if depth else x) * self.scale

    model = nn.Sequential(nn.Linear(6, 6), Again())
    attach(model, LoRA(rank=2, targets=["0"], modules_to_save=["1"]))
    shake(model)
    x, original = torch.randn(2, 6), model[1].scale
    found = model(x)
    assert model[1].scale is original
    close(merge(model)(x), found)


def test_what_is_saved_whole_gets_no_factors():
    model = llama()
    names = attach(model, LoRA(rank=2, targets=["q_proj", "v_proj"], modules_to_save=["v_proj"]))
    assert names == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert not any("v_proj.adapter" in n for n in trainable(model))
    assert sum("v_proj.trained_copy" in n for n in trainable(model)) == 2
    model = llama()
    names = attach(model, LoRA(rank=2, modules_to_save=["layers.0", "model.norm"]))
    assert all(name.startswith("model.layers.1.") for name in names)
    assert len(names) == 7


def test_a_name_inside_another_that_is_saved_is_copied_once():
    model = llama()
    attach(model, LoRA(rank=2, targets=["q_proj"], modules_to_save=["0.mlp", "up_proj"]))
    copies = [n for n in trainable(model) if "trained_copy" in n]
    assert len(copies) == 4
    assert sum("model.layers.0.mlp." in n for n in copies) == 3
    assert "model.layers.1.mlp.up_proj.trained_copy.own.weight" in copies


@pytest.mark.parametrize("ids", [[9, 1, 9], [-1, 1], [1, 72], ["a"], [1.0]])
def test_ids_of_a_folder_that_cannot_be_are_refused(ids, tmp_path):
    save_adapter(shake(CASES["rows-tied"].adapted()), tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    config["trainable_token_indices"] = {"model.embed_tokens": ids}
    file.write_text(json.dumps(config))
    (tmp_path / "lit_adapters.json").unlink()
    model = llama_tied()
    before = snapshot(model)
    with pytest.raises(ValueError, match="adapter_config.json"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tokens": ["<a>", "<a>"]}, "twice"),
        ({"tokens": TOOL, "targets": ["nowhere"]}, "nowhere"),
        ({"tokens": TOOL, "rank": 4096}, "rank 4096"),
        ({"tokens": [*TOOL, TINY_VOCAB + 7]}, "beyond"),
    ],
    ids=["twice", "targets", "rank", "beyond"],
)
def test_an_attach_that_fails_leaves_the_model_alone(change, said, tiny):
    tokenizer = words()
    settings = {"targets": ["q_proj"], "rank": 2, **change}
    spec = LoRA(new_tokens=settings.pop("tokens"), **settings)
    model = tiny()
    before, config = snapshot(model), model.config.to_dict()
    with pytest.raises(ValueError, match=said):
        attach(model, spec, tokenizer=tokenizer)
    assert snapshot(model) == before
    assert model.config.to_dict() == config


def test_merging_rows_leaves_the_other_rows_to_the_bit():
    model = shake(CASES["rows-tied"].adapted())
    rows = model.model.embed_tokens.new_rows.rows.detach().clone()
    merge(model)
    stock: Tensor = llama_tied().model.embed_tokens.weight
    found = model.model.embed_tokens.weight
    others = [i for i in range(72) if i not in TOKENS]
    assert torch.equal(found[others], stock[others])
    assert torch.equal(found[TOKENS], rows)
