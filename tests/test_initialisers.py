"""PiSSA (2404.02948), OLoRA (2406.01775) and MiLoRA (2406.09044) against dense factorisations.

Each paper writes W = W_res + s B0 A0, freezes W_res and trains from A0, B0. Here W stays as it is
and the adapter subtracts s B0 A0, which must be the same start, with the same gradients.
"""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lit_adapters import DoRA, Kaiming, LoRA, MiLoRA, OLoRA, PiSSA, attach, initialise, merge
from lit_adapters.initialisers.svd import leading_svd
from tests.models import base_bytes, batch, fingerprint, gpt2, llama, logits, shake, shape_of
from tests.reference import (
    LAYERS,
    OneLayer,
    close,
    effective,
    inputs,
    matrix,
    one_layer,
    product,
    run,
)

RANK, ALPHA = 3, 5
SCALES = {False: ALPHA / RANK, True: ALPHA / RANK**0.5}  # by rslora


def pissa(W, r, s):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / s).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


def milora(W, r, s):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[-r:] / s).sqrt()
    return root[:, None] * Vh[-r:], U[:, -r:] * root


def olora(W, r, s):
    Q, R = torch.linalg.qr(W)
    return R[:r], Q[:, :r]


PAPERS = {
    "pissa": (PiSSA(niter=None), pissa),
    "olora": (OLoRA(), olora),
    "milora": (MiLoRA(), milora),
}
STARTS = {**{name: start for name, (start, _) in PAPERS.items()}, "pissa-niter": PiSSA(niter=4)}

every_layer = pytest.mark.parametrize("kind", LAYERS)
every_paper = pytest.mark.parametrize("paper", PAPERS)
every_start = pytest.mark.parametrize("start", STARTS)


def started(kind, start, dtype=torch.float32, spec=LoRA, **settings):
    """The model at its start, and the layer as it was."""
    model = one_layer(kind).to(dtype)
    stock = copy.deepcopy(model.layer)
    attach(model, spec(**{"rank": RANK, "alpha": ALPHA, "targets": ["layer"], **settings}), seed=0)
    initialise(model, start, seed=0)
    return model, stock


