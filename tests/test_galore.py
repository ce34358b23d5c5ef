"""GaLore's engine around plain torch optimizers, against galore_torch and against arithmetic."""

import copy
import io
import math
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import SGD, Adam, AdamW, RMSprop
from transformers import Adafactor
from transformers.pytorch_utils import Conv1D

from lit_adapters.optim import SHADOW, GaLoreEngine, Projection, projection
from lit_adapters.optim.projection import project, projected_shape, rotate, subspace
from lit_adapters.optim.rounding import round_stochastically

pytestmark = [
    pytest.mark.filterwarnings("ignore:This implementation of AdamW:FutureWarning"),
    # Paging needs a GPU; on a CPU these are the ordinary 8-bit optimizers.
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
]

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"tall": (20, 8), "wide": (7, 22), "square": (12, 12)}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


class Chain(nn.Module):
    """Linear layers without biases and tanh between them."""

    def __init__(self, *sizes, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        pairs = list(zip(sizes, sizes[1:], strict=False))
        self.layers = nn.ModuleList(nn.Linear(*pair, bias=False, dtype=dtype) for pair in pairs)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = layer(x).tanh()
        return self.layers[-1](x)


def chain_of(shape, **options):
    """A chain whose second layer has the given shape (out, in)."""
    return Chain(6, shape[1], shape[0], 5, **options)


def data(step, model, rows=16):
    """Inputs and targets of a step, of the model's sizes and dtype."""
    generator = torch.Generator().manual_seed(100 + step)
    first, last = model.layers[0].weight, model.layers[-1].weight
    x = torch.randn(rows, first.shape[1], generator=generator, dtype=torch.float64)
    y = torch.randn(rows, last.shape[0], generator=generator, dtype=torch.float64)
    return x.to(first.dtype), y.to(first.dtype)


def loss_of(model, step, rows=slice(None)):
    x, y = data(step, model)
    return F.mse_loss(model(x[rows]).double(), y[rows].double())


def engine_for(model, optimizer, *, only=None, **settings):
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight")}
    chosen = {n: m for n, m in layers.items() if only is None or n in only}
    how = Projection(**{"svd": "exact", **settings})  # whose signs are those of the references
    return GaLoreEngine(chosen, optimizer, how, seed=0)


def step(model, optimizer, number, parts=1, engine=None):
    """One optimizer step over ``parts`` micro-batches."""
    optimizer.zero_grad()
    total = 0.0
    for part in range(parts):
        if engine is not None:
            engine.accumulating = part < parts - 1
        loss = loss_of(model, number, slice(part * 16 // parts, (part + 1) * 16 // parts)) / parts
        loss.backward()
        total += loss.item()
    optimizer.step()
    return total


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if SHADOW not in n}


def distance(found, expected):
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@every_shape
def test_it_is_galore_torch_across_subspaces(shape, decay, side):
    GaLoreAdamW = pytest.importorskip("galore_torch").GaLoreAdamW
    ours, theirs = chain_of(shape), chain_of(shape)
    # The two add eps in different places; both sides' first projection is diagonal but for noise.
    options = {"lr": 0.02, "eps": 1e-20 if side == "full" else 1e-12, "weight_decay": 0.0}

    def groups(model, **more):  # theirs decays ordinary weights after the step, torch before
        first, middle, last = model.parameters()
        return [{"params": [first, last]}, {"params": [middle], "weight_decay": decay, **more}]

    mine = AdamW(groups(ours), **options)
    engine_for(ours, mine, only=["layers.1"], rank=3, update_gap=5, scale=0.7, side=side)
    how = {"rank": 3, "update_proj_gap": 5, "scale": 0.7, "proj_type": side}
    reference = GaLoreAdamW(groups(theirs, **how), **options, no_deprecation_warning=True)
    start = weights(ours)
    for number in range(13):
        assert step(ours, mine, number) == pytest.approx(step(theirs, reference, number), abs=1e-6)
    difference = distance(weights(ours), weights(theirs))
    print(f"{shape} {side} {decay}: {difference:.1e}")
    assert difference < 1e-6
    assert distance(weights(ours), start) > 1e-2


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "maximize": True}]
)
@every_shape
def test_at_full_rank_sgd_is_sgd_whatever_the_subspace(shape, options, momentum):
    ours, theirs = (chain_of(shape, dtype=torch.float32) for _ in range(2))
    options = {"lr": 0.1, "momentum": momentum, **options}
    mine, plain = SGD(ours.parameters(), **options), SGD(theirs.parameters(), **options)
    how = {"rank": min(shape), "update_gap": 3, "scale": 1.0, "moments": "rotate"}
    engine_for(ours, mine, only=["layers.1"], **how)
    for number in range(10):
        step(ours, mine, number)
        step(theirs, plain, number)
    assert distance(weights(ours), weights(theirs)) < 3e-6
    assert distance(weights(ours), weights(chain_of(shape, dtype=torch.float32))) > 5e-3


def test_kept_and_reset_momentum_are_other_algorithms():
    ends = {}
    for moments in ("keep", "reset", "rotate"):
        model = chain_of((20, 8))
        optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
        engine_for(model, optimizer, rank=2, update_gap=3, moments=moments)
        for number in range(8):
            step(model, optimizer, number)
        ends[moments] = weights(model)
    assert distance(ends["keep"], ends["reset"]) > 1e-4
    assert distance(ends["keep"], ends["rotate"]) > 1e-4
    assert distance(ends["reset"], ends["rotate"]) > 1e-4


def test_a_reset_starts_the_optimizer_anew_at_the_change_only():
    model = chain_of((20, 8))
    optimizer = AdamW(model.parameters(), lr=0.01)
    engine = engine_for(model, optimizer, rank=2, update_gap=3, moments="reset", only=["layers.1"])
    shadow, counts = engine.projected["layers.1"].shadow, []
    for number in range(7):
        step(model, optimizer, number)
        counts.append(int(optimizer.state[shadow]["step"]))
    assert counts == [1, 2, 3, 1, 2, 3, 1]


