"""The loss without logits: the plain loss' value and gradients, and what it never allocates."""

import copy
import logging
import math
import sys
import types
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lit_adapters import AdapterFineTuneModule, DoRA, FullFineTuning, LoRA, attach
from lit_adapters.attachment import adapted_layers, bypassed
from lit_adapters.gradients import each_gradient
from lit_adapters.losses import (
    CPU_CHUNK,
    FEWEST,
    GPU_CHUNK,
    chunked_loss,
    liger_loss,
    token_loss,
    tokens_per_chunk,
)
from lit_adapters.model_loss import ModelLoss
from tests.models import BUILDERS, SIZES, VOCAB, _build, batch, gpt2, llama, llama_tied, shake
from tests.test_module import PRECISIONS, examples, fit, in_batches, make, make_trainer, sgd

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


# --- the function --------------------------------------------------------------------------------


def parts(rows=3, time=7, width=6, vocabulary=19, dtype=torch.float32, seed=0):
    """Ragged labels over random states, a head with a bias; large logits, so that a cap bends."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, time, width, generator=generator, dtype=torch.float64)
    weight = 3 * torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (rows, time), generator=generator)
    labels[0, :3] = -100
    labels[-1, time // 2 :] = -100
    made = [t.to(dtype).requires_grad_(True) for t in (hidden, weight, bias)]
    return *made, labels


def plain(hidden, weight, labels, bias=None, softcap=None, scale=1.0):
    """One token at a time, straight from the definition."""
    total = 0.0
    for row, wanted in zip(hidden, labels, strict=True):
        for state, label in zip(row[:-1], wanted[1:], strict=True):
            if label != -100:
                logits = scale * (weight @ state) + (0 if bias is None else scale * bias)
                if softcap is not None:
                    logits = softcap * torch.tanh(logits / softcap)
                total = total + logits.logsumexp(0) - logits[label]
    return total


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves)


OPTIONS = {
    "bare": {},
    "bias": {"with_bias": True},
    "softcap": {"softcap": 5.0},
    "scale": {"scale": 0.3},
    "all": {"with_bias": True, "softcap": 4.0, "scale": 1.7},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 4, 100, None])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_value_and_gradients_are_those_of_the_plain_loss(options, chunk, dtype):
    options = dict(options)
    with_bias = options.pop("with_bias", False)
    hidden, weight, bias, labels = parts(dtype=dtype)
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    expected = plain(*exact[:2], labels, *exact[2:], **options)
    found = chunked_loss(
        hidden, weight, labels, bias if with_bias else None, chunk=chunk, **options
    )
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == torch.float32 else {}
    torch.testing.assert_close(found.nll.double(), expected, **tolerance)
    assert found.tokens == (labels[:, 1:] != -100).sum()
    for got, wanted in zip(
        gradients(found.nll * 0.37, leaves), gradients(expected * 0.37, exact), strict=True
    ):
        assert got.dtype == dtype
        size = wanted.abs().max()
        torch.testing.assert_close(got.double() / size, wanted / size, **tolerance)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "nothing"])
def test_only_what_is_trained_gets_a_gradient(trained):
    hidden, weight, bias, labels = parts()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    found = chunked_loss(hidden, weight, labels, bias, chunk=3)
    whole = token_loss(F.linear(hidden, weight, bias), labels)
    torch.testing.assert_close(found.nll, whole.nll)
    assert found.nll.requires_grad == (trained != "nothing")
    if trained != "nothing":
        wanted = gradients(whole.nll, leaves[trained])[0]
        torch.testing.assert_close(gradients(found.nll, leaves[trained])[0], wanted)


@pytest.mark.parametrize("grad", ["grad", "no_grad", "inference"])
def test_hits_are_counted_with_and_without_gradients(grad):
    hidden, weight, bias, labels = parts(rows=9, vocabulary=5)
    context = {
        "grad": torch.enable_grad,
        "no_grad": torch.no_grad,
        "inference": torch.inference_mode,
    }[grad]
    with context():
        found = chunked_loss(hidden, weight, labels, bias, chunk=4, count_correct=True)
        whole = token_loss(F.linear(hidden, weight, bias), labels, count_correct=True)
    assert found.correct == whole.correct > 0
    assert found.correct.dtype == found.tokens.dtype == torch.int64
    assert found.nll.shape == found.tokens.shape == found.correct.shape == ()
    torch.testing.assert_close(found.nll, whole.nll)
    assert chunked_loss(hidden, weight, labels, bias).correct == 0


@pytest.mark.parametrize("shape", [(3, 7), (1, 2), (4, 1), (1, 1)])
def test_no_trained_token_is_a_loss_of_zero_with_gradients_of_zero(shape):
    hidden, weight, bias, labels = parts(*shape)
    found = chunked_loss(hidden, weight, torch.full_like(labels, -100), bias, softcap=3.0)
    assert found.nll == found.tokens == 0
    for gradient in gradients(found.nll, [hidden, weight, bias]):
        assert not gradient.any()


def test_labels_are_not_shifted_across_rows():
    """The last state of a row predicts nothing, the first label of the next row least of all."""
    hidden, weight, _, labels = parts()
    changed = labels.clone()
    changed[:, 0] = (labels[:, 0] + 1) % 5
    with torch.no_grad():
        spoiled = hidden.clone()
        spoiled[:, -1] = 1e3
    one = chunked_loss(hidden, weight, labels)
    other = chunked_loss(spoiled, weight, changed)
    assert torch.equal(one.nll, other.nll)


@pytest.mark.parametrize("softcap", [None, 6.0])
def test_bf16_rounds_like_the_plain_loss(softcap):
    hidden, weight, bias, labels = parts(rows=8, width=64, dtype=torch.bfloat16)
    leaves = [hidden, weight, bias]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    true = plain(exact[0], exact[1], labels, exact[2], softcap)
    found = chunked_loss(hidden, weight, labels, bias, softcap, chunk=5).nll
    logits = F.linear(hidden, weight, bias)
    whole = token_loss(logits if softcap is None else softcap * (logits / softcap).tanh(), labels)
    assert found.dtype == torch.float32
    assert (found - true).abs() <= (whole.nll - true).abs() * 1.1 + 1e-4 * true
    triples = (gradients(loss, what) for loss, what in
               ((found, leaves), (whole.nll, leaves), (true, exact)))  # fmt: skip
    for ours, theirs, wanted in zip(*triples, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - wanted).norm() <= (theirs - wanted).norm() * 1.1 + 1e-3 * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype_with_fp32_gradients(dtype):
    hidden, weight, bias, labels = parts(rows=8, width=64)
    leaves = [hidden, weight, bias]
    with torch.autocast("cpu", dtype):
        found = chunked_loss(hidden, weight, labels, bias, chunk=5).nll
        whole = token_loss(F.linear(hidden, weight, bias), labels).nll
    assert not torch.allclose(found, chunked_loss(hidden, weight, labels, bias).nll, rtol=1e-6)
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients(found, leaves), gradients(whole, leaves), strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 3 * torch.finfo(dtype).eps * theirs.norm()


def test_small_probabilities_survive_fp16():
    """4.4e-8 is between the two smallest fp16 numbers; a GradScaler's factor comes too late."""
    hidden = torch.ones(1, 2, 1, requires_grad=True)
    weight = torch.zeros(1025, 1)
    weight[0] = -10.0
    with torch.autocast("cpu", torch.float16):
        loss = chunked_loss(hidden, weight, torch.tensor([[-100, 1]])).nll
    likely = math.exp(-10) / (1024 + math.exp(-10))
    gradient = gradients(2.0**10 * loss, hidden)[0][0, 0].item() / 2**10
    assert gradient == pytest.approx(-10 * likely, rel=2e-3)