def quietly(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def groups_of(layer, adapter):
    """Weight, A and B of each group: W (out / g, in), A (rank, in), B (out / g, rank)."""
    groups = getattr(layer, "groups", 1)
    parts = (matrix(layer), adapter.lora_A.detach(), adapter.lora_B.detach())
    return list(zip(*(part.chunk(groups) for part in parts), strict=True))


# ---------------------------------------------------------------- the factors


@every_layer
@every_paper
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_factors_are_the_papers(kind, paper, rslora, dtype):
    start, reference = PAPERS[paper]
    model, stock = started(kind, start, dtype, rslora=rslora)
    adapter = model.layer.adapter
    assert adapter.scale == pytest.approx(SCALES[rslora])
    for W, A, B in groups_of(stock, adapter):
        expected_A, expected_B = reference(W, RANK, SCALES[rslora])
        assert A.dtype == B.dtype == torch.float32
        close(B @ A, expected_B @ expected_A)
        close(A @ A.T, expected_A @ expected_A.T)  # free of the pairs' signs
        close(B.T @ B, expected_B.T @ expected_B)


@every_layer
@every_start
def test_the_origin_is_pinned_frozen_and_equal_to_the_start(kind, start):
    adapter = started(kind, STARTS[start])[0].layer.adapter
    for now, then in [("lora_A", "lora_A0"), ("lora_B", "lora_B0")]:
        now, then = adapter.get_parameter(now), adapter.get_parameter(then)
        assert torch.equal(now, then)
        assert now.data_ptr() != then.data_ptr()
        assert now.requires_grad
        assert not then.requires_grad
        assert torch.count_nonzero(now)


def spectrum(kind, start, **settings):
    """||W_res||_2 / sigma_{r+1}, and how far A A^T and B^T B are from S_r / s, worst group."""
    model, stock = started(kind, start, **settings)
    adapter, ratios, defects = model.layer.adapter, [], []
    if isinstance(start, Kaiming):
        shake(model, std=0.5)
    for W, A, B in groups_of(stock, adapter):
        S = torch.linalg.svdvals(W)
        residual = W - adapter.scale * B @ A
        ratios.append(torch.linalg.matrix_norm(residual, 2) / S[RANK])
        wanted = torch.diag(S[:RANK] / adapter.scale)
        defects += [(gram - wanted).abs().max() for gram in (A @ A.T, B.T @ B)]
    return torch.stack(ratios), torch.stack(defects)


@every_layer
@pytest.mark.parametrize("rslora", [False, True])
def test_what_pissa_leaves_behind_begins_at_the_next_singular_value(kind, rslora):
    ratios, defects = spectrum(kind, PiSSA(niter=None), rslora=rslora)
    assert ((ratios - 1).abs() <= 1e-4).all()
    assert (defects <= 1e-5).all()


@every_layer
@pytest.mark.parametrize("fake", ["milora", "random"])
def test_that_check_tells_pissa_from_other_starts(kind, fake):
    ratios, defects = spectrum(kind, MiLoRA() if fake == "milora" else Kaiming())
    assert ((ratios - 1).abs() > 0.05).all()
    assert (defects > 0.05).all()


@every_layer
def test_what_milora_leaves_behind_has_lost_its_smallest_directions(kind):
    model, stock = started(kind, MiLoRA())
    for W, A, B in groups_of(stock, model.layer.adapter):
        before = torch.linalg.svdvals(W)
        after = torch.linalg.svdvals(W - model.layer.adapter.scale * B @ A)
        close(after[:-RANK], before[:-RANK])
        assert before[-RANK] > 1e-2
        assert (after[-RANK:] <= 1e-5).all()


@every_layer
def test_oloras_b_is_orthonormal_and_its_a_upper_triangular(kind):
    model, stock = started(kind, OLoRA())
    for _, A, B in groups_of(stock, model.layer.adapter):
        close(B.T @ B, torch.eye(RANK))
        assert A.tril(-1).abs().max() <= 1e-6 * A.abs().max()


# ---------------------------------------------------------------- start and gradients


@every_layer
@every_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_start_is_the_base_to_the_bit_and_its_bytes_are_untouched(kind, start, dtype):
    model, stock = started(kind, STARTS[start], dtype)
    x = inputs(stock)
    assert fingerprint(model.layer.weight) == fingerprint(stock.weight)
    assert torch.equal(model(x), stock(x))
    assert torch.equal(model.train()(x), stock(x))


@pytest.mark.parametrize("build", [llama, gpt2])
@every_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [LoRA, DoRA])
def test_a_model_starts_at_its_base_to_the_bit(build, start, dtype, spec):
    model, stock = build().to(dtype), build().to(dtype)
    names = attach(model, spec(rank=4, alpha=4), seed=0)
    assert initialise(model, STARTS[start]) == names
    assert torch.equal(logits(model), logits(stock))
    assert base_bytes(model) == base_bytes(stock)


@every_layer
@every_paper
@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_at_the_start_are_those_of_the_papers_residual_form(kind, paper, rslora):
    start, _ = PAPERS[paper]
    model, stock = started(kind, start, rslora=rslora)
    adapter, x, groups = model.layer.adapter, inputs(stock), getattr(stock, "groups", 1)
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    residual = matrix(stock) - SCALES[rslora] * product(A, B, groups).detach()
    model(x).square().sum().backward()
    run(stock, residual + SCALES[rslora] * product(A, B, groups), x).square().sum().backward()
    for found, expected in [(adapter.lora_A.grad, A.grad), (adapter.lora_B.grad, B.grad)]:
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert adapter.lora_A0.grad is None
    assert adapter.lora_B0.grad is None


