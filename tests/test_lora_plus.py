"""LoRA+ (arXiv:2402.12354): lr(B) = ratio * lr(A) at every step; rsLoRA's (2312.03732) slope.

The rate of a parameter is measured by what a step does: under plain SGD a gradient of ones moves
it by its learning rate.
"""

import math
import warnings

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import SGD, lr_scheduler

from lit_adapters import (
    AdapterFineTuneModule,
    DoRA,
    FullFineTuning,
    LoRA,
    PiSSA,
    attach,
    initialise,
)
from lit_adapters.data import collate
from lit_adapters.optim import hold_ratios, parameter_groups
from tests.models import PAD, VOCAB, gpt2, llama
from tests.reference import OneLayer

RATIO, EMBEDDING_LR, LR = 16.0, 1e-3, 0.1
STEPS = 14

SCHEDULES = {
    "none": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1.0),
    "lambda-warmup": lambda o: lr_scheduler.LambdaLR(o, lambda step: min(1, (step + 1) / 5)),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.2, 1.0, total_iters=8),
    "step": lambda o: lr_scheduler.StepLR(o, 4, gamma=0.3),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "cosine-floor": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS, eta_min=0.03),
    "restarts-floor": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5, eta_min=0.03),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=0.3, total_steps=STEPS + 1, cycle_momentum=False
    ),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.05, 0.2, step_size_up=3, cycle_momentum=False),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, STEPS, power=2),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, 1.0, total_iters=4),
            lr_scheduler.CosineAnnealingLR(o, STEPS - 4, eta_min=0.02),
        ],
        [4],
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, min_lr=0.02),
}
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def adapted(spec=LoRA, build=llama, **settings):
    model = build()
    first = "wte" if build is gpt2 else "embed_tokens"
    rest = ["c_attn", "c_fc"] if build is gpt2 else ["q_proj", "down_proj"]
    attach(model, spec(**{"rank": 4, "targets": [first, *rest], **settings}), seed=0)
    return model


def role(name):
    embedding = "embed_tokens" in name or "wte" in name
    return "embedding" if embedding else name.rsplit(".", 1)[-1]


def rates(model, optimizer):
    """How far each trainable parameter moves in one step under a gradient of ones."""
    before = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.zero_()  # or the move is rounded away
            parameter.grad = torch.ones_like(parameter)
            before[name] = parameter
    optimizer.step()
    found = {}
    for name, parameter in before.items():
        assert (parameter == parameter.flatten()[0]).all(), name
        found[name] = -parameter.flatten()[0].item()
    return found