def by_hand(model, make, steps, *, rank, gap, scale, decay="decoupled"):
    """The algorithm in a straight line: full gradients, a low-rank parameter, a step, and back."""
    middle, ends = model.layers[1].weight, [model.layers[0].weight, model.layers[2].weight]
    low = nn.Parameter(torch.zeros(middle.shape[0], rank, dtype=middle.dtype))  # m >= n
    optimizer = make([{"params": [*ends, low]}])
    P = None
    for number in range(steps):
        model.zero_grad()
        loss_of(model, number).backward()
        G = middle.grad
        if number % gap == 0:
            P = torch.linalg.svd(G.float(), full_matrices=False).Vh[:rank].to(G.dtype)
        group = optimizer.param_groups[0]
        wd = group.get("weight_decay", 0.0)
        low.grad = G @ P.T
        if decay == "coupled":
            low.grad += wd * middle.detach() @ P.T
        optimizer.step()
        with torch.no_grad():
            middle += scale * low @ P
            if decay == "decoupled":
                middle *= 1 - group["lr"] * wd
            low.zero_()
    return weights(model)


def bnb(name, **options):
    def make(groups):
        optim = pytest.importorskip("bitsandbytes").optim
        return getattr(optim, name)(groups, lr=0.01, **options)

    return make


def unscaled_adafactor(groups):
    options = {"scale_parameter": False, "relative_step": False, "weight_decay": 0.1}
    return Adafactor(groups, lr=0.01, **options)


OPTIMIZERS = {
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "adamw-amsgrad": lambda p: AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.1),
    "adam-decoupled": lambda p: Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.01, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.03, weight_decay=0.1),
    "adafactor": unscaled_adafactor,
    "bnb-adam": bnb("Adam", weight_decay=0.1),
    "bnb-adamw-8bit": bnb("AdamW8bit", weight_decay=0.1, min_8bit_size=16),
    "bnb-paged-adamw-8bit": bnb("PagedAdamW8bit", weight_decay=0.1, min_8bit_size=16),
    "bnb-lion": bnb("Lion", weight_decay=0.1),
    "bnb-lion-8bit": bnb("Lion8bit", weight_decay=0.1, min_8bit_size=16),
    "bnb-rmsprop": bnb("RMSprop", weight_decay=0.1),
}
COUPLED = {"adam", "sgd", "rmsprop", "nadam", "adamax", "bnb-rmsprop"}
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS)


@every_optimizer
def test_around_any_optimizer_it_is_the_algorithm_by_hand(kind):
    """Of fp32 weights: bitsandbytes knows no fp64."""
    ours, theirs = (chain_of((20, 8), dtype=torch.float32) for _ in range(2))
    optimizer = OPTIMIZERS[kind](ours.parameters())
    how = {"rank": 3, "scale": 0.5}
    engine_for(ours, optimizer, only=["layers.1"], update_gap=4, **how)
    losses = [step(ours, optimizer, number) for number in range(9)]
    decay = "coupled" if kind in COUPLED else "decoupled"
    expected = by_hand(theirs, OPTIMIZERS[kind], 9, gap=4, decay=decay, **how)
    assert distance(weights(ours), expected) < 1e-5
    assert distance(weights(ours), weights(chain_of((20, 8), dtype=torch.float32))) > 1e-3
    assert all(map(math.isfinite, losses))


@every_optimizer
def test_the_loss_falls_under_any_optimizer(kind):
    model = Chain(16, 32, 16, dtype=torch.float32)
    optimizer = OPTIMIZERS[kind](model.parameters())
    engine_for(model, optimizer, rank=4, update_gap=10)
    losses = [step(model, optimizer, 0) for _ in range(40)]  # one batch, to be learned by heart
    assert losses[-1] < 0.8 * losses[0]


def test_updates_have_the_rank_and_more_with_every_change_of_subspace():
    model = Chain(6, 24, 20, 5)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    engine_for(model, optimizer, only=["layers.1"], rank=3, update_gap=4)
    start = model.layers[1].weight.detach().clone()
    ranks = []
    for number in range(12):
        step(model, optimizer, number)
        moved = model.layers[1].weight.detach() - start
        ranks.append(torch.linalg.matrix_rank(moved, rtol=1e-9).item())
    assert ranks == [3] * 4 + [6] * 4 + [9] * 4


def test_decay_takes_the_rate_of_the_moment_and_no_scale():
    """The only thing that moves here is the decay: gradients are zero."""
    model = chain_of((20, 8))
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.5**n)
    engine_for(model, optimizer, only=["layers.1"], rank=3, scale=0.01)
    start = model.layers[1].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        (0 * loss_of(model, 0)).backward()
        optimizer.step()
        schedule.step()
    factor = (1 - 0.1 * 0.5) * (1 - 0.05 * 0.5) * (1 - 0.025 * 0.5)
    torch.testing.assert_close(model.layers[1].weight.detach(), factor * start)


# ---------------------------------------------------------------- what it holds


@every_shape
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_state_has_the_size_of_the_paper(shape, side):
    model = chain_of(shape, dtype=torch.float32)
    optimizer = AdamW(model.parameters(), lr=0.01)
    engine = engine_for(model, optimizer, only=["layers.1"], rank=3, side=side)
    step(model, optimizer, 0)
    m, n = shape
    state = optimizer.state[engine.projected["layers.1"].shadow]
    right = {"std": m >= n, "reverse_std": m < n, "left": False, "right": True, "full": True}[side]
    low = (3, 3) if side == "full" else (m, 3) if right else (3, n)
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == low
    saved = engine.state_dict()["weights"]["layers.1"]
    bases = {key: value for key, value in saved.items() if isinstance(value, torch.Tensor)}
    sizes = {"left": (m, 3), "right": (3, n)}
    names = {"left", "right"} if side == "full" else {"right" if right else "left"}
    assert {key: tuple(value.shape) for key, value in bases.items()} == {k: sizes[k] for k in names}
    held = sum(t.nbytes for t in [state["exp_avg"], state["exp_avg_sq"], *bases.values()])
    if side == "std":
        short, long = min(m, n), max(m, n)
        assert held == 4 * (short * 3 + 2 * long * 3)
    for basis in bases.values():  # and keep no larger tensor alive
        assert basis.untyped_storage().nbytes() == basis.nbytes


def test_eight_bit_states_are_of_the_low_rank_and_a_byte_an_element():
    model = Chain(64, 256, 64, dtype=torch.float32)
    optimizer = bnb("AdamW8bit")(model.parameters())
    engine = engine_for(model, optimizer, rank=32)
    step(model, optimizer, 0)
    for one in engine.projected.values():
        state = optimizer.state[one.shadow]
        assert one.shadow.shape in {(256, 32), (32, 256)}
        for moment in ("1", "2"):
            assert state[f"state{moment}"].dtype == torch.uint8
            held = state[f"state{moment}"].nbytes + state[f"absmax{moment}"].nbytes
            assert held <= 1.02 * one.shadow.numel()