@every_layer
@every_paper
def test_ten_steps_follow_the_papers_residual_form(kind, paper):
    start, _ = PAPERS[paper]
    model, stock = started(kind, start)
    adapter, x, groups = model.layer.adapter, inputs(stock), getattr(stock, "groups", 1)
    A, B = (p.detach().clone().requires_grad_() for p in (adapter.lora_A, adapter.lora_B))
    residual = matrix(stock) - adapter.scale * product(A, B, groups).detach()

    def theirs():
        return run(stock, residual + adapter.scale * product(A, B, groups), x)

    target = torch.randn(model(x).shape)
    for parameters, forward in [
        ([adapter.lora_A, adapter.lora_B], lambda: model(x)),
        ([A, B], theirs),
    ]:
        optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            (forward() - target).square().mean().backward()
            optimizer.step()
    assert (adapter.lora_A - adapter.lora_A0).norm() > 1e-3
    close(adapter.lora_A, A)
    close(adapter.lora_B, B)
    close(model(x), theirs())


@every_layer
@every_start
@pytest.mark.parametrize("spec", [LoRA, DoRA])
def test_a_trained_start_is_the_equation_and_merges_to_a_stock_layer(kind, start, spec):
    model, stock = started(kind, STARTS[start], spec=spec)
    shake(model)
    x, W = inputs(stock), effective(stock, model.layer.adapter)
    assert (W - matrix(stock)).norm() > 0.1
    close(model(x), run(stock, W, x))
    merge(model)
    close(matrix(model.layer), W)
    assert shape_of(model) == shape_of(OneLayer(stock))


@every_layer
@every_start
def test_merging_at_the_start_gives_the_base_weight(kind, start):
    model, stock = started(kind, STARTS[start])
    merge(model)
    close(matrix(model.layer), matrix(stock), 1e-6)


@pytest.mark.usefixtures("drawn_alike")
@pytest.mark.parametrize("kind", ["linear", "conv1d-hf", "conv2d", "conv2d-groups"])
@every_paper
def test_dropout_drops_the_input_of_b_a_and_not_of_the_origin(kind, paper):
    model, stock = started(kind, PAPERS[paper][0], dropout=0.5)
    adapter, x, groups = shake(model).layer.adapter, inputs(stock), getattr(stock, "groups", 1)
    torch.manual_seed(7)
    found = model.train()(x)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    residual = matrix(stock) - adapter.scale * product(adapter.lora_A0, adapter.lora_B0, groups)
    branch = adapter.scale * product(adapter.lora_A, adapter.lora_B, groups)
    no_bias = run(stock, torch.zeros_like(residual), x)
    close(found, run(stock, residual, x) + run(stock, branch, dropped) - no_bias)


# ---------------------------------------------------------------- settings and errors