def advance(schedule, step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR calls its parts as torch says not to
        if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
            schedule.step(1.0 if step else 2.0)  # no progress: the rate falls
        else:
            schedule.step()


def scheduled(schedule, optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SCHEDULES[schedule](optimizer)


def plus(model, **settings):
    settings = {"lr_ratio": RATIO, "embedding_lr": EMBEDDING_LR, **settings}
    optimizer = SGD(parameter_groups(model, **settings), lr=LR)
    hold_ratios(optimizer)
    return optimizer


# ---------------------------------------------------------------- which parameter, which rate


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("spec", [LoRA, DoRA])
@pytest.mark.parametrize("start", ["kaiming", "pissa"])
def test_every_trainable_parameter_has_the_papers_rate(build, spec, start):
    model = adapted(spec, build)
    if start == "pissa":
        initialise(model, PiSSA())
    expected = {
        "lora_A": LR,
        "lora_B": RATIO * LR,
        "magnitude": RATIO * LR,
        "embedding": EMBEDDING_LR,
    }
    found = rates(model, plus(model))
    assert len(found) == sum(p.requires_grad for p in model.parameters())
    for name, rate in found.items():
        assert rate == pytest.approx(expected[role(name)], rel=1e-5), name


def test_without_a_rate_of_their_own_embeddings_follow_their_names():
    model = adapted()
    for name, rate in rates(model, plus(model, embedding_lr=None)).items():
        assert rate == pytest.approx(LR * (RATIO if name.endswith("lora_B") else 1), rel=1e-5)


@pytest.mark.parametrize("spec", [LoRA, DoRA])
def test_a_ratio_of_one_is_one_rate_for_all(spec):
    model = adapted(spec)
    optimizer = plus(model, lr_ratio=1.0, embedding_lr=None)
    for name, rate in rates(model, optimizer).items():
        assert rate == pytest.approx(LR, rel=1e-5), name


@pytest.mark.parametrize(
    ("spec", "ratio"),
    [(LoRA(rank=4), RATIO), (DoRA(rank=4), RATIO), (DoRA(rank=4), 1.0), (FullFineTuning(), 1.0)],
)
def test_groups_hold_every_trainable_parameter_once_and_vectors_do_not_decay(spec, ratio):
    model = llama()
    attach(model, spec)
    groups = parameter_groups(model, lr_ratio=ratio)
    listed = [id(p) for group in groups for p in group["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=0.3)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.3)


@pytest.mark.parametrize("build", [llama, gpt2])
@pytest.mark.parametrize("spec", [LoRA, DoRA])
def test_rates_agree_with_pefts_loraplus_optimizer(build, spec):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    ours = adapted(spec, build)
    first = "wte" if build is gpt2 else "embed_tokens"
    rest = ["c_attn", "c_fc"] if build is gpt2 else ["q_proj", "down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=4, target_modules=[first, *rest], use_dora=spec is DoRA)
        theirs = peft.get_peft_model(build(), config)
    optimizer = create_loraplus_optimizer(
        theirs, SGD, lr=LR, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=EMBEDDING_LR
    )
    names = {
        "lora_A": "lora_A",
        "lora_B": "lora_B",
        "lora_embedding_A": "lora_A",
        "lora_embedding_B": "lora_B",
        "lora_magnitude_vector": "magnitude",
    }
    expected = {}
    for name, rate in rates(theirs, optimizer).items():
        layer, part = name.removeprefix("base_model.model.").split(".lora_")
        key = f"{layer}.adapter.{names['lora_' + part.split('.')[0]]}"
        expected[key] = rate
    found = rates(ours, plus(ours))
    assert found.keys() == expected.keys()
    for name, rate in expected.items():
        if role(name) == "embedding" and name.endswith("magnitude"):
            continue  # theirs follows B; the paper has no DoRA, and one embedding has one rate
        assert found[name] == pytest.approx(rate, rel=1e-5), name


@pytest.mark.parametrize("wrong", [{"lr_ratio": 0.0}, {"lr_ratio": -2.0}, {"embedding_lr": -1e-6}])
def test_a_rate_that_is_not_positive_is_an_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        parameter_groups(adapted(), **wrong)


# ---------------------------------------------------------------- check 14: under every schedule


@every_schedule
@pytest.mark.parametrize("spec", [LoRA, DoRA])
def test_the_ratio_is_constant_at_every_step_and_a_follows_the_schedule(schedule, spec):
    model = adapted(spec)
    optimizer = plus(model)
    plan = scheduled(schedule, optimizer)
    lone = nn.Parameter(torch.zeros(1))
    plain = SGD([lone], lr=LR)
    plain_plan = scheduled(schedule, plain)
    seen = []
    for step in range(STEPS):
        wanted = plain.param_groups[0]["lr"]
        found = rates(model, optimizer)
        plain.step()
        for name, rate in found.items():
            kind = role(name)
            if kind == "lora_A":
                assert rate == pytest.approx(wanted, rel=1e-5), (step, name)
            elif kind in ("lora_B", "magnitude"):
                assert rate == pytest.approx(RATIO * wanted, rel=1e-5), (step, name)
        embedding = {rate for name, rate in found.items() if role(name) == "embedding"}
        assert len(embedding) == 1
        seen.append((wanted, embedding.pop()))
        advance(plan, step)
        advance(plain_plan, step)
    if schedule != "none":
        assert len({wanted for wanted, _ in seen}) > 2  # the schedule did something
    first = seen[0][1] / seen[0][0]
    assert [e / w for w, e in seen if w] == pytest.approx([first] * len([1 for w, _ in seen if w]))


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine-floor", "plateau", "cyclic"])
def test_these_schedules_lose_a_ratio_that_is_not_held(schedule):
    A, B = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [A], "lr": LR}, {"params": [B], "lr": RATIO * LR}])
    plan, ratios = scheduled(schedule, optimizer), []
    for step in range(STEPS):
        slow, fast = (group["lr"] for group in optimizer.param_groups)
        ratios.append(fast / slow)
        optimizer.step()
        advance(plan, step)
    assert max(abs(ratio / RATIO - 1) for ratio in ratios) > 0.1


@pytest.mark.parametrize("schedule", ["cosine-floor", "one-cycle", "lambda-warmup", "plateau"])
def test_a_resumed_schedule_goes_on_as_if_it_had_not_stopped(schedule):
    def steps(model, optimizer, plan, first, last):
        made = []
        for step in range(first, last):
            made.append(rates(model, optimizer))
            advance(plan, step)
        return made

    def fresh():
        model = adapted()
        optimizer = plus(model)
        return model, optimizer, scheduled(schedule, optimizer)

    whole = steps(*fresh(), 0, STEPS)
    model, optimizer, plan = fresh()
    begun = steps(model, optimizer, plan, 0, 6)
    saved = optimizer.state_dict(), plan.state_dict()
    model, optimizer, plan = fresh()
    optimizer.load_state_dict(saved[0])
    plan.load_state_dict(saved[1])
    for found, expected in zip(begun + steps(model, optimizer, plan, 6, STEPS), whole, strict=True):
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_ratio_is_no_part_of_what_adam_divides_out():
    """Under Adam every first step is lr, whatever the gradient: the ratio must show in the move."""
    model = adapted()
    optimizer = torch.optim.Adam(parameter_groups(model, lr_ratio=RATIO), lr=1e-3)
    hold_ratios(optimizer)
    for name, rate in rates(model, optimizer).items():
        expected = 1e-3 * (RATIO if name.endswith("lora_B") else 1)
        assert rate == pytest.approx(expected, rel=1e-4), name


# ---------------------------------------------------------------- in the module, under a trainer


class Batches:
    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, VOCAB, (count, 2, 8), generator=generator).tolist()
        self.batches = [
            collate([{"input_ids": row, "labels": row} for row in rows], PAD) for rows in ids
        ]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
@pytest.mark.parametrize(
    "schedule",
    [
        "cosine",
        "linear",
        "constant",
        lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.01, total_steps=9, cycle_momentum=False),
    ],
    ids=["cosine", "linear", "constant", "one-cycle"],
)
def test_the_module_holds_the_ratio_at_every_step_of_a_fit(schedule, tmp_path):
    seen = []

    def sgd(groups):
        optimizer = SGD(groups, lr=0.01)

        def record(optimizer, args, kwargs):
            seen.append(
                {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
            )

        optimizer.register_step_post_hook(record)
        return optimizer

    body = llama()
    module = AdapterFineTuneModule(
        body,
        adapter=DoRA(rank=4, targets=["embed_tokens", "q_proj"]),
        optimizer=sgd,
        lr_scheduler=schedule,
        warmup=0.25,
        lora_plus_ratio=RATIO,
        embedding_lr=1e-5,
    )
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, Batches(8))
    assert len(seen) == 8
    names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
    ratios = set()
    for step in seen:
        by_role = {}
        for key, lr in step.items():
            by_role.setdefault(role(names[key]), set()).add(lr)
        assert all(len(lrs) == 1 for lrs in by_role.values())
        assert by_role.keys() == {"lora_A", "lora_B", "magnitude", "embedding"}
        rate = {kind: lrs.pop() for kind, lrs in by_role.items()}
        assert rate["lora_B"] == pytest.approx(RATIO * rate["lora_A"])
        assert rate["magnitude"] == pytest.approx(RATIO * rate["lora_A"])
        if rate["lora_A"]:
            ratios.add(round(rate["embedding"] / rate["lora_A"], 9))
    assert len(ratios) == 1
    if schedule != "constant":
        assert len({next(iter(step.values())) for step in seen}) > 2