class Alive:
    """Counts full gradients that are alive, whoever holds them; to be built before the engine.

    Hooks run in the order they were made, so each gradient is seen before it is projected.
    """

    def __init__(self, model):
        self.seen, self.most = [], 0
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(self.look)

    def look(self, weight):
        if all(ref() is not weight.grad for ref in self.seen):
            self.seen.append(weakref.ref(weight.grad))
        self.most = max(self.most, sum(ref() is not None for ref in self.seen))

    def peak(self):
        most, self.most = self.most, 0
        return most


@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_no_full_gradient_is_alive_but_one_that_chooses(svd):
    """When gradients accumulate, those that choose a subspace wait for the last one."""
    model = Chain(16, 16, 16, 16, 16, 16)
    alive = Alive(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    step(model, optimizer, 0)
    assert alive.peak() == 5  # as it is without
    optimizer.zero_grad()
    engine = engine_for(model, optimizer, rank=2, update_gap=2, svd=svd)
    peaks = []
    for number, parts in enumerate([1, 1, 1, 1, 3, 3]):
        step(model, optimizer, number, parts, engine)
        peaks.append(alive.peak())
    assert peaks == [1, 0, 1, 0, 6, 0]
    assert all(one.kept is None for one in engine.projected.values())


# ---------------------------------------------------------------- accumulation


@pytest.mark.parametrize("kind", ["adamw", "sgd", "adafactor"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_train_like_one_batch(kind, parts):
    """Over several changes of subspace, each chosen from the whole window's gradient."""
    ends = []
    for pieces in (1, parts):
        model = chain_of((20, 8))
        optimizer = OPTIMIZERS[kind](model.parameters())
        engine = engine_for(model, optimizer, rank=3, update_gap=3)
        for number in range(8):
            step(model, optimizer, number, pieces, engine)
        ends.append(weights(model))
    assert distance(ends[0], ends[1]) < 1e-5
    assert distance(ends[0], weights(chain_of((20, 8)))) > 1e-2


def test_a_loop_that_says_nothing_chooses_by_its_first_micro_batch():
    """Then all gradients of the window are projected to that subspace: still one step's worth."""
    model, plain = chain_of((20, 8)), chain_of((20, 8))
    optimizer = SGD(model.parameters(), lr=0.1)
    engine = engine_for(model, optimizer, rank=3, only=["layers.1"])
    step(model, optimizer, 0, parts=4)
    loss_of(plain, 0, slice(4)).backward()
    first = torch.linalg.svd(plain.layers[1].weight.grad.float(), full_matrices=False).Vh[:3]
    P = engine.projected["layers.1"].projector.right
    torch.testing.assert_close(P, first.double())
    plain.zero_grad()
    loss_of(plain, 0).backward()
    R = plain.layers[1].weight.grad @ P.T
    torch.testing.assert_close(engine.projected["layers.1"].shadow.grad, R)


def test_a_window_that_is_given_up_leaves_nothing_behind():
    ends = []
    for given_up in (False, True):
        model = chain_of((20, 8))
        optimizer = AdamW(model.parameters(), lr=0.01)
        engine = engine_for(model, optimizer, rank=3, update_gap=2)
        for number in range(4):
            if given_up:
                engine.accumulating = True
                loss_of(model, 50 + number).backward()
            step(model, optimizer, number, 2, engine)
        ends.append(weights(model))
    assert distance(*ends) == 0


def test_weights_that_only_some_batches_of_a_window_use_are_stepped_all_the_same():
    """As experts are. One that no batch uses is not stepped, nor decayed, nor aged."""
    model = Chain(8, 8, 8, 8)
    optimizer = AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    engine = engine_for(model, optimizer, rank=2, update_gap=2)
    first, second, third = (one for one in engine.projected.values())
    x = torch.randn(4, 8, dtype=torch.float64)
    before = weights(model)
    engine.accumulating = True
    model.layers[1](x).square().sum().backward()
    engine.accumulating = False
    model.layers[0](x).square().sum().backward()
    engine.finish_window()  # before clipping
    assert second.shadow.grad.norm() > 0.1
    assert third.shadow.grad is None
    optimizer.step()
    after = weights(model)
    assert distance(after, before) > 1e-3
    assert torch.equal(after["layers.2.weight"], before["layers.2.weight"])
    assert not torch.equal(after["layers.1.weight"], before["layers.1.weight"])
    assert [one.age for one in (first, second, third)] == [1, 1, 0]
    assert [one.kept for one in (first, second, third)] == [None] * 3


# ---------------------------------------------------------------- clipping and loss scaling


def test_clipping_acts_on_what_is_stepped():
    model = chain_of((20, 8))
    optimizer = SGD(model.parameters(), lr=1.0)
    engine = engine_for(model, optimizer, only=["layers.1"], rank=3, scale=1.0)
    before = weights(model)
    loss_of(model, 0).backward()
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(stepped, 1e-3)
    assert norm > 1e-2
    optimizer.step()
    moved = [(value - before[name]).norm() for name, value in weights(model).items()]
    assert torch.stack(moved).norm().item() == pytest.approx(1e-3, rel=1e-3)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    nn.utils.clip_grad_value_(stepped, 1e-4)
    assert engine.projected["layers.1"].shadow.grad.abs().max().item() == pytest.approx(1e-4)


def scaled_steps(model, make, overflow_at=(), fused=False):
    """Six steps under a GradScaler; returns its scale after each."""
    optimizer, scaler, scales = make(model), torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    engine = engine_for(model, optimizer, only=["layers.1"], rank=3, update_gap=2)
    for number in range(6):
        optimizer.zero_grad()
        loss = loss_of(model, number)
        scaler.scale(loss * (math.inf if number in overflow_at else 1)).backward()
        if not fused:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, engine


SCALED = {
    "adamw": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1),
    "adamw-fused": lambda m: AdamW(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "sgd": lambda m: SGD(m.parameters(), lr=0.1, weight_decay=0.1),
    "adam-fused": lambda m: Adam(m.parameters(), lr=0.01, weight_decay=0.1, fused=True),
    "adafactor": lambda m: unscaled_adafactor(m.parameters()),
    "bnb-adamw-8bit": lambda m: OPTIMIZERS["bnb-adamw-8bit"](m.parameters()),
}


@pytest.mark.parametrize("kind", SCALED)
def test_loss_scaling_changes_nothing(kind):
    model, plain = (chain_of((20, 8), dtype=torch.float32) for _ in range(2))
    scales, _ = scaled_steps(model, SCALED[kind], fused="fused" in kind)
    optimizer = SCALED[kind](plain)
    engine_for(plain, optimizer, only=["layers.1"], rank=3, update_gap=2)
    for number in range(6):
        step(plain, optimizer, number)
    assert scales == [2.0**10] * 6
    assert distance(weights(model), weights(plain)) < 1e-5
    assert distance(weights(model), weights(chain_of((20, 8), dtype=torch.float32))) > 1e-2


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("overflow_at", [0, 2, 3])
def test_an_overflow_skips_the_step_and_puts_the_change_of_subspace_off(kind, overflow_at):
    """Whether the subspace was to change then (0, 2) or not (3); no step, no decay, no age."""
    model = chain_of((20, 8), dtype=torch.float32)
    seen = {}

    def make(model):
        optimizer = SCALED[kind](model)
        take = optimizer.zero_grad

        def zero_grad():
            seen[len(seen)] = weights(model)
            take()

        optimizer.zero_grad = zero_grad
        return optimizer

    scales, engine = scaled_steps(model, make, (overflow_at,), fused="fused" in kind)
    seen[6] = weights(model)
    assert scales[overflow_at] == 2.0**9
    for number in range(6):
        same = distance(seen[number + 1], seen[number]) == 0
        assert same == (number == overflow_at), number
    one = engine.projected["layers.1"]
    assert (one.steps, one.age) == (5, 1)
    assert all(value.isfinite().all() for value in weights(model).values())


def test_a_gradient_that_is_no_number_keeps_the_subspace_and_shows():
    model = chain_of((20, 8))
    optimizer = SGD(model.parameters(), lr=0.01)
    engine = engine_for(model, optimizer, only=["layers.1"], rank=3, update_gap=1)
    one = engine.projected["layers.1"]
    for number, finite in enumerate([False, True, False, True]):
        optimizer.zero_grad()
        before = one.projector
        (loss_of(model, number) * (1 if finite else math.nan)).backward()
        assert one.shadow.grad.isfinite().all() == finite
        assert (one.projector is before) == (not finite)
        if finite:
            optimizer.step()
    assert (one.steps, one.due) == (2, True)


# ---------------------------------------------------------------- outside of training


def test_a_step_without_gradients_changes_nothing():
    """torch builds the state of an optimizer, to save or load it, by a step on zeros."""
    model, other = chain_of((20, 8)), chain_of((20, 8))
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    engine = engine_for(model, optimizer, rank=3, update_gap=2)
    before = weights(model)
    state = get_optimizer_state_dict(model, optimizer)
    assert distance(weights(model), before) == 0
    assert all(
        (one.steps, one.age, one.projector) == (0, 0, None) for one in engine.projected.values()
    )
    assert {name for name in state["state"]} == {f"layers.{i}.{SHADOW}" for i in range(3)}
    # What was built is what torch builds for any parameters: moments of zeros.
    assert all(not entry["exp_avg"].any() for entry in state["state"].values())
    step(model, optimizer, 0)
    assert distance(weights(model), weights(other)) > 1e-3
    assert [one.steps for one in engine.projected.values()] == [1] * 3


def test_it_is_inert_while_it_is_not_active():
    model, plain = chain_of((20, 8)), chain_of((20, 8))
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    engine = engine_for(model, optimizer, rank=3)
    engine.active = False
    loss_of(model, 0).backward()
    loss_of(plain, 0).backward()
    for one, other in zip(model.layers, plain.layers, strict=True):
        assert torch.equal(one.weight.grad, other.weight.grad)
    optimizer.step()
    assert distance(weights(model), weights(plain)) == 0
    model.zero_grad()
    engine.active = True
    step(model, optimizer, 0)
    assert distance(weights(model), weights(plain)) > 1e-3


def test_a_backward_pass_inside_autocast_is_projected_in_full_precision():
    subspaces = []
    for block in (False, True):
        model = chain_of((20, 8), dtype=torch.float32)
        optimizer = SGD(model.parameters(), lr=0.1)
        engine = engine_for(model, optimizer, rank=3)
        x, y = data(0, model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(model(x), y)
            if block:
                loss.backward()
        if not block:
            loss.backward()
        subspaces.append([one.shadow.grad for one in engine.projected.values()])
    for found, expected in zip(*subspaces, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- layers


class Mixed(nn.Module):
    """One of each kind of layer that has a matrix."""

    def __init__(self, channels_last=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 12)
        self.hf = Conv1D(16, 12)
        self.conv = nn.Conv2d(4, 12, 3, padding=1, groups=2)
        self.line = nn.Conv1d(12, 10, 3)
        self.head = nn.Linear(10, 6)
        if channels_last:
            self.conv.to(memory_format=torch.channels_last)

    def forward(self, ids):
        hidden = self.hf(self.embedding(ids)).tanh()  # (8, 9, 16)
        hidden = self.conv(hidden.view(8, 9, 4, 4).transpose(1, 2)).tanh()
        return self.head(self.line(hidden.flatten(2))[..., 0])


@pytest.mark.parametrize("channels_last", [False, True])
def test_every_layer_with_a_matrix_is_projected_as_out_by_the_rest(channels_last):
    models = [Mixed(channels_last) for _ in range(2)]
    optimizers = [SGD(model.parameters(), lr=0.1) for model in models]
    engine = engine_for(models[0], optimizers[0], rank=4, update_gap=100, scale=1.0)
    shapes = {name: tuple(one.shadow.shape) for name, one in engine.projected.items()}
    assert shapes == {
        "embedding": (30, 4),
        "hf": (4, 16),
        "conv": (4, 18),
        "line": (4, 36),
        "head": (4, 10),
    }
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(30, (8, 9), generator=generator)
    starts = [dict(model.named_parameters()) for model in models]
    before = {name: p.detach().clone() for name, p in starts[1].items()}
    for model, optimizer in zip(models, optimizers, strict=True):
        model(ids).square().mean().backward()
        optimizer.step()
    for name, plain in starts[1].items():
        full = (plain.detach() - before[name]).flatten(1) if plain.ndim > 1 else None
        moved = starts[0][name].detach() - before[name]
        if full is None:  # biases are ordinary
            torch.testing.assert_close(starts[0][name], plain)
            continue
        U, S, Vh = torch.linalg.svd(full, full_matrices=False)
        best = U[:, :4] * S[:4] @ Vh[:4]  # the update is its best approximation of rank 4
        torch.testing.assert_close(moved.flatten(1), best, rtol=1e-3, atol=1e-6)
        assert moved.abs().max() > 1e-5


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_a_convolution_over_whole_inputs_is_trained_like_the_linear_layer_it_is(side, svd, moments):
    torch.manual_seed(0)
    linear, conv = nn.Linear(27, 12), nn.Conv2d(3, 12, 3)
    x, y = torch.randn(16, 3, 3, 3), torch.randn(16, 12)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.view_as(conv.weight))
        conv.bias.copy_(linear.bias)
    how = Projection(rank=3, update_gap=2, side=side, svd=svd, moments=moments)
    ends = []
    for layer, inputs in ((linear, x.flatten(1)), (conv, x)):
        start = layer.weight.detach().clone()
        optimizer = SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        GaLoreEngine({"layer": layer}, optimizer, how, seed=0)
        for _ in range(5):
            optimizer.zero_grad()
            F.mse_loss(layer(inputs).flatten(1), y).backward()
            optimizer.step()
        assert (layer.weight - start).abs().max() > 1e-3
        ends.append(layer.weight.detach().flatten(1))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("build", [lambda: nn.Linear(12, 8), lambda: nn.Conv2d(3, 8, 2)])
def test_a_bf16_weight_of_any_layer_is_the_fp32_one_to_a_neighbour(build, side):
    torch.manual_seed(0)
    half = build().bfloat16()
    plain = copy.deepcopy(half).float()
    start = plain.weight.detach().clone()
    gradient, ends = torch.randn(start.shape).bfloat16(), []
    for layer in (half, plain):
        optimizer = SGD([layer.weight], lr=0.1, weight_decay=0.3)
        how = Projection(rank=2, scale=1.0, side=side)
        GaLoreEngine({"layer": layer}, optimizer, how, seed=0)
        (layer.weight * gradient.to(layer.weight.dtype)).sum().backward()
        optimizer.step()
        ends.append(layer.weight.detach().float())
    moved = (ends[1] - start).abs().max()
    assert moved > 0.1
    # A neighbour of the weight, and the gradient projected on bases in bf16.
    assert ((ends[0] - ends[1]).abs() <= 2**-7 * ends[1].abs() + 2**-7 * moved).all()


def test_what_cannot_or_need_not_be_projected_stays_ordinary_and_says_why():
    model = Chain(8, 24, 24, 24, 24, 3)
    model.layers[1].weight.requires_grad_(False)
    model.layers[3].weight = model.layers[2].weight
    model.norm = nn.LayerNorm(8, dtype=torch.float64)
    left_out = model.layers[0].weight
    optimizer = AdamW([p for p in model.parameters() if p is not left_out], lr=0.01)
    engine = engine_for(model, optimizer, rank=4)
    assert list(engine.projected) == ["layers.2"]
    assert engine.ordinary == {
        "layers.0": "is not in the optimizer",
        "layers.1": "is not trained",
        "layers.3": "is that of 'layers.2'",
        "layers.4": "is too small (3 x 24)",
        "norm": "has no matrix",
    }
    start = weights(model)
    step(model, optimizer, 0)
    after = weights(model)
    moved = {name for name in after if not torch.equal(after[name], start[name])}
    assert moved == {"layers.2.weight", "layers.4.weight"}
    assert model.layers[0].weight.grad is not None  # left alone


def test_a_smallest_size_can_be_set():
    model = chain_of((20, 8))
    engine = engine_for(model, SGD(model.parameters(), lr=0.1), rank=2, min_size=7)
    assert list(engine.projected) == ["layers.1"]
    assert "too small" in engine.ordinary["layers.0"]


def test_a_tied_weight_is_projected_once_with_the_gradient_of_both_uses():
    ends = []
    for by_galore in (False, True):
        model = Chain(8, 8, 8)
        model.layers[1].weight = model.layers[0].weight
        optimizer = SGD(model.parameters(), lr=0.1)
        if by_galore:
            engine_for(model, optimizer, rank=8, scale=1.0)
        step(model, optimizer, 0)
        ends.append(weights(model))
    assert distance(ends[1], ends[0]) < 1e-6


# ---------------------------------------------------------------- refusals


def named(name, base=SGD):
    return type(name, (base,), {})


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("LAMB", "norm of the parameter"),
        ("Lamb", "norm of the parameter"),
        ("LAMB8bit", "norm of the parameter"),
        ("PagedLARS", "norm of the parameter"),
        ("Prodigy", "from its start"),
        ("DAdaptAdam", "from its start"),
        ("AdamWScheduleFree", "averages"),
        ("SAM", "between two backward passes"),
        ("GaLoreAdamW8bit", "projects by itself"),
        ("ZeroRedundancyOptimizer", "shared the parameters out among the ranks"),
    ],
)
def test_optimizers_that_look_at_the_weights_are_refused_by_name(name, reason):
    for kind in (named(name), named("Mine", named(name))):
        model = chain_of((20, 8))
        optimizer = kind(model.parameters(), lr=0.1)
        before = [list(group["params"]) for group in optimizer.param_groups]
        with pytest.raises(ValueError, match=rf"{kind.__name__}: .*{reason}"):
            engine_for(model, optimizer, rank=2)
        assert not any(SHADOW in name for name, _ in model.named_parameters())
        assert [list(map(id, g["params"])) for g in optimizer.param_groups] == [
            list(map(id, params)) for params in before
        ]


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adafactor(p, lr=0.01),
        lambda p: Adafactor(p, lr=0.01, scale_parameter=True, relative_step=False),
        lambda p: torch.optim.LBFGS(p),
        lambda p: torch.optim.ASGD(p),
        lambda p: torch.optim.SparseAdam(list(p)),
        bnb("LAMB"),
    ],
    ids=["torch-adafactor", "adafactor", "lbfgs", "asgd", "sparse", "bnb-lamb"],
)
def test_real_ones_are_refused_too(make):
    model = chain_of((20, 8))
    with pytest.raises(ValueError, match="GaLore cannot project for"):
        engine_for(model, make(model.parameters()), rank=2)