@pytest.mark.parametrize("start", ["pissa", "pissa-niter", "milora"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_alpha_zero_is_refused_where_the_start_is_divided_by_the_scale(start, kind):
    with pytest.raises(ValueError, match="alpha"):
        started(kind, STARTS[start], alpha=0)


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_olora_divides_by_nothing_and_alpha_zero_is_the_base_whatever_is_trained(kind):
    model, stock = started(kind, OLoRA(), alpha=0)
    x = inputs(stock)
    assert torch.equal(shake(model)(x), stock(x))


@every_paper
def test_each_layer_is_split_at_its_own_rank_and_scale(paper):
    model = llama()
    spec = LoRA(
        rank=4,
        alpha=6,
        rank_pattern={"q_proj": 2, "down_proj": 7},
        alpha_pattern={"v_proj": 3, "down_proj": 10},
    )
    attach(model, spec)
    initialise(model, PAPERS[paper][0])
    inner = model.model.layers[1]
    for layer, rank, alpha in [
        (inner.self_attn.q_proj, 2, 6),
        (inner.self_attn.v_proj, 4, 3),
        (inner.mlp.down_proj, 7, 10),
        (inner.mlp.up_proj, 4, 6),
    ]:
        adapter = layer.adapter
        assert adapter.scale == pytest.approx(alpha / rank)
        A, B = PAPERS[paper][1](layer.weight.detach(), rank, alpha / rank)
        assert adapter.lora_A.shape == A.shape
        close(adapter.lora_B @ adapter.lora_A, B @ A)


@every_start
def test_going_back_to_a_zero_start_unpins_the_origin(start):
    model, stock = started("linear", STARTS[start])
    initialise(model, Kaiming(), seed=0)
    adapter, x = model.layer.adapter, inputs(stock)
    assert adapter.lora_A0 is None
    assert adapter.lora_B0 is None
    assert torch.count_nonzero(adapter.lora_B) == 0
    assert torch.equal(model(x), stock(x))
    shake(model)
    close(model(x), run(stock, effective(stock, adapter), x))


def test_full_rank_pissa_leaves_nothing_behind():
    model, stock = started("linear", PiSSA(niter=None), rank=12, alpha=12)
    adapter = model.layer.adapter
    close(adapter.lora_B @ adapter.lora_A, matrix(stock), 1e-6)


# ---------------------------------------------------------------- the fast SVD, and its seed


def power_law(size=512, power=0.35, seed=0):
    """A square matrix whose i-th singular value is i ** -power, and its right directions."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=generator))[0] for _ in range(2))
    return (U * torch.arange(1, size + 1) ** -power) @ V.T, U, V


def test_the_fast_svd_finds_the_principal_directions_of_a_slow_spectrum():
    W, U, V = power_law()
    model = OneLayer(nn.Linear(512, 512, bias=False))
    with torch.no_grad():
        model.layer.weight.copy_(W)
    attach(model, LoRA(rank=16, alpha=16, targets=["layer"]))
    overlaps = {}
    for niter in (0, 4):
        initialise(model, PiSSA(niter=niter), seed=0)
        A, B = model.layer.adapter.lora_A.detach(), model.layer.adapter.lora_B.detach()
        overlaps[niter] = [
            (torch.linalg.qr(found)[0].T @ true[:, :16]).square().sum().item() / 16
            for found, true in [(A.T, V), (B, U)]
        ]
        close(A @ A.T, B.T @ B)  # the singular values are shared out evenly all the same
    assert min(overlaps[4]) > 0.97
    assert max(overlaps[0]) < 0.9  # the check is no formality
    S = torch.arange(1, 513) ** -0.35
    residual = torch.linalg.matrix_norm(W - B @ A, 2)
    assert residual == pytest.approx(S[16].item(), rel=0.01)
    x = torch.randn(5, 512)
    close(model(x), x @ W.T, 1e-6)


@every_start
def test_values_depend_on_the_seed_and_the_layers_name_alone(start):
    def factors(build_first=0, noise=0, targets="all-linear", seed=3):
        torch.manual_seed(noise)
        model = llama()
        torch.rand(build_first)
        attach(model, LoRA(rank=4, alpha=4, targets=targets), seed=noise)
        state = torch.get_rng_state()
        initialise(model, STARTS[start], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        adapter = model.model.layers[1].self_attn.q_proj.adapter
        return torch.cat([adapter.lora_A.flatten(), adapter.lora_B.flatten()])

    first = factors()
    assert torch.equal(factors(build_first=17, noise=5), first)
    assert torch.equal(factors(targets=["q_proj"]), first)


def test_another_seed_gives_another_fast_svd():
    wide = [OneLayer(nn.Linear(300, 200, bias=False)) for _ in range(2)]
    wide[1].load_state_dict(wide[0].state_dict())
    for seed, model in enumerate(wide):
        attach(model, LoRA(rank=4, alpha=4, targets=["layer"]), seed=0)
        initialise(model, PiSSA(niter=0), seed=seed)
    assert not torch.equal(wide[0].layer.adapter.lora_A, wide[1].layer.adapter.lora_A)


@pytest.mark.parametrize("seed", range(40))
def test_rounding_turns_no_direction_of_the_fast_svd(seed):
    generator = torch.Generator().manual_seed(seed)
    random = partial(torch.randn, generator=generator)
    # Of rank 8: the range finder's other 16 columns are rounding.
    G = random(128, 8) * 0.7 ** torch.arange(8) @ random(8, 96)
    rounded = G * (1 + 1e-7 * random(128, 96))
    found = [leading_svd(matrix, 8, 4, torch.Generator().manual_seed(1)) for matrix in (G, rounded)]
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-4)


SPECTRA = {
    "power law": lambda k: k**-0.5,
    "slow": lambda k: k**-0.35,
    "steep": lambda k: k**-1.5,
    "outlier": lambda k: torch.where(k == 1, 50.0, (k - 1).clamp(min=1) ** -0.35),
    "over a bulk": lambda k: 3 * k**-0.8 + 0.9 - 0.8 * k / len(k),
    "into noise": lambda k: (-k / 8).exp() + 1e-3,
}


def of_spectrum(spectrum, m, n):
    """A matrix with these singular values in random directions, float64."""
    generator = torch.Generator().manual_seed(0)
    k = min(m, n)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    U, V = (torch.linalg.qr(random(d, k)).Q for d in (m, n))
    return U * SPECTRA[spectrum](torch.arange(1, k + 1, dtype=torch.float64)) @ V.T


def random_matrix(m, n):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def iterated(W, rank, niter=64, **goal):
    return leading_svd(W.float(), rank, niter, torch.Generator().manual_seed(1), **goal)


def error(found, W, rank):
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    exact = U[:, :rank] * S[:rank] @ Vh[:rank]
    U, S, Vh = (part.double() for part in found)
    return ((U * S @ Vh - exact).norm() / exact.norm()).item()


def is_orthonormal(U, Vh, tolerance=1e-5):
    return all((G - torch.eye(len(G))).abs().max() < tolerance for G in (U.T @ U, Vh @ Vh.T))


@pytest.mark.parametrize("shape", [(320, 320), (600, 256), (256, 600)])
@pytest.mark.parametrize("rank", [4, 30])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_iteration_ends_within_1e_4_of_the_exact_part(spectrum, rank, shape):
    W = of_spectrum(spectrum, *shape)
    U, S, Vh = found = iterated(W, rank)
    assert error(found, W, rank) < 1e-4
    close(S.double(), torch.linalg.svdvals(W)[:rank], 5e-5)
    assert is_orthonormal(U, Vh)
    short = error(iterated(W, rank, niter=1), W, rank)
    assert short > 1e-4 or spectrum in ("steep", "into noise")  # or nothing was iterated


@pytest.mark.parametrize("shape", [(320, 320), (600, 256), (256, 600)])
@pytest.mark.parametrize("rank", [4, 30])
def test_of_a_flat_spectrum_the_leading_energy_is_found(rank, shape):
    """Directions of nearly equal values mix, even in exact arithmetic on rounded numbers."""
    W = random_matrix(*shape)
    most = torch.linalg.svdvals(W)[:rank].square().sum()
    U, _, Vh = found = iterated(W, rank)
    assert is_orthonormal(U, Vh)
    assert error(found, W, rank) < 2e-4
    for energy in ((W @ Vh.T.double()).square().sum(), (U.T.double() @ W).square().sum()):
        assert energy.item() == pytest.approx(most.item(), rel=2e-6)  # rounding
    few = (W @ iterated(W, rank, niter=1)[2].T.double()).square().sum()
    assert few < 0.999 * most  # the check is no formality


def test_where_all_values_are_equal_the_iteration_ends_as_well():
    U, S, Vh = iterated(torch.linalg.qr(random_matrix(200, 200)).Q, 8)
    close(S, torch.ones(8))
    assert is_orthonormal(U, Vh)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_what_has_few_directions_is_found_at_any_size(size):
    W = random_matrix(200, 5) @ random_matrix(5, 120) * size
    U, S, Vh = found = iterated(W, 8)  # three more than there are
    assert error(found, W, 8) < 1e-5
    assert is_orthonormal(U, Vh)
    assert (S[5:] < 1e-5 * S[0]).all()


def test_a_matrix_of_zeros_has_components_of_zero():
    U, S, Vh = iterated(torch.zeros(200, 120), 8)
    assert not torch.count_nonzero(U * S @ Vh)


def test_a_lower_goal_takes_less_work():
    W = of_spectrum("slow", 320, 320)
    work = {}
    for goal in (1e-4, 1e-2):
        with FlopCounterMode(display=False) as counter:
            found = iterated(W, 16, accuracy=goal)
        assert error(found, W, 16) < goal
        work[goal] = counter.get_total_flops()
    assert work[1e-2] < 0.75 * work[1e-4]
    assert work[1e-4] < 2 * 320 * 320 * 32 * 30  # 30 products with 32 columns


@pytest.mark.parametrize(("rank", "niter"), [(20, None), (50, 4)])
@pytest.mark.parametrize("shape", [(256, 300), (300, 256)])
def test_without_iterations_or_where_they_save_nothing_it_is_exact(rank, niter, shape):
    W = random_matrix(*shape)
    assert error(iterated(W, rank, niter), W, rank) < 2e-5


# ---------------------------------------------------------------- parity with PEFT

peft = pytest.importorskip("peft")
FAMILIES = {"llama": llama, "gpt2": gpt2}


def peft_model(family, start, rslora):
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        target_modules="all-linear",
        init_lora_weights=start,
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    return quietly(lambda: peft.get_peft_model(FAMILIES[family](), config)).eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("family", "paper"),
    [("llama", "pissa"), ("gpt2", "pissa"), ("llama", "olora")],  # their OLoRA has no Conv1D
)
def test_factors_residual_gradients_and_output_agree_with_peft(family, paper, rslora):
    other = peft_model(family, paper, rslora)
    model = FAMILIES[family]()
    names = attach(model, LoRA(rank=4, alpha=6, rslora=rslora), seed=0)
    initialise(model, PAPERS[paper][0])
    close(logits(model), logits(other), 1e-4)  # theirs has rounded its residual
    other(**batch()).loss.backward()
    model(**batch()).loss.backward()
    for name in names:
        layer, theirs_layer = model.get_submodule(name), other.base_model.model.get_submodule(name)
        A, B = (getattr(theirs_layer, part)["default"].weight for part in ("lora_A", "lora_B"))
        adapter = layer.adapter
        close(adapter.lora_B @ adapter.lora_A, B @ A)
        residual = layer.weight.detach().clone()
        origin = adapter.scale * (adapter.lora_B0 @ adapter.lora_A0).detach()
        residual -= origin.T if family == "gpt2" else origin
        close(residual, theirs_layer.base_layer.weight.detach())
        signs = (adapter.lora_A * A).sum(1).sign()  # a singular pair may be turned
        close(adapter.lora_A, signs[:, None] * A)
        close(adapter.lora_B, B * signs)
        for found, expected in [
            (adapter.lora_A.grad, signs[:, None] * A.grad),
            (adapter.lora_B.grad, B.grad * signs),
        ]:
            assert (found - expected).norm() <= 1e-4 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("size", [1e-25, 1e-21, 1.0, 1e19])
def test_the_size_of_a_matrix_does_not_matter_to_its_directions(size):
    torch.manual_seed(0)
    matrix = torch.randn(256, 8) @ torch.randn(8, 256) + 0.01 * torch.randn(256, 256)
    U, S, Vh = leading_svd(matrix * size, 8, 16, torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(matrix.double())[:8]
    torch.testing.assert_close(S.double() / size, expected, rtol=1e-4, atol=0)
    torch.testing.assert_close((U * (S / size)) @ Vh, matrix, rtol=0, atol=0.06)
