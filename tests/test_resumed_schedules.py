"""Schedules and optimizers of torch in a resumed run: where they stood, at the rate asked for."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    OneCycleLR,
    SequentialLR,
    StepLR,
)

from lit_adapters import AdapterFineTuneModule, LoRA
from tests.models import llama
from tests.test_module import examples, in_batches, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]

STEPS, STOP, RATE = 8, 3, 0.01  # stopped at the end of the first epoch


def one_cycle(optimizer, rate):
    return OneCycleLR(optimizer, max_lr=rate, total_steps=STEPS)


def warmed_cosine(optimizer, rate):
    parts = [LinearLR(optimizer, 0.1, total_iters=4), CosineAnnealingLR(optimizer, 4)]
    return SequentialLR(optimizer, parts, [4])


def warmed_lambda(optimizer, rate):
    parts = [LinearLR(optimizer, 0.1, total_iters=2), LambdaLR(optimizer, lambda n: 0.9**n)]
    return SequentialLR(optimizer, parts, [2])


class Seen(Callback):
    """The rate and first momentum of every step."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        group = optimizer.param_groups[0]
        self.steps.append((group["lr"], group.get("betas", [0])[0]))


def run(folder, schedule, rate=RATE, steps=STEPS, resume=None, kind=torch.optim.AdamW):
    module = AdapterFineTuneModule(
        llama(),
        LoRA(rank=2),
        optimizer=lambda groups: kind(groups, lr=rate),
        lr_scheduler=lambda optimizer: schedule(optimizer, rate),
    )
    seen = Seen()
    trainer = make_trainer(folder, callbacks=[seen], max_epochs=-1, max_steps=steps)
    trainer.fit(module, in_batches(examples(STOP), 1), ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(folder / "here.ckpt", weights_only=False)
    return seen.steps


@pytest.mark.parametrize("schedule", [one_cycle, warmed_cosine, warmed_lambda])
def test_a_resumed_run_steps_as_one_that_was_never_stopped(tmp_path, schedule):
    run(tmp_path, schedule, steps=STOP)
    resumed = run(tmp_path, schedule, resume=tmp_path / "here.ckpt")
    whole = run(tmp_path, schedule)
    assert resumed == whole[STOP:]


@pytest.mark.parametrize("schedule", [one_cycle, warmed_cosine, warmed_lambda])
def test_another_rate_counts_from_the_first_resumed_step_to_the_last(tmp_path, schedule):
    run(tmp_path, schedule, steps=STOP)
    resumed = run(tmp_path, schedule, rate=RATE / 10, resume=tmp_path / "here.ckpt")
    whole = run(tmp_path, schedule, rate=RATE / 10)
    for found, expected in zip(resumed, whole[STOP:], strict=True):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def steps_down(optimizer, rate):
    return StepLR(optimizer, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": torch.optim.SGD}, "optimizer of the checkpoint is no SGD: it has .*betas"),
        ({"kind": torch.optim.Adagrad}, "optimizer of the checkpoint is no Adagrad: .*lr_decay"),
        ({"schedule": steps_down}, "schedule of the checkpoint is no StepLR: it has .*milestones"),
    ],
    ids=["sgd", "adagrad", "schedule"],
)
def test_the_state_of_another_kind_is_refused_in_words(tmp_path, changes, words):
    run(tmp_path, warmed_cosine, steps=STOP)
    with pytest.raises(ValueError, match=f"{words}.*start a new fit from its weights"):
        run(tmp_path, **{"schedule": warmed_cosine, **changes}, resume=tmp_path / "here.ckpt")


def test_adam_goes_on_from_adamw(tmp_path):
    run(tmp_path, warmed_cosine, steps=STOP)
    resumed = run(tmp_path, warmed_cosine, resume=tmp_path / "here.ckpt", kind=torch.optim.Adam)
    assert len(resumed) == STEPS - STOP