def test_adafactor_without_a_rate_cannot_be_decayed():
    model = chain_of((20, 8))
    options = {"scale_parameter": False, "relative_step": True, "warmup_init": False}
    with pytest.raises(ValueError, match="learning rate by itself"):
        engine_for(model, Adafactor(model.parameters(), weight_decay=0.1, **options), rank=2)
    optimizer = Adafactor(model.parameters(), **options)
    engine_for(model, optimizer, rank=2)
    step(model, optimizer, 0)


def test_an_unknown_optimizer_that_decays_must_say_how():
    class Own(torch.optim.Optimizer):
        def __init__(self, params, **defaults):
            super().__init__(params, defaults)

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad

    def build(weight_decay, **how):
        model = chain_of((20, 8))
        optimizer = Own(model.parameters(), lr=0.1, weight_decay=weight_decay)
        return engine_for(model, optimizer, rank=2, **how)

    with pytest.raises(ValueError, match="Own.*decay='decoupled'"):
        build(0.1)
    assert build(0.0).decay == "decoupled"
    assert build(0.1, decay="coupled").decay == "coupled"


@pytest.mark.parametrize("moments", ["reset", "rotate"])
def test_packed_moments_can_only_be_kept(moments):
    model = chain_of((20, 8), dtype=torch.float32)
    with pytest.raises(ValueError, match="AdamW8bit packs"):
        engine_for(model, bnb("AdamW8bit")(model.parameters()), rank=2, moments=moments)


