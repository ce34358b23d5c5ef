"""LoRA-GA against plain tensors: the first step is the best there is (arXiv 2407.05000)."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_adapters import DoRA, InstructionDataModule, LoRA, LoRAGA, PiSSA, attach, initialise
from lit_adapters.attachment import adapted_layers
from lit_adapters.base_model import load_base, load_tokenizer
from lit_adapters.gradients import each_gradient
from lit_adapters.initialisers import Factored, Factors, named_generator
from lit_adapters.weights import as_matrix
from tests import models

SHARED = Path(__file__).resolve().parents[2] / "shared"
STORIES = SHARED / "models" / "stories260k"
ALPACA = SHARED / "data" / "alpaca_en_demo.json"
OUT, IN, RANK, SCALE = 40, 56, 4, 2.0


def matrix(seed=0, rows=OUT, columns=IN):
    """A gradient with a spectrum that falls slowly."""
    generator = torch.Generator().manual_seed(seed)
    U, _, Vh = torch.linalg.svd(
        torch.randn(rows, columns, generator=generator), full_matrices=False
    )
    return (U * 0.9 ** torch.arange(min(rows, columns))) @ Vh * 1e-3


def start(G, initialiser=LoRAGA(niter=None), rank=RANK, weight=None, scale=SCALE):  # noqa: B008
    weight = torch.empty(G.shape, device="meta") if weight is None else weight
    return initialiser(weight, rank, scale, generator=named_generator("x", 0), gradient=G)


def direction(A, B, G):
    """What one step of plain gradient descent on both factors moves the weight along."""
    return B @ B.T @ G + G @ A.T @ A


def cosine(X, Y):
    return (torch.sum(X * Y) / (X.norm() * Y.norm())).item()


def bound(G, columns):
    S = torch.linalg.svdvals(G)
    return math.sqrt((S[:columns].square().sum() / S.square().sum()).item())


def truncated(G, columns):
    U, S, Vh = torch.linalg.svd(G)
    return U[:, :columns] * S[:columns] @ Vh[:columns]


# --- the equations -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("shape", [(40, 56), (56, 40), (30, 30)])
def test_the_first_step_is_the_best_of_twice_the_rank(way, shape):
    G = matrix(1, *shape)
    A, B = start(G, LoRAGA(niter=None, direction=way))
    D = direction(A, B, G)
    assert cosine(D, G) == pytest.approx(bound(G, 2 * RANK), abs=1e-4)
    c = torch.linalg.matrix_norm(A, 2) ** 2
    assert torch.allclose(D, c * truncated(G, 2 * RANK), rtol=1e-3, atol=1e-6 * c.item())


def peft_like(G):
    """Singular values of the gradient on ``B``: a step of rank r in disguise."""
    U, S, Vh = torch.linalg.svd(G)
    return Factors(Vh[:RANK], U[:, RANK : 2 * RANK] * S[RANK : 2 * RANK])


def same_index(G):
    U, _, Vh = torch.linalg.svd(G)
    return Factors(Vh[:RANK], U[:, :RANK])


@pytest.mark.parametrize("construct", [peft_like, same_index])
def test_other_constructions_miss_the_bound(construct):
    G = matrix(1)
    short = bound(G, 2 * RANK) - cosine(direction(*construct(G), G), G)
    assert short > 0.02


@pytest.mark.parametrize("gamma", [16.0, 64.0])
def test_both_factors_have_the_stable_scale_of_the_output_side(gamma):
    A, B = start(matrix(), LoRAGA(niter=None, gamma=gamma))
    expected = OUT**0.25 / math.sqrt(gamma)
    assert torch.linalg.svdvals(A) == pytest.approx([expected] * RANK, rel=1e-5)
    assert torch.linalg.svdvals(B) == pytest.approx([expected] * RANK, rel=1e-5)
    assert (A.shape, B.shape) == ((RANK, IN), (OUT, RANK))


def test_the_other_scales_follow_their_formulas():
    G, W = matrix(), matrix(7) * 1e3
    S = torch.linalg.svdvals(W)[:RANK]
    constants = {"unit": 1.0, "gd": 1 / SCALE, "weight_svd": (S / SCALE).sqrt().mean().item()}
    for scale, c in constants.items():
        for factor in start(G, LoRAGA(niter=None, scale=scale), weight=W):
            assert torch.linalg.svdvals(factor) == pytest.approx([c] * RANK, rel=1e-5)


def test_only_the_scale_of_the_weight_reads_the_weight():
    assert LoRAGA(scale="weight_svd").reads_weight
    assert not any(LoRAGA(scale=s).reads_weight for s in ("stable", "unit", "gd"))


def test_directions_take_the_vectors_they_say():
    G = matrix()
    U, _, Vh = torch.linalg.svd(G)
    rows = {
        "ArB2r": (range(4), range(4, 8)),
        "A2rBr": (range(4, 8), range(4)),
        "ArBr": (range(1, 8, 2), range(0, 8, 2)),
    }
    for way, (of_A, of_B) in rows.items():
        A, B = start(G, LoRAGA(niter=None, direction=way, scale="unit"))
        assert (A @ Vh.T).abs().argmax(1).tolist() == list(of_A)
        assert (U.T @ B).abs().argmax(0).tolist() == list(of_B)


def test_the_randomised_svd_comes_close():
    G = matrix(2, 200, 300)
    A, B = start(G, LoRAGA())
    assert cosine(direction(A, B, G), G) == pytest.approx(bound(G, 2 * RANK), abs=1e-3)


@pytest.mark.parametrize("way", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("rank", [5, 7, 8])
def test_where_vectors_run_out_the_sets_overlap(way, rank):
    G = matrix(3, 8, 20)
    A, B = start(G, LoRAGA(niter=None, direction=way, scale="unit"), rank=rank)
    assert (A.shape, B.shape) == ((rank, 20), (8, rank))
    for factor in (A, B):
        assert torch.linalg.svdvals(factor) == pytest.approx([1.0] * rank, rel=1e-5)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    used = (A @ Vh.T).abs().amax(0) + (U.T @ B).abs().amax(1)
    assert (used > 0.99).all()  # no direction is left out


def test_a_start_does_not_depend_on_the_size_of_the_gradient():
    G = matrix()
    for small, large in zip(start(G * 1e-6), start(G), strict=True):
        assert torch.allclose(small.abs(), large.abs(), atol=1e-3)


@pytest.mark.parametrize("niter", [None, 4])
@pytest.mark.parametrize("shape", [(112, 130), (130, 112)])
@pytest.mark.parametrize("tokens", [30, 90])  # of which the matrix is formed first
def test_factors_of_a_gradient_start_as_their_product_does(shape, niter, tokens):
    G = matrix(0, *shape)
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    mix = torch.linalg.qr(torch.randn(tokens, tokens, generator=torch.Generator().manual_seed(1))).Q
    roots = S[:tokens].sqrt()
    factors = (
        Factored(mix @ (U[:, :tokens] * roots).T, mix @ (roots[:, None] * Vh[:tokens]), 2.0) / 2
    )
    assert torch.allclose(factors.dense(), truncated(G, tokens), atol=1e-8)
    assert factors.multiplies_faster(240) == (tokens == 30)  # 24 columns, ten times
    found = start(factors, LoRAGA(niter=niter), weight=G)
    expected = start(factors.dense(), LoRAGA(niter=niter), weight=G)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-4 * other.abs().max())


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_gradients_without_a_direction_are_refused(bad):
    with pytest.raises(ValueError, match="zero, infinite or NaN"):
        start(torch.full((8, 8), bad))
    for niter in (None, 4):  # of which one is found by iterating
        with pytest.raises(ValueError, match="zero, infinite or NaN"):
            start(torch.full((130, 130), bad), LoRAGA(niter=niter))
        factors = Factored(torch.full((3, 130), bad), torch.ones(3, 130))
        with pytest.raises(ValueError, match="zero, infinite or NaN"):
            start(factors, LoRAGA(niter=niter), weight=torch.empty(130, 130))


def test_settings_without_sense_are_refused():
    with pytest.raises(ValueError, match="gamma must be above 0, got 0"):
        LoRAGA(gamma=0)
    with pytest.raises(ValueError, match="divides by alpha"):
        start(matrix(), LoRAGA(scale="gd"), scale=0.0)
    with pytest.raises(ValueError, match="needs gradients"):
        start(None, weight=matrix())


@pytest.mark.parametrize("way", ["ArB2r", "random"])
def test_a_default_device_does_not_matter(way):
    expected = start(matrix(), LoRAGA(niter=None, direction=way))
    G = matrix()
    with torch.device("meta"):  # where a trainer builds models
        found = start(G, LoRAGA(niter=None, direction=way), weight=G)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- through the adapters ----------------------------------------------------------------------


def batches(count):
    return [models.batch(rows=3, length=8 + n, seed=n) for n in range(count)]


def base_gradients(model, data):
    found = {}
    each_gradient(
        model, list(adapted_layers(model)), data, lambda one, g: found.update({one.name: g.clone()})
    )
    return found


def started(kind, count=1, spec=None, **changes):
    """A model whose adapters start by LoRA-GA, exactly, and the gradients they started from."""
    model = models.BUILDERS[kind](**changes)
    targets = ["c_attn", "c_fc"] if kind == "gpt2" else "all-linear"
    attach(model, spec or LoRA(rank=3, alpha=6, rslora=True, targets=targets))
    before = models.logits(model)
    data = batches(count)
    initialise(model, LoRAGA(niter=None), data)
    assert torch.equal(models.logits(model), before)  # the base's function, to the bit
    return model, base_gradients(model, data), data


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_adapters_start_at_the_bound_of_the_full_batch_gradient(kind, count):
    model, found, _ = started(kind, count)
    for name, _, adapter in adapted_layers(model):
        G = found[name]
        D = direction(adapter.lora_A.detach(), adapter.lora_B.detach(), G)
        assert cosine(D, G) == pytest.approx(bound(G, 6), abs=1e-4), name


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_step_of_sgd_on_both_factors_is_that_direction(kind):
    """In fp64: the change of the product itself, after one step of a real optimizer."""
    model, _, data = started(kind)
    model.double()
    for *_, adapter in adapted_layers(model):
        for factor in adapter.parameters():
            factor.data = factor.data.double()
    G = base_gradients_64(model, data[0])
    lr = 1e-5
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model(**data[0]).loss.backward()
    before = {n: (a.lora_A.detach().clone(), a.lora_B.detach().clone()) for n, a in named(model)}
    optimizer.step()
    for name, adapter in named(model):
        moved = adapter.scale * adapter.product()
        expected = -lr * adapter.scale**2 * direction(*before[name], G[name])
        assert (moved - expected).norm() < 1e-3 * expected.norm(), name


def named(model):
    return [(name, adapter) for name, _, adapter in adapted_layers(model)]


def base_gradients_64(model, batch):
    """Plain autograd; the adapters are still at a start that changes nothing."""
    layers = [(name, layer) for name, layer, _ in adapted_layers(model)]
    weights = [layer.weight.requires_grad_(True) for _, layer in layers]
    found = torch.autograd.grad(model(**batch).loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return {n: as_matrix(m, g) for (n, m), g in zip(layers, found, strict=True)}


def test_biases_do_not_pass_for_weights():
    """The gradient of a bias is a vector; the name of a weight must never lead to it."""
    model, found, _ = started("qwen2")
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert layer.bias is not None
    assert found["model.layers.0.self_attn.q_proj"].shape == layer.weight.shape


def test_dora_starts_at_the_base_too():
    model, found, _ = started("llama", spec=DoRA(rank=3, alpha=6))
    name, adapter = named(model)[0]
    factors = adapter.lora_A.detach(), adapter.lora_B.detach()
    assert cosine(direction(*factors, found[name]), found[name]) == pytest.approx(
        bound(found[name], 6), abs=1e-4
    )


def test_grouped_convolutions_start_block_by_block():
    model = nn.Sequential(nn.Conv1d(8, 12, 3, groups=2), nn.Flatten(), nn.Linear(12 * 6, 5))
    attach(model, LoRA(rank=2, targets=["0", "2"]))
    x = torch.randn(4, 8, 8)
    loss = lambda model, x: (model(x).square().mean(), torch.tensor(1))  # noqa: E731
    initialise(model, LoRAGA(niter=None), [x], loss=loss)
    found = {}
    each_gradient(
        model,
        list(adapted_layers(model)),
        [x],
        lambda o, g: found.update({o.name: g.clone()}),
        loss,
    )
    adapter = model[0].adapter
    blocks = zip(
        adapter.lora_A.detach().chunk(2),
        adapter.lora_B.detach().chunk(2),
        found["0"].chunk(2),
        strict=True,
    )
    for A, B, G in blocks:
        assert cosine(direction(A, B, G), G) == pytest.approx(bound(G, 4), abs=1e-4)


def test_starts_repeat_and_leave_the_global_random_state():
    first, *_ = started("llama", 2)
    state = torch.get_rng_state()
    torch.rand(5)
    second, *_ = started("llama", 2)
    torch.set_rng_state(state)
    for (_, a), (_, b) in zip(named(first), named(second), strict=True):
        assert torch.equal(a.lora_A, b.lora_A)
        assert torch.equal(a.lora_B, b.lora_B)


def test_autocast_is_for_the_passes_and_not_for_the_start():
    def rows(dtype, size):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 200))
        attach(model, LoRA(rank=4, targets=["0", "2"]), seed=0)
        loss = lambda model, x: (model(x).float().square().mean() * size, torch.tensor(1))  # noqa: E731
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            initialise(model, LoRAGA(), [torch.randn(9, 200)], loss=loss)
        B = model[2].adapter.lora_B.detach()
        return B @ B.T  # whatever the signs

    exact = rows(None, 1.0)
    for size in (1e-4, 1.0, 1e3):  # neither lost nor infinite in fp16
        found = rows(torch.float16, size)
        assert (found - exact).norm() < 1e-2 * exact.norm(), size


# --- on text that was not seen -----------------------------------------------------------------


def stories():
    """A trained model of 260 thousand weights, and instructions it has not seen."""
    if not (STORIES.is_dir() and ALPACA.is_file()):
        pytest.skip("needs a small trained model and some text")
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    texts = [record["output"] for record in json.loads(ALPACA.read_text())]
    rows = [tokenizer(text).input_ids[:48] for text in texts if len(text) > 300][:96]
    rows = torch.tensor(rows)
    return model, [{"input_ids": part, "labels": part} for part in rows.split(8)]


def tiny():
    """The model that comes with the library, and its own tasks."""
    data = InstructionDataModule(tokenizer=load_tokenizer("tiny"), batch_size=8)
    data.setup("fit")
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(12), strict=False)]
    return load_base("tiny", torch.float32), batches


@pytest.mark.parametrize("source", [stories, tiny])
def test_the_first_step_points_along_the_gradient_of_unseen_batches(source):
    cosines = {}
    starts = {"lora": (None, 0), "pissa": (PiSSA(), 0), "one": (LoRAGA(), 1), "four": (LoRAGA(), 4)}
    for name, (initialiser, count) in starts.items():
        model, data = source()
        attach(model, LoRA(rank=8, alpha=8), seed=0)
        if initialiser is not None:
            initialise(model, initialiser, data[:count])
        G = base_gradients(model, data[4:])
        D = {
            n: a.scale**2 * direction(a.lora_A.detach(), a.lora_B.detach(), G[n])
            for n, a in named(model)
        }
        whole = [torch.cat([x[n].flatten() for n in G]) for x in (D, G)]
        cosines[name] = cosine(*whole)
    assert cosines["lora"] < 0.4  # measured: .29 and .21
    assert cosines["pissa"] < 0.75  # .41 and .64
    assert 0.8 < cosines["one"] < cosines["four"]  # .89 and .83, .90 and .89