# ---------------------------------------------------------------- check 14: rsLoRA's slope


@pytest.mark.parametrize(("rslora", "expected"), [(False, -1), (True, 0)])
def test_the_first_steps_effect_on_the_output_scales_with_the_rank_as_the_paper_says(
    rslora, expected
):
    """B = 0: one SGD step on B changes the output by -lr s^2 G A^T A x, and A^T A grows with r."""
    ranks, changes = (4, 8, 16, 32, 64, 128), []
    x, T = torch.randn(2, 1, 256)  # one input: others would add the noise of A^T A off its diagonal
    for rank in ranks:
        total = 0.0
        for seed in range(8):
            torch.manual_seed(seed)
            model = OneLayer(nn.Linear(256, 256, bias=False))
            spec = LoRA(rank=rank, alpha=16, rslora=rslora, targets=["layer"])
            attach(model, spec, seed=seed)
            adapter, before = model.layer.adapter, model(x).detach()
            s = 16 / math.sqrt(rank) if rslora else 16 / rank
            (model(x) * T).sum().backward()
            SGD([adapter.lora_B], lr=1e-2).step()
            A, G = adapter.lora_A.detach(), T.T @ x
            change = model(x).detach() - before
            formula = -1e-2 * s**2 * x @ A.T @ A @ G.T
            assert (change - formula).norm() <= 1e-4 * formula.norm()
            total += change.norm().item()
        changes.append(total)
    across = torch.tensor(ranks).log2()
    heights = torch.tensor(changes).log2()
    centred = across - across.mean()
    slope = (centred * heights).sum() / centred.square().sum()
    assert slope.item() == pytest.approx(expected, abs=0.1)