def test_what_cannot_work_is_refused_in_words():
    model = chain_of((20, 8))
    optimizer = AdamW(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"none of the 3 weights.*too small \(8 x 6\)"):
        engine_for(model, optimizer, rank=50)
    step(model, optimizer, 0)
    with pytest.raises(ValueError, match="has state for 'layers.0'"):
        engine_for(model, optimizer, rank=2)
    assert not any(SHADOW in name for name, _ in model.named_parameters())
    eager = chain_of((20, 8))
    with pytest.raises(ValueError, match="as Adagrad does"):
        engine_for(eager, torch.optim.Adagrad(eager.parameters()), rank=2)
    half = chain_of((20, 8), dtype=torch.float16)
    with pytest.raises(ValueError, match="float16.*bf16-true"):
        engine_for(half, SGD(half.parameters(), lr=0.1), rank=2)
    model = chain_of((20, 8))
    engine_for(model, SGD(model.parameters(), lr=0.1), rank=2)
    with pytest.raises(ValueError, match="another GaLore"):
        engine_for(model, SGD(model.parameters(), lr=0.1), rank=2)
    sparse = nn.Embedding(20, 8, sparse=True)
    engine_for(nn.ModuleDict({"e": sparse}), SGD(sparse.parameters(), lr=0.1), rank=2)
    with pytest.raises(TypeError, match="'e' is sparse"):
        sparse(torch.tensor([1, 2])).sum().backward()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"rank": 2.0},
        {"rank": True},
        {"update_gap": 0},
        {"scale": 0.0},
        {"scale": math.nan},
        {"min_size": -1},
        {"side": "up"},
        {"svd": "fast"},
        {"moments": "lose"},
        {"decay": "both"},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Projection(**{"rank": 4, **wrong})