def test_a_weight_in_bf16_sums_its_chunks_in_fp32():
    """A sum over chunks that is rounded to bf16 each time drifts: 1/128 of a large sum is lost."""
    hidden, weight, _, labels = parts(rows=40, time=30, width=8, dtype=torch.bfloat16)
    one, many = (
        gradients(chunked_loss(hidden, weight, labels, chunk=chunk).nll, weight)[0].double()
        for chunk in (10_000, 1)
    )
    assert (one - many).norm() < 2**-8 * one.norm()


def test_a_second_backward_is_refused_and_not_wrong():
    hidden, weight, _, labels = parts()
    loss = chunked_loss(hidden, weight, labels).nll
    loss.backward(retain_graph=True, gradient=torch.tensor(0.5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(gradient=torch.tensor(0.5))


def test_chunks_fit_their_budget():
    assert tokens_per_chunk(32_000) == CPU_CHUNK // (4 * 32_000) == 131
    assert tokens_per_chunk(128_256) == FEWEST
    assert tokens_per_chunk(128_256, "cuda") * 4 * 128_256 <= GPU_CHUNK
    assert tokens_per_chunk(128_256, "cuda") > 500


# --- what is never allocated ---------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor of scores over the vocabulary, and gradients of the weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight
        self.rows = 0  # most rows of scores over the vocabulary
        self.like_weight = set()  # memory of tensors of the weight's shape

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        own = self.weight.untyped_storage().data_ptr()
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() == own:
                continue  # a view of the weight holds nothing
            if tensor.shape[-1:] == (len(self.weight),):
                self.rows = max(self.rows, tensor.numel() // len(self.weight))
            if tensor.shape == self.weight.shape:
                self.like_weight.add(tensor.data_ptr())
        return out


@pytest.mark.parametrize("trained", [False, True])
def test_the_function_holds_one_chunk_and_no_weight_gradient_of_a_frozen_head(trained):
    hidden, weight, _, labels = parts(rows=4, time=30, vocabulary=301)
    weight.requires_grad_(trained)
    with Largest(weight) as seen:
        chunked_loss(hidden, weight, labels, chunk=8, count_correct=True).nll.backward()
    assert seen.rows == 8
    assert len(seen.like_weight) == (1 if trained else 0)
    with Largest(weight) as control:
        token_loss(F.linear(hidden, weight), labels).nll.backward()
    assert control.rows >= 4 * 29


@pytest.mark.parametrize("kind", ["auto", "full"])
@pytest.mark.parametrize("evaluate", [False, True])
def test_a_run_never_holds_the_logits(tmp_path, monkeypatch, kind, evaluate):
    """Training, its first-batch check, and validation."""
    monkeypatch.setattr("lit_adapters.losses.CPU_CHUNK", 0)
    monkeypatch.setattr("lit_adapters.losses.FEWEST", 5)
    module = make(llama(vocab_size=173), loss=kind, optimizer=sgd)
    data = in_batches(examples(8), 4)
    trainer = make_trainer(tmp_path)
    module.configure_model()  # tries ten tokens, with their logits
    with Largest(module.model.lm_head.weight) as seen:
        if evaluate:
            trainer.validate(module, data, verbose=False)
        else:
            trainer.fit(module, data)
    assert seen.rows == 5 if kind == "auto" else seen.rows > 30


# --- families ------------------------------------------------------------------------------------


def family(name, **changes):
    """A tiny model of a class that transformers has, with its config's own extras."""
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    return _build(getattr(transformers, f"{name}ForCausalLM"), config, seed=0)


FAMILIES = {
    **{name: (build, (1.0, None)) for name, build in BUILDERS.items()},
    "gemma2": (partial(family, "Gemma2", head_dim=8, final_logit_softcapping=3.0), (1.0, 3.0)),
    "phi": (partial(family, "Phi"), (1.0, None)),
    "cohere": (partial(family, "Cohere", logit_scale=0.25), (0.25, None)),
    "cohere2": (partial(family, "Cohere2", logit_scale=0.25), (0.25, None)),
    "granite": (partial(family, "Granite", logits_scaling=8.0), (0.125, None)),
    "nanochat": (partial(family, "NanoChat", final_logit_softcapping=4.0), (1.0, 4.0)),
    "opt": (partial(family, "OPT", word_embed_proj_dim=16, ffn_dim=48), (1.0, None)),
    "gpt-neox": (partial(family, "GPTNeoX"), (1.0, None)),
    "mixtral": (partial(family, "Mixtral", num_local_experts=2), (1.0, None)),
}
FAMILIES["gemma3"] = (
    lambda: _build(
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig(**{**SIZES, "head_dim": 8, "final_logit_softcapping": 2.0}),
        seed=0,
    ),
    (1.0, 2.0),
)


def model_inputs(rows=3, length=11):
    made = batch(rows, length)
    labels = made.pop("labels")
    labels[0, :4] = -100
    return {**made, "use_cache": False}, labels


def both(model, count_correct=False):
    """Loss and gradients of every trained parameter, from logits and from states."""
    inputs, labels = model_inputs()
    results = []
    for loss in (ModelLoss("full"), ModelLoss("auto")):
        model.zero_grad()
        sums = loss(model, inputs, labels, count_correct)
        sums.nll.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((sums, grads))
    model.zero_grad()
    return *results, loss


def assert_same(full, chunked, tolerance=1e-6):
    torch.testing.assert_close(chunked[0].nll, full[0].nll, rtol=tolerance, atol=0)
    assert chunked[0].tokens == full[0].tokens > 0
    assert chunked[0].correct == full[0].correct
    assert chunked[1].keys() == full[1].keys() != set()
    largest = max(g.abs().max() for g in full[1].values())
    for name, wanted in full[1].items():
        off = (chunked[1][name] - wanted).abs().max() / max(
            wanted.abs().max(), 1e-2 * largest
        )  # OPT's k biases: 0
        assert off <= 5 * tolerance, (name, off)


def quiet(caplog):
    return [r.getMessage() for r in caplog.records if "loss is computed" in r.getMessage()]


@pytest.fixture(autouse=True)
def _reasons(caplog):
    caplog.set_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero")


@pytest.mark.parametrize("spec", [LoRA(rank=4), FullFineTuning()], ids=["lora", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_recognised_and_train_alike(name, spec, caplog):
    build, shape = FAMILIES[name]
    model = build()
    attach(model, spec)
    shake(model, std=0.02)
    full, chunked, loss = both(model, count_correct=True)
    assert not quiet(caplog)
    assert loss.refused is None
    assert loss.shape == shape
    assert_same(full, chunked)


def test_a_tied_head_that_is_trained_gets_both_parts_of_its_gradient():
    model = llama_tied()
    attach(model, FullFineTuning())
    full, chunked, _ = both(model)
    assert_same(full, chunked)
    model.lm_head.weight.requires_grad_(False)
    assert "model.embed_tokens.weight" not in both(model)[1][1]


# --- heads that are more than a matrix -----------------------------------------------------------


ADAPTED = {
    "lora": (LoRA(rank=4, targets=["q_proj", "lm_head"]), "LoRA"),
    "dora": (DoRA(rank=4, targets=["q_proj", "lm_head"]), "DoRA"),
    "copy": (LoRA(rank=4, targets=["q_proj"], modules_to_save=["lm_head"]), "trained_copy"),
    "tokens": (LoRA(rank=4, targets=["q_proj"], new_tokens=[5, 9]), "new_rows"),
}


@pytest.mark.parametrize(("spec", "named"), ADAPTED.values(), ids=ADAPTED)
def test_an_adapted_head_is_seen_and_said_once(spec, named, caplog):
    model = llama()
    attach(model, spec)
    shake(model)
    inputs, labels = model_inputs()
    full, chunked, loss = both(model)
    assert_same(full, chunked)
    assert any("lm_head" in name for name in chunked[1])
    loss(model, inputs, labels, count_correct=True)
    (line,) = quiet(caplog)
    assert "full logits" in line
    assert named in line
    with bypassed(model):  # the frozen base alone: its head is a matrix again
        loss(model, inputs, labels, count_correct=False)
    assert loss.shape == (1.0, None)
    assert len(quiet(caplog)) == 1


def test_an_adapter_that_comes_later_is_seen():
    model = llama()
    inputs, labels = model_inputs()
    loss = ModelLoss()
    bare = loss(model, inputs, labels, count_correct=False).nll
    assert loss.shape
    attach(model, LoRA(rank=4, targets=["lm_head"]))
    shake(model)
    adapted = loss(model, inputs, labels, count_correct=False).nll
    expected = ModelLoss("full")(model, inputs, labels, count_correct=False).nll
    assert torch.equal(adapted, expected)
    assert not torch.equal(adapted, bare)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_other_class(model):
    head = Doubling(32, VOCAB, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head


def with_replaced_forward(model):
    model.lm_head.forward = lambda x: 2 * F.linear(x, model.lm_head.weight)


def with_hook(model):
    model.lm_head.register_forward_hook(lambda m, args, out: 2 * out)


def with_early_hook(model):
    model.lm_head.register_forward_pre_hook(lambda m, args: (2 * args[0],))


def with_backward_hook(model):
    model.lm_head.register_full_backward_hook(lambda m, i, o: (2 * i[0],))


def with_parametrization(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


def after_forward(model, change):
    original = type(model).forward

    def forward(**kwargs):
        output = original(model, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = forward


def with_unknown_scale(model):
    after_forward(model, lambda logits: 1.1 * logits)


def with_unknown_cap(model):
    after_forward(model, lambda logits: 50 * torch.tanh(logits / 50))


def with_clamp(model):
    after_forward(model, lambda logits: logits.clamp(max=60))


def with_forbidden_token(model):
    after_forward(model, lambda logits: logits.index_fill(-1, torch.tensor([7]), -1e9))


def with_padding_cut_off(model):
    after_forward(model, lambda logits: logits[..., : VOCAB - 2])


def with_another_road(model):
    """The head's weight is used, but the head is not called."""
    body, weight = model.model, model.lm_head.weight

    def forward(use_cache=False, **kwargs):
        states = body(**kwargs, use_cache=use_cache).last_hidden_state
        return types.SimpleNamespace(logits=states @ weight.T)

    model.forward = forward


OBSTACLES = {
    with_other_class: "Doubling",
    with_replaced_forward: "hooks",
    with_hook: "hooks",
    with_early_hook: "hooks",
    with_backward_hook: "backward hooks",
    with_parametrization: "ParametrizedLinear",
    with_unknown_scale: "changes the logits",
    with_unknown_cap: "changes the logits",
    with_clamp: "changes the logits",
    with_forbidden_token: "changes the logits",
    with_padding_cut_off: "changes the logits",
    with_another_road: "called 0 times",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("change", OBSTACLES)
def test_what_cannot_be_handled_falls_back_with_its_reason(change, dtype, caplog):
    model = llama().to(dtype)
    change(model)
    inputs, labels = model_inputs()
    labels = labels.clamp(max=VOCAB - 3).where(labels != 7, 6)
    expected = ModelLoss("full")(model, inputs, labels, count_correct=True)
    loss = ModelLoss()
    for _ in range(2):
        assert loss(model, inputs, labels, count_correct=True) == expected
    (line,) = quiet(caplog)
    assert OBSTACLES[change] in line


def test_the_hook_is_gone_even_after_an_error():
    model = llama()
    inputs, labels = model_inputs()
    with pytest.raises(ValueError, match="input_ids"):
        ModelLoss()(model, {**inputs, "input_ids": None}, labels, False)
    ModelLoss()(model, inputs, labels, False)
    assert not model.lm_head._forward_pre_hooks
    assert model(**inputs).logits.shape == (3, 11, VOCAB)


def test_the_probe_shifts_no_random_choice():
    model = gpt2(resid_pdrop=0.2).train()
    inputs, labels = model_inputs()
    found = []
    for kind in ("full", "auto"):
        loss = ModelLoss(kind)
        torch.manual_seed(3)
        found += [loss(model, inputs, labels, False).nll.item() for _ in range(2)]
    assert found[:2] == pytest.approx(found[2:], rel=1e-6)
    assert found[0] != found[1]


# --- under Lightning -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:what is trained is kept in torch.bfloat16")
@pytest.mark.parametrize("spec", [LoRA(rank=4), FullFineTuning()], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_ragged_windows_train_alike(tmp_path, precision, checkpointing, spec):
    rows = examples(10)
    runs = []
    for kind in ("full", "auto"):
        module = make(
            llama(),
            adapter=spec,
            loss=kind,
            optimizer=sgd,
            gradient_checkpointing=checkpointing,
        )
        data = in_batches(rows, 2)
        trainer = fit(
            tmp_path,
            module,
            data,
            data,
            precision=precision,
            accumulate_grad_batches=3,
            max_epochs=2,
        )
        assert module.model_loss.refused is None
        assert (module.model_loss.shape is None) == (kind == "full")
        runs.append(trainer.logger)
    full, auto = runs
    exact = {"rel": 2e-6, "abs": 1e-6} if precision == "32-true" else {"rel": 1e-2, "abs": 1e-2}
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        assert len(full[key]) >= 2
        assert auto[key] == pytest.approx(full[key], **exact), key
    if precision == "32-true":
        assert auto["val/token_accuracy"] == full["val/token_accuracy"]


@pytest.mark.parametrize("spec", [LoRA(rank=4), FullFineTuning()], ids=["lora", "full"])
def test_a_grad_scaler_sees_what_it_saw_before(spec):
    model = llama()
    attach(model, spec)
    shake(model, std=0.02)
    inputs, labels = model_inputs()
    found = []
    for kind in ("full", "auto"):
        scaler = torch.amp.GradScaler("cpu")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with torch.autocast("cpu", torch.float16):
            nll = ModelLoss(kind)(model, inputs, labels, count_correct=False).nll
        scaler.scale(nll / 1024).backward()
        scaler.unscale_(optimizer)
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    for full, auto in zip(*found, strict=True):
        assert auto.isfinite().all()
        assert (auto - full).norm() <= 5e-3 * full.norm().clamp(min=1e-5)


def test_lora_ga_gradients_of_an_adapted_head_are_those_of_the_full_loss():
    """`step_loss` asks the module for its loss; the head's weight is a leaf of its own there."""
    found = []
    for kind in ("full", "auto"):
        module = make(llama(), adapter=LoRA(rank=4, targets=["q_proj", "lm_head"]), loss=kind)
        module.configure_model()
        taken = {}

        def loss(_, batch, module=module):
            nll, tokens = module.nll(batch)
            return nll / tokens, tokens

        each_gradient(
            module.model,
            list(adapted_layers(module.model)),
            in_batches(examples(4), 2),
            lambda one, gradient, taken=taken: taken.update({one.name: gradient.clone()}),
            loss=loss,
        )
        found.append(taken)
    full, auto = found
    assert full.keys() == auto.keys()
    assert "lm_head" in full
    for name in full:
        torch.testing.assert_close(auto[name], full[name], rtol=1e-5, atol=1e-7)


def test_the_module_copies_and_says_its_choice():
    module = make(llama(), loss="full")
    assert module.hparams["loss"] == "full"
    module.configure_model()
    inputs, labels = model_inputs()
    data = {**inputs, "labels": labels}
    assert torch.equal(copy.deepcopy(module).nll(data)[0], module.nll(data)[0])
    assert AdapterFineTuneModule(llama()).hparams["loss"] == "auto"
    with pytest.raises(ValueError, match="'chunks'"):
        make(llama(), loss="chunks")


# --- torch.compile -------------------------------------------------------------------------------

# Dynamo looks at the gradient of what a graph break hands over.
compiling = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@compiling
@pytest.mark.parametrize("what", ["layers", "body", "model in place", "model"])
def test_compiled_parts_give_the_same_loss(what, caplog):
    model = llama()
    inputs, labels = model_inputs()
    expected = ModelLoss("full")(model, inputs, labels, True)
    torch._dynamo.reset()
    compiled = model
    if what == "layers":
        for layer in model.model.layers:
            layer.compile(backend="eager")
    elif what == "body":
        model.model.compile(backend="eager")
    elif what == "model in place":
        model.compile(backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
    loss = ModelLoss()
    for _ in range(2):
        found = loss(compiled, inputs, labels, True)
        torch.testing.assert_close(found.nll, expected.nll, rtol=1e-6, atol=0)
        assert found.correct == expected.correct
    assert compiled(**inputs).logits.shape == (3, 11, VOCAB)  # no hook was compiled in
    whole = what.startswith("model")
    assert bool(quiet(caplog)) == whole
    assert (loss.shape is None) == whole


@compiling
def test_a_step_compiled_as_a_whole_traces_the_logits():
    module = make(llama())
    module.configure_model()
    inputs, labels = model_inputs()
    data = {**inputs, "labels": labels}
    torch._dynamo.reset()
    expected = module.nll(data)[0]
    found = torch.compile(lambda given: module.nll(given)[0], backend="eager")(data)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert module.model(**inputs).logits.shape == (3, 11, VOCAB)


# --- liger ---------------------------------------------------------------------------------------


@pytest.fixture
def fake_liger(monkeypatch):
    """Stands in for the kernels, which need a GPU: the arguments that liger-kernel takes."""

    class LigerFusedLinearCrossEntropyLoss(nn.Module):
        def __init__(self, ignore_index=-100, reduction="mean", softcap=None):
            super().__init__()
            self.ignore_index, self.reduction, self.softcap = ignore_index, reduction, softcap

        def forward(self, lin_weight, _input, target, bias=None):
            assert len(target), "the kernels divide by the number of tokens"
            logits = F.linear(_input, lin_weight, bias)
            if self.softcap is not None:
                logits = self.softcap * (logits / self.softcap).tanh()
            return F.cross_entropy(
                logits, target, reduction=self.reduction, ignore_index=self.ignore_index
            )

    package = types.ModuleType("liger_kernel")
    package.transformers = types.ModuleType("liger_kernel.transformers")
    package.transformers.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)


@pytest.mark.usefixtures("fake_liger")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_liger_gets_what_it_needs(options):
    options = dict(options)
    hidden, weight, bias, labels = parts()
    bias = bias if options.pop("with_bias", False) else None
    found = liger_loss(hidden, weight, labels, bias, **options)
    expected = chunked_loss(hidden, weight, labels, bias, **options)
    torch.testing.assert_close(found.nll, expected.nll)
    assert found.tokens == expected.tokens
    leaves = [hidden, weight]
    torch.testing.assert_close(gradients(found.nll, leaves), gradients(expected.nll, leaves))


@pytest.mark.usefixtures("fake_liger")
def test_liger_is_not_asked_about_no_token():
    hidden, weight, bias, labels = parts()
    assert liger_loss(hidden, weight, torch.full_like(labels, -100), bias).nll == 0


def test_liger_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    hidden, weight, _, labels = parts()
    with pytest.raises(ModuleNotFoundError, match="pip install liger-kernel"):
        liger_loss(hidden, weight, labels)


def test_liger_without_cuda_computes_in_chunks_and_says_so(caplog):
    model = llama()
    inputs, labels = model_inputs()
    loss = ModelLoss("liger")
    found = loss(model, inputs, labels, count_correct=False)
    expected = ModelLoss("auto")(model, inputs, labels, count_correct=False)
    assert found == expected
    (line,) = quiet(caplog)
    assert "needs CUDA, not cpu" in line