# ---------------------------------------------------------------- bf16


def test_stochastic_rounding_is_right_on_average_and_between_neighbours():
    values = torch.tensor([1.0 + 2**-10, -3.14159, 1e-30, 0.0, math.inf, -math.inf])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([round_stochastically(values, generator) for _ in range(4000)]).double()
    assert torch.equal(drawn[:, 4:], values[4:].double().expand(4000, 2))
    finite = values[:4]
    mean, spread = drawn[:, :4].mean(0), (finite.abs() * 2**-7).double()
    assert ((mean - finite).abs() <= 4 * spread / 4000**0.5 / 2).all()
    assert ((drawn[:, :4] - finite).abs() <= spread).all()
    assert drawn[:, 0].unique().tolist() == [1.0, 1.0078125]
    assert round_stochastically(torch.tensor([math.nan]), generator).isnan().all()


def test_bf16_weights_keep_updates_that_rounding_to_the_nearest_loses():
    """Sixty steps, each a hundredth of the distance between neighbours in bf16."""
    moved = {}
    for stochastic in (True, False):
        layer = nn.Linear(64, 64, bias=False).bfloat16()
        with torch.no_grad():
            layer.weight.fill_(1.0)
        optimizer = SGD([layer.weight], lr=1.0)
        if stochastic:
            settings = Projection(rank=1, scale=1.0, update_gap=1000)
            engine = GaLoreEngine({"layer": layer}, optimizer, settings, seed=0)
            assert engine.projected["layer"].shadow.dtype == torch.float32
        for _ in range(60):
            optimizer.zero_grad()
            (layer.weight.float().mean() * 64 * 64 * 2**-8 / 100).backward()
            optimizer.step()
        moved[stochastic] = 1 - layer.weight.float().mean().item()
    assert moved[False] == 0
    assert moved[True] == pytest.approx(60 * 2**-8 / 100, rel=0.1)


def test_bf16_weights_are_moved_and_decayed_in_fp32_and_rounded_once():
    """On average over many seeds they are where fp32 weights would be, in one step with decay."""
    ends = []
    for seed in range(400):
        layer = nn.Linear(8, 8, bias=False).bfloat16()
        with torch.no_grad():
            layer.weight.copy_(torch.linspace(0.5, 0.99, 64).view(8, 8))
        optimizer = AdamW([layer.weight], lr=1e-3, weight_decay=0.3)
        GaLoreEngine({"l": layer}, optimizer, Projection(rank=8, scale=1.0), seed=seed)
        start = layer.weight.detach().float().clone()
        (layer.weight.float() * torch.eye(8)).sum().backward()
        optimizer.step()
        ends.append(layer.weight.detach().float())
    expected = (start - 1e-3 * torch.eye(8)) * (1 - 1e-3 * 0.3)
    error = (torch.stack(ends).mean(0) - expected).abs().max().item()
    assert error < 4 * 2**-8 / 2 / 400**0.5


def test_bf16_training_is_repeatable_and_learns():
    def run(seed):
        model = Chain(16, 32, 16, dtype=torch.float32).bfloat16()
        optimizer = AdamW(model.parameters(), lr=0.01)
        layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight")}
        engine = GaLoreEngine(layers, optimizer, Projection(rank=4, update_gap=5), seed=seed)
        losses = [step(model, optimizer, 0) for _ in range(40)]
        moments = {t.dtype for s in optimizer.state.values() for t in s.values()}
        assert moments == {torch.float32}
        assert {
            p.right.dtype
            for p in (o.projector for o in engine.projected.values())
            if p.right is not None
        } == {torch.bfloat16}
        return losses, weights(model)

    one, again, other = run(0), run(0), run(1)
    assert one[0] == again[0]
    assert distance(one[1], again[1]) == 0
    assert distance(one[1], other[1]) > 0
    assert one[0][-1] < 0.8 * one[0][0]


# ---------------------------------------------------------------- the subspace


SPECTRA = {
    "slow": lambda k: k**-0.5,
    "fast": lambda k: 0.5**k,
    "steps": lambda k: 1.0 + (k <= 3) + (k <= 6),
    "few": lambda k: 1.0 * (k <= 3),
}
KRYLOV = (180, 130), (130, 180)  # else the space would be half of all
SMALL = (60, 40), (40, 60)


def with_spectrum(shape, spectrum, seed=0):
    generator = torch.Generator().manual_seed(seed)
    least = min(shape)
    U, V = (torch.linalg.qr(torch.randn(n, least, generator=generator)).Q for n in shape)
    return U * SPECTRA[spectrum](torch.arange(1, least + 1)) @ V.T


@pytest.mark.parametrize("side", ["std", "reverse_std"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", KRYLOV + SMALL)
def test_the_randomised_subspace_holds_nearly_what_the_exact_one_does(shape, spectrum, side):
    G = with_spectrum(shape, spectrum)
    most = torch.linalg.svdvals(G.double())[:6].square().sum()
    before = torch.get_rng_state()
    P, again, tiny, other = (
        subspace(scale * G, 6, side, "randomised", torch.Generator().manual_seed(seed))
        for scale, seed in [(1, 3), (1, 3), (1e-25, 3), (1, 4)]
    )
    assert torch.equal(torch.get_rng_state(), before)
    for found in (P, tiny):
        basis = found.right if found.right is not None else found.left.T
        torch.testing.assert_close(basis @ basis.T, torch.eye(6), atol=1e-5, rtol=0)
        held = project(G, found).double().square().sum()
        assert 0.999 * most < held < (1 + 1e-5) * most
    side_of = 0 if P.right is None else 1
    assert torch.equal(P[side_of], again[side_of])
    assert (shape in KRYLOV) == (not torch.equal(P[side_of], other[side_of]))


@pytest.mark.parametrize("shape", KRYLOV + SMALL)
def test_both_sides_of_the_randomised_subspace_belong_together(shape):
    """The gradient between them is diagonal and positive, largest first."""
    P = subspace(with_spectrum(shape, "fast"), 6, "full", "randomised", torch.Generator())
    R = project(with_spectrum(shape, "fast"), P)
    torch.testing.assert_close(R, torch.diag(0.5 ** torch.arange(1, 7)), atol=1e-5, rtol=0)
    longer = P.left.T if shape[0] > shape[1] else P.right
    torch.testing.assert_close(longer @ longer.T, torch.eye(6), atol=1e-5, rtol=0)


@pytest.mark.parametrize("svd", ["exact", "randomised"])
@pytest.mark.parametrize("used", [0, 1, 12, 30])
@pytest.mark.parametrize("shape", KRYLOV + SMALL)
def test_the_subspace_of_a_gradient_with_dead_rows_and_columns_is_one(shape, used, svd):
    """Rounding is zero there too, so that it cannot tell other directions."""
    G = torch.zeros(shape)
    G[:used, :used] = torch.randn(used, used, generator=torch.Generator().manual_seed(0))
    P = subspace(G, 9, "full", svd, torch.Generator())
    for basis in (P.left.T, P.right):
        torch.testing.assert_close(basis @ basis.T, torch.eye(9), atol=1e-5, rtol=0)
    most = torch.linalg.svdvals(G.double())[:9].square().sum()
    assert project(G, P).double().square().sum() >= (1 - 1e-5) * most


@pytest.mark.parametrize("size", [32, 120])
@pytest.mark.parametrize("seed", range(20))
def test_rounding_turns_no_direction_of_the_randomised_subspace(seed, size):
    generator = torch.Generator().manual_seed(seed)
    left, right, noise = (torch.randn(200, size, generator=generator) for _ in range(3))
    # Of rank 8: what else a random space holds is rounding.
    G = left[:, :8] * 0.7 ** torch.arange(8) @ right[:size, :8].T
    found = [
        subspace(gradient, 8, "full", "randomised", torch.Generator().manual_seed(1))
        for gradient in (G, G * (1 + 1e-7 * noise))
    ]
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)


def test_the_exact_subspace_has_the_signs_of_torchs_decomposition():
    G = torch.randn(9, 5)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    P = subspace(G, 3, "full", "exact", torch.Generator())
    assert torch.equal(P.left, U[:, :3])
    assert torch.equal(P.right, Vh[:3])


@every_shape
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
def test_a_rotated_moment_is_the_old_one_seen_in_the_new_subspace(shape, side):
    G, H = torch.randn(shape), torch.randn(shape)
    old, new = (subspace(g, 3, side, "exact", torch.Generator()) for g in (G, H))
    M = torch.randn(projected_shape(shape, 3, side))
    full = M
    full = full if old.left is None else old.left @ full
    full = full if old.right is None else full @ old.right
    torch.testing.assert_close(rotate(M, old, new), project(full, new))


# ---------------------------------------------------------------- state


def run_steps(model, optimizer, schedule, numbers, parts=1, engine=None):
    for number in numbers:
        step(model, optimizer, number, parts, engine)
        schedule.step()


def prepared(kind, **how):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    model = chain_of((20, 8), dtype=torch.float32).to(dtype)
    optimizer = OPTIMIZERS["adamw" if kind == "bf16" else kind](model.parameters())
    # Built before the swap, as Lightning does it.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.02, total_steps=20, cycle_momentum=False
    )
    return model, optimizer, schedule, engine_for(model, optimizer, rank=3, update_gap=4, **how)


@pytest.fixture(params=["exact", "randomised", "krylov"])
def svd(request, monkeypatch):
    """How subspaces are chosen; the last as in large weights, where random numbers have a part."""
    if request.param != "krylov":
        return request.param
    monkeypatch.setattr(projection, "BLOCKS", 2)
    monkeypatch.setattr(projection, "LEAST_COLUMNS", 1)
    return "randomised"


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "bf16"])
def test_a_run_resumed_inside_a_period_goes_on_to_the_bit(kind, svd):
    model, optimizer, schedule, engine = prepared(kind, svd=svd)
    run_steps(model, optimizer, schedule, range(6))
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, schedule, engine)], buffer)
    run_steps(model, optimizer, schedule, range(6, 14))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    torch.manual_seed(77)
    fresh, optimizer, schedule, engine = prepared(kind, svd=svd)
    engine.seed = 5  # another process, another global seed
    for part, state in zip((fresh, optimizer, schedule, engine), saved, strict=True):
        part.load_state_dict(state)
    run_steps(fresh, optimizer, schedule, range(6, 14))
    assert distance(weights(fresh), weights(model)) == 0


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right", "full"])
@every_shape
def test_every_way_to_project_accumulates_clips_and_resumes(shape, side, svd, moments):
    """Ten steps of four micro-batches, clipped, saved inside the third period: as whole batches."""

    def prepared():
        model = chain_of(shape)
        optimizer = AdamW(model.parameters(), lr=0.01, eps=1e-6, weight_decay=0.1)
        how = {"rank": 3, "update_gap": 3, "side": side, "svd": svd, "moments": moments}
        return model, optimizer, engine_for(model, optimizer, **how)

    def run(model, optimizer, engine, numbers, parts):
        for number in numbers:
            optimizer.zero_grad()
            for part in range(parts):
                engine.accumulating = part < parts - 1
                rows = slice(part * 16 // parts, (part + 1) * 16 // parts)
                (loss_of(model, number, rows) / parts).backward()
            stepped = [p for group in optimizer.param_groups for p in group["params"]]
            assert nn.utils.clip_grad_norm_(stepped, 0.02) > 0.02
            optimizer.step()
        return weights(model)

    whole = run(*prepared(), range(10), parts=1)
    first = prepared()
    run(*first, range(8), parts=4)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    ended = run(*first, range(8, 10), parts=4)
    assert distance(ended, whole) < 1e-5
    assert distance(ended, weights(chain_of(shape))) > 5e-3
    buffer.seek(0)
    again = prepared()
    for part, state in zip(again, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert distance(run(*again, range(8, 10), parts=4), ended) == 0


def test_the_rate_and_decay_of_groups_that_loading_replaced_are_the_ones_that_count():
    model, optimizer, _, engine = prepared("adamw")
    step(model, optimizer, 0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0].update(lr=0.5, weight_decay=1.0)
    before = weights(model)
    optimizer.zero_grad()
    (0 * loss_of(model, 0)).backward()
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    optimizer.step()
    for name, value in weights(model).items():
        torch.testing.assert_close(value, before[name] * 0.5)


def test_state_is_tensors_and_ints():
    model, optimizer, _, engine = prepared("adamw")
    step(model, optimizer, 0)
    state = engine.state_dict()
    assert state.keys() == {"seed", "update_gap", "weights"}
    assert (state["seed"], state["update_gap"]) == (0, 4)
    for entry in state["weights"].values():
        assert (entry["steps"], entry["age"]) == (1, 1)
        assert {type(value) for value in entry.values()} == {int, torch.Tensor}


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model, optimizer, _, engine = prepared("adamw")
    step(model, optimizer, 0)
    state = engine.state_dict()
    for how, message in [
        ({"only": ["layers.1"]}, "'layers.0'.*other|other.*'layers.0'"),
        ({"rank": 2}, "'layers.0' is .*same rank and side"),
        ({"side": "reverse_std"}, "same rank and side"),
    ]:
        other = chain_of((20, 8), dtype=torch.float32)
        fresh = engine_for(other, SGD(other.parameters(), lr=0.1), **{"rank": 3, **how})
        with pytest.raises(ValueError, match=message):
            fresh.load_state_dict(state)
        assert all(one.projector is None for one in fresh.projected.values())
        assert fresh.seed == 0


def test_shadows_have_names_and_are_in_no_state_dict():
    model, optimizer, _, engine = prepared("adamw")
    stock = chain_of((20, 8), dtype=torch.float32)
    assert {n for n, _ in model.named_parameters()} == {
        f"layers.{i}.{leaf}" for i in range(3) for leaf in ("weight", SHADOW)
    }
    assert model.state_dict().keys() == stock.state_dict().keys()
    model.load_state_dict(stock.state_dict())  # strictly
    assert model.layers[1].get_parameter(SHADOW) is engine.projected["layers.1"].shadow
    step(model, optimizer, 0)
    assert not any(one.shadow.any() for one in engine.projected.values())


def test_a_model_can_be_copied_and_pickled_and_the_copy_is_left_alone():
    model, optimizer, _, engine = prepared("adamw")
    step(model, optimizer, 0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert distance(weights(other), weights(model)) == 0
        loss_of(other, 0).backward()
        assert all(layer.weight.grad is not None for layer in other.layers)
        other.load_state_dict(model.state_dict())
    assert [one.steps for one in engine.projected.values()] == [1] * 3


def test_removed_it_leaves_the_model_as_it_was_and_can_still_be_saved():
    model, optimizer, _, engine = prepared("adamw")
    step(model, optimizer, 0)
    state = engine.state_dict()
    engine.remove()
    stock = chain_of((20, 8), dtype=torch.float32)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in stock.named_parameters()]
    for layer, other in zip(model.layers, stock.layers, strict=True):
        assert len(layer._state_dict_hooks) == len(other._state_dict_hooks) == 0
        assert len(layer._load_state_dict_post_hooks) == 0
    loss_of(model, 0).backward()
    assert all(layer.weight.grad is not None for layer in model.layers)
    assert engine.state_dict()["weights"].keys() == state["weights"].keys()
    fresh = AdamW(model.parameters(), lr=0.01)
    engine_for(model, fresh, rank=3)  # and it can be done again
    step(model, fresh, 1)


@pytest.mark.parametrize("keyword", [False, True])
def test_closures_make_their_gradients_inside_the_step(keyword):
    """As Lightning's do; coupled decay and late subspaces have to follow them."""
    ends = []
    for closed in (False, True):
        model = chain_of((20, 8))
        optimizer = SGD(model.parameters(), lr=0.1, weight_decay=0.1)
        engine = engine_for(model, optimizer, rank=3, update_gap=2)
        engine.accumulating = closed  # a loop that forgot to say that this is the last one
        for number in range(5):

            def closure(number=number, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            if closed:
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
                assert loss.item() > 0
            else:
                closure()
                optimizer.step()
        ends.append(weights(model))
    assert distance(*ends) < 1e-12


def test_the_engine_needs_torch_and_nothing_else():
    code = (
        "import sys, lit_adapters.optim\n"
        "print(sorted({'lightning', 'transformers', 'bitsandbytes', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
