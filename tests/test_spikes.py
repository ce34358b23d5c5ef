"""SpikeGuard: what it takes for a spike, and what each action does to weights, state and rates."""

import csv
import json
import math
import random
from collections import deque
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    AlpacaDataModule,
    FullFineTuning,
    GaLore,
    LoRA,
    SpikeGuard,
)
from lit_adapters.callbacks import spikes
from lit_adapters.callbacks.deviation import deviation
from tests.models import llama, trainable
from tests.test_cli import run as command_line
from tests.test_module import Batches, examples, in_batches, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Lightning steps the schedule once more than the optimizer when a scaler skips the first step.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step"),
]

SHARED = Path(__file__).resolve().parents[2] / "shared"
FEWEST = spikes.FEWEST
THRESHOLD = SpikeGuard().threshold


# ---------------------------------------------------------------- the statistic


def steady(count, level=2.0, noise=0.1, seed=0):
    rng = random.Random(seed)
    return [(level * math.exp(noise * rng.gauss(0, 1)), 1.0) for _ in range(count)]


def test_a_jump_out_of_a_steep_fall_is_seen():
    """A small set learned by heart in thirty steps, then a record that contradicts it."""
    falling = [(6.0 * math.exp(-0.25 * i) + 0.004, 1.0) for i in range(30)]
    assert deviation(falling, falling[-1][0] * 3, 1.0) > THRESHOLD


def test_a_deviation_is_that_of_the_last_losses_in_logarithms():
    """Against the definition in other words, on losses without trend or tails."""
    earlier = steady(99)
    logs = torch.tensor([value for value, _ in earlier], dtype=torch.float64).log()
    expected = logs.unfold(0, 11, 1).sort().values[:, 5]  # medians of 11 steps
    errors = (logs[11:] - expected[:-1])[:-1]
    bends = (logs[2:] - 2 * logs[1:-1] + logs[:-2]).abs().median().item()
    spread = max(bends / 0.6745 / math.sqrt(6), errors.max().item() / 2.5)
    wanted = (math.log(3.0) - expected[-1].item()) / spread
    assert deviation(earlier, 3.0, 1.0) == pytest.approx(wanted, rel=0.1)


def test_scaling_the_loss_changes_nothing():
    earlier = steady(60)
    tenfold = [(10 * value, weight) for value, weight in earlier]
    assert deviation(tenfold, 50.0, 1.0) == pytest.approx(deviation(earlier, 5.0, 1.0), rel=1e-9)


def test_a_falling_loss_and_a_lower_one_are_no_spikes():
    falling = [(10 * math.exp(-i / 20) + 1, 1.0) for i in range(60)]
    assert deviation(falling, falling[-1][0], 1.0) < 1
    assert deviation(steady(60), 0.01, 1.0) < 0


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_deviates_infinitely(loss):
    assert deviation(steady(30), loss, 1.0) == math.inf


def test_losses_may_be_negative_or_zero():
    rng = random.Random(0)
    elbo = [(-3 + 0.1 * rng.gauss(0, 1), 1.0) for _ in range(60)]
    assert deviation(elbo, -2.9, 1.0) < 3
    assert deviation(elbo, 1.0, 1.0) > 8
    assert deviation([(0.0, 1.0)] * 30, 0.0, 1.0) == 0


def test_a_short_batch_may_deviate_more():
    earlier = [(value, 1000.0) for value, _ in steady(60)]
    whole, quarter = (deviation(earlier, 4.0, weight) for weight in (1000.0, 250.0))
    assert quarter == pytest.approx(whole / 2)
    assert deviation(earlier, 4.0, 4000.0) == whole


def test_noise_free_losses_need_more_than_rounding():
    flat = [(2.0, 1.0)] * 50
    assert deviation(flat, 2.0 + 1e-6, 1.0) < 0.1
    assert deviation(flat, 3.0, 1.0) > THRESHOLD


def curve(rng, noise, steps=300):
    """A training loss: warm-up, exponential fall to a floor, noise of a kind; and its weight."""
    high, low = rng.uniform(2, 10), rng.uniform(0.3, 2.5)
    scale, warmup = rng.choice([10, 50, 300]), rng.choice([0, 10, 50])
    for step in range(steps):
        level = low + (high - low) * math.exp(-max(0, step - warmup) / scale)
        yield noise(rng, level, step)


def normal(sd):
    return lambda rng, level, _: (level * math.exp(sd * rng.gauss(0, 1)), 1.0)


def student(rng, level, _):
    """Log-noise with the tails of Student's t of 5 degrees of freedom."""
    t = rng.gauss(0, 1) / math.sqrt(rng.gammavariate(2.5, 2) / 5)
    return level * math.exp(0.1 * t), 1.0


def batch_of(size):
    """Examples of lognormal lengths, each of its own difficulty; the mean is over tokens."""

    def noise(rng, level, _):
        tokens = [max(1, int(rng.lognormvariate(4, 0.8))) for _ in range(size)]
        losses = [level * math.exp(0.5 * rng.gauss(0, 1) - 0.125) for _ in range(size)]
        total = sum(tokens)
        return sum(n * x for n, x in zip(tokens, losses, strict=True)) / total, float(total)

    return noise


def epochs(rng, level, step):
    """Memorised from epoch to epoch; the last window of each is short."""
    size = 4 if step % 50 == 49 else 32
    loss, weight = batch_of(size)(rng, level, step)
    return loss * 0.7 ** (step // 50), weight


HEALTHY = {
    "quiet": normal(0.02),
    "normal": normal(0.1),
    "noisy": normal(0.4),
    "tails": student,
    "batches of 4": batch_of(4),
    "windows of 64": batch_of(64),
    "epochs": epochs,
}


def judged(losses, window=100):
    """Yield (index, deviation, recent) as SpikeGuard would see them."""
    recent = deque(maxlen=window)
    for index, (loss, weight) in enumerate(losses):
        high = deviation(recent, loss, weight) if len(recent) >= FEWEST else 0.0
        yield index, high, recent
        if high <= THRESHOLD:
            recent.append((loss, weight))


def test_healthy_runs_raise_fewer_than_one_false_alarm_in_a_thousand_steps():
    alarms, steps = {}, {}
    for name, noise in HEALTHY.items():
        rng = random.Random(1)
        runs = [high for _ in range(12) for _, high, _ in judged(curve(rng, noise))]
        alarms[name], steps[name] = sum(high > THRESHOLD for high in runs), len(runs)
    assert sum(alarms.values()) < sum(steps.values()) / 1000, alarms
    # With Student's tails a jump by more than half comes about so often by itself.
    assert alarms.pop("tails") < 3 * steps["tails"] / 1000
    assert all(count <= steps[name] / 1000 for name, count in alarms.items()), alarms


@pytest.mark.parametrize("factor", [2.0, 2.5, 3.0])
@pytest.mark.parametrize("noise", ["quiet", "normal", "windows of 64"])
def test_planted_spikes_are_found_within_two_steps(factor, noise):
    rng = random.Random(2)
    found = planted = 0
    for _ in range(12):
        for index, _, recent in judged(curve(rng, HEALTHY[noise])):
            if index < FEWEST + 1 or index % 12:
                continue
            (first, w1), (second, w2) = recent[-1], recent[-2]
            earlier = list(recent)[:-2]
            one = deviation(earlier, factor * second, w2)
            two = deviation([*earlier, (factor * second, w2)], factor * first, w1)
            planted, found = planted + 1, found + (max(one, two) > THRESHOLD)
    assert planted > 200
    assert found / planted > 0.95, found / planted


def test_a_real_training_of_the_embedded_base_raises_no_alarm(tmp_path):
    """Its losses are noisy: batches of two, of three tasks."""
    guard = SpikeGuard("skip")
    module = AdapterFineTuneModule(
        "tiny", optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3)
    )

    data = AlpacaDataModule("tiny", batch_size=2, max_length=256)
    trainer = make_trainer(
        tmp_path, max_steps=110, limit_val_batches=0, num_sanity_val_steps=0, callbacks=[guard]
    )
    trainer.fit(module, data)
    assert len(guard.recent) == 100
    assert guard.count == 0


# ---------------------------------------------------------------- foreign modules


class Foreign(LightningModule):
    """A regression whose loss is multiplied at some batches."""

    def __init__(self, spikes=(), factor=50.0, optimizer=None, schedule=None, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(6, 3, dtype=dtype)
        self.spikes, self.factor = spikes, factor
        self.make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1))
        self.schedule = schedule

    def training_step(self, batch, batch_idx):
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        return loss * (self.factor if self.trainer.fit_loop.total_batch_idx in self.spikes else 1)

    def configure_optimizers(self):
        optimizer = self.make(self.parameters())
        if self.schedule is None:
            return optimizer
        return [optimizer], [{"scheduler": self.schedule(optimizer), "interval": "step"}]


def rows(count=60):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count * 16, 6, generator=generator)
    y = torch.randn(count * 16, 3, generator=generator)
    return Batches(list(zip(x.split(16), y.split(16), strict=True)))


class Track(Callback):
    """Weights, optimizer state and rates of every step."""

    def __init__(self):
        self.weights, self.states, self.rates = [], [], []

    def on_train_start(self, trainer, module):
        self.keep(trainer, module)
        trainer.optimizers[0].register_step_pre_hook(self.rate)

    def rate(self, optimizer, *_):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def keep(self, trainer, module):
        self.weights.append(torch.cat([p.detach().flatten() for p in trainable(module).values()]))
        state = trainer.optimizers[0].state_dict()["state"]
        self.states.append(
            [v.clone() if torch.is_tensor(v) else v for s in state.values() for v in s.values()]
        )

    def on_train_batch_end(self, trainer, module, *_):
        self.keep(trainer, module)

    def moved(self):
        """Batches that changed weights or state."""
        return [
            i
            for i in range(len(self.weights) - 1)
            if not torch.equal(self.weights[i], self.weights[i + 1])
            or len(self.states[i]) != len(self.states[i + 1])
            or any(a.ne(b).any() for a, b in zip(self.states[i], self.states[i + 1], strict=True))
        ]


def run(folder, module, guard, batches=None, **settings):
    """Fit; the guard stands before `Track`, whose hook then sees what the optimizer sees."""
    track = Track()
    trainer = make_trainer(folder, **{"callbacks": [guard, track], **settings})
    trainer.fit(module, batches or rows())
    return trainer, track


def test_warn_says_so_and_steps(tmp_path, caplog):
    guard = SpikeGuard("warn")
    trainer, track = run(tmp_path, Foreign([40]), guard)
    assert track.moved() == list(range(60))
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("lit_adapters")]
    assert len(lines) == 1
    assert "optimizer step 41: the training loss jumps from about" in lines[0]
    assert trainer.logger["spike/count"] == [1]
    assert trainer.logger["spike/lr_factor"] == [1]
    assert trainer.logger["spike/deviation"][0] > THRESHOLD
    assert [step for step, row in trainer.logger.rows if "spike/loss" in row] == [40]


@pytest.mark.parametrize("factor", [50.0, math.nan, math.inf])
def test_skip_leaves_weights_and_state_alone_and_the_run_goes_on(tmp_path, caplog, factor):
    guard = SpikeGuard("skip")
    trainer, track = run(tmp_path, Foreign([40], factor), guard)
    assert track.moved() == [i for i in range(60) if i != 40]
    assert trainer.global_step == 60
    assert "step skipped" in caplog.text


def test_the_rest_of_the_run_is_as_without_the_bad_batch(tmp_path):
    """Only the counts of steps differ."""
    _, skipped = run(tmp_path, Foreign([40]), SpikeGuard("skip"))
    batches = rows()
    del batches.batches[40]
    _, without = run(tmp_path, Foreign(), SpikeGuard("skip"), batches)
    assert torch.equal(skipped.weights[-1], without.weights[-1])


def test_a_loss_that_is_no_number_is_seen_from_the_first_step_on(tmp_path):
    _, track = run(tmp_path, Foreign([0, 2], math.nan), SpikeGuard("skip"))
    assert track.moved() == [1, *range(3, 60)]


def test_gradients_that_are_no_numbers_are_seen_though_the_loss_is_one(tmp_path, caplog):
    class Poisoned(Foreign):
        def on_after_backward(self):
            if self.trainer.fit_loop.total_batch_idx == 30:
                self.net.weight.grad[0, 0] = math.nan

    _, track = run(tmp_path, Poisoned(), SpikeGuard("skip"))
    assert track.moved() == [i for i in range(60) if i != 30]
    assert "norm of the gradients is nan" in caplog.text


@pytest.mark.parametrize("clip", ["norm", "value"])
def test_a_window_of_several_batches_is_one_step(tmp_path, clip):
    """Clipping comes after, and one bad batch of four is enough; the last window is short."""
    guard = SpikeGuard("skip", window=FEWEST)
    settings = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5, "max_epochs": 1}
    trainer, track = run(
        tmp_path,
        Foreign([121]),
        guard,
        rows(142),
        gradient_clip_algorithm=clip,
        **settings,
    )
    assert trainer.global_step == 36
    assert track.moved() == [*(i for i in range(3, 142, 4) if i != 123), 141]
    assert guard.recent[-1][1] == 2  # batches of the last window
    assert guard.count == 1


def test_a_level_that_stays_is_taken_for_the_new_one(tmp_path, caplog):
    guard = SpikeGuard("skip", limit=3)
    _, track = run(tmp_path, Foreign(range(40, 60), 20.0), guard)
    assert track.moved() == [i for i in range(60) if i not in (40, 41, 42)]
    assert "taken for the new level" in caplog.text
    assert guard.count == 4


def test_skipping_what_never_becomes_a_number_ends_in_words(tmp_path):
    with pytest.raises(RuntimeError, match="in 4 steps in a row, so skipping them does not help"):
        run(tmp_path, Foreign(range(30, 60), math.nan), SpikeGuard("skip", limit=3))


SCHEDULES = {
    "none": None,
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 60, eta_min=1e-4),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 - step / 60),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, [0.02, 0.05], 60, cycle_momentum=False),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=20), lr_scheduler.ExponentialLR(o, 0.9)], [20]
    ),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7),
}


def two_groups(parameters):
    weight, bias = parameters
    return torch.optim.SGD([{"params": [weight]}, {"params": [bias], "lr": 3e-3}], lr=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_lowered_rate_stays_lowered_under_every_schedule(tmp_path, schedule):
    """The optimizer's own rates against those of the same run without a spike."""
    module = Foreign([40], optimizer=two_groups, schedule=schedule)
    # Its hook is the last, so that it sees what the optimizer sees.
    trainer, track = run(tmp_path / "a", module, SpikeGuard("lower-lr", factor=0.3))
    plain = Foreign(optimizer=two_groups, schedule=schedule)
    _, free = run(tmp_path / "b", plain, SpikeGuard("lower-lr", factor=0.3))
    assert track.rates[:41] == free.rates[:41]
    for lowered, full in zip(track.rates[41:], free.rates[41:], strict=True):
        assert lowered == pytest.approx([0.3 * rate for rate in full], rel=1e-12)
    assert track.moved() == [i for i in range(60) if i != 40]
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == [
        g["lr"] for g in plain.trainer.optimizers[0].param_groups
    ]
    moves = [(b - a).norm() for a, b in zip(track.weights, track.weights[1:], strict=False)]
    assert moves[50] < moves[39] or schedule is not None


def test_a_plateau_schedule_goes_on_as_if_nothing_was(tmp_path):
    class Plateau(Foreign):
        def configure_optimizers(self):
            optimizer = two_groups(self.parameters())
            plan = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
            return [optimizer], [{"scheduler": plan, "interval": "epoch", "monitor": "flat"}]

        def on_train_epoch_end(self):
            self.log("flat", 1.0)

    _, track = run(
        tmp_path, Plateau([40]), SpikeGuard("lower-lr", factor=0.1), rows(20), max_epochs=5
    )
    assert track.rates[45] == pytest.approx([0.1 * 0.5e-3, 0.1 * 1.5e-3])
    assert track.rates[99] == pytest.approx([0.1 * 0.5**3 * 1e-3, 0.1 * 0.5**3 * 3e-3])


def test_patience_skips_single_bad_batches_and_acts_on_what_stays(tmp_path):
    guard = SpikeGuard("lower-lr", patience=1)
    _, track = run(tmp_path, Foreign([40, 50, 51]), guard)
    assert guard.lr_factor == pytest.approx(0.3)
    assert [track.rates[i][0] for i in (41, 51, 52)] == pytest.approx([1e-3, 1e-3, 3e-4])


def test_rates_are_not_lowered_for_ever(tmp_path):
    with pytest.raises(RuntimeError, match=r"has acted 2 times \(limit\).*lower learning rate"):
        run(tmp_path, Foreign([30, 31, 32], math.nan), SpikeGuard("lower-lr", limit=2))


class Damaged(Foreign):
    """Its weights are overwritten after some batches: a step that went wrong."""

    def on_train_batch_end(self, *_):
        if self.trainer.fit_loop.total_batch_idx in self.spikes:
            with torch.no_grad():
                self.net.weight.add_(100)

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("fused", [False, True])
def test_restore_puts_the_last_good_weights_and_state_back(tmp_path, caplog, fused):
    """The state after step 40 is damaged unseen, and copied then: no loss was seen since."""

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, fused=fused)

    guard = SpikeGuard("restore", every=10)
    _, track = run(tmp_path, Damaged([39], optimizer=adamw), guard)
    # Batch 40 is the first whose loss shows it; before it, the copy after step 30 was proven.
    assert torch.equal(track.weights[41], track.weights[30])
    for ours, then in zip(track.states[41], track.states[30], strict=True):
        assert torch.equal(ours, then)
    assert track.rates[41] == pytest.approx([3e-4])
    assert "last good state put back" in caplog.text
    assert guard.count == 1
    assert track.weights[-1].abs().max() < 10


def test_restore_knows_the_start_as_a_good_state(tmp_path):
    _, track = run(tmp_path, Foreign([0], math.nan), SpikeGuard("restore", factor=1))
    assert torch.equal(track.weights[1], track.weights[0])
    assert track.states[1] == []
    assert track.rates[5] == [1e-3]


def test_restores_end_in_words(tmp_path):
    with pytest.raises(RuntimeError, match="action='restore'.* has acted 3 times"):
        run(tmp_path, Damaged(range(38, 60)), SpikeGuard("restore", factor=1))


def test_restores_far_apart_are_no_reason_to_stop(tmp_path):
    guard = SpikeGuard("restore", window=FEWEST, limit=1, factor=1)
    run(tmp_path, Damaged([30, 65, 100]), guard, rows(120))
    assert guard.count == 3


def test_the_rate_is_as_scheduled_after_an_exception_in_a_step(tmp_path):
    class Broken(Foreign):
        def on_after_backward(self):
            if self.trainer.fit_loop.total_batch_idx == 50:
                raise KeyError("planted")

    module = Broken([40])
    with pytest.raises(KeyError, match="planted"):
        run(tmp_path, module, SpikeGuard("lower-lr"))
    assert module.trainer.optimizers[0].param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("inside", [False, True], ids=["unscaled", "fused"])
def test_under_a_scaler_a_spike_is_skipped_and_an_overflow_left_to_it(tmp_path, inside):
    """The loss arrives multiplied by the scale, which must not show."""

    class Overflowing(Foreign):
        def on_after_backward(self):
            if self.trainer.fit_loop.total_batch_idx == 35:
                self.net.weight.grad[0, 0] = math.inf

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=1e-3, fused=inside)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=20)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    module = Overflowing([45], optimizer=adamw)
    guard = SpikeGuard("skip")
    _, track = run(tmp_path, module, guard, plugins=plugin)
    assert track.moved() == [i for i in range(60) if i not in (35, 45)]
    assert guard.count == 1
    assert guard.recent[-1][0] < 3


def test_several_optimizers_are_refused(tmp_path):
    class Two(Foreign):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    with pytest.raises(ValueError, match="one optimizer, and Two has 2"):
        run(tmp_path, Two(), SpikeGuard())


def test_manual_optimisation_is_watched_too(tmp_path):
    class Manual(Foreign):
        def __init__(self, *args):
            super().__init__(*args)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    _, track = run(tmp_path, Manual([40]), SpikeGuard("skip"))
    assert track.moved() == [i for i in range(60) if i != 40]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"action": "lower_lr"}, "action must be one of warn, skip, lower-lr, restore"),
        ({"window": 5}, "window=5 tells too little"),
        ({"threshold": 0.0}, "threshold must be above 0"),
        ({"factor": 3.0}, "factor=3.0 must be above 0 and at most 1"),
        ({"limit": 0}, "limit and every 1 or more"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SpikeGuard(**settings)


# ---------------------------------------------------------------- our module


def poisoned(count=60, at=40, size=4):
    """Batches of one easy task; in one of them every label is another token than it should be."""
    rows = [
        {"input_ids": [3, 4, 5 + n % 3, 6, 7, 8], "labels": [-100, -100, 5 + n % 3, 6, 7, 8]}
        for n in range(count * size)
    ]
    for row in rows[at * size : (at + 1) * size]:
        row["labels"] = [-100, -100, 60, 61, 62, 63]
    return in_batches(rows, size)


def ours(**settings):
    settings = {
        "adapter": LoRA(rank=4),
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-2),
        "lr_scheduler": "constant",
        "warmup": 0,
        **settings,
    }
    return AdapterFineTuneModule(llama(), **settings)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_bad_batch_of_ours_is_skipped(tmp_path, accumulate, precision):
    guard = SpikeGuard("skip")
    batches = poisoned(60 * accumulate, at=40 * accumulate)
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    trainer, track = run(tmp_path, ours(), guard, batches, precision=precision, **settings)
    assert track.moved() == [
        i for i in range(60 * accumulate) if (i + 1) % accumulate == 0 and i // accumulate != 40
    ]
    assert len(trainer.logger["train/loss"]) == 60  # that of the step left out is logged too
    assert guard.recent[-1] == (pytest.approx(trainer.logger["train/loss"][-1]), 16 * accumulate)


def test_lora_plus_and_our_schedule_keep_their_shape_below_the_lowered_rate(tmp_path):
    settings = {"lora_plus_ratio": 16.0, "lr_scheduler": "cosine", "warmup": 5}
    slow = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3), **settings}
    _, free = run(tmp_path / "a", ours(**slow), SpikeGuard("warn"), poisoned())
    trainer, track = run(tmp_path / "b", ours(**slow), SpikeGuard("lower-lr"), poisoned())
    assert track.rates[:41] == free.rates[:41]
    assert track.rates[50] == pytest.approx([0.3 * rate for rate in free.rates[50]])
    assert track.rates[50][1] == pytest.approx(16 * track.rates[50][0])
    assert trainer.logger["lr"] == pytest.approx([rates[0] for rates in track.rates])


@pytest.mark.parametrize("action", ["skip", "lower-lr", "restore"])
def test_the_guard_has_its_chance_before_a_loss_that_is_no_number_stops_the_run(tmp_path, action):
    class Exploding(AdapterFineTuneModule):
        def nll(self, batch):
            nll, tokens = super().nll(batch)
            return nll * (math.nan if self.trainer.global_step == 5 else 1), tokens

    module = Exploding(llama(), LoRA(rank=4))
    guard = SpikeGuard(action)
    trainer, track = run(tmp_path, module, guard, in_batches(examples(40), 4))
    assert trainer.global_step == 10
    assert guard.count == 1
    assert all(weights.isfinite().all() for weights in track.weights)
    with pytest.raises(RuntimeError, match="training loss is nan after 5"):
        run(tmp_path, Exploding(llama(), LoRA(rank=4)), SpikeGuard(), in_batches(examples(40), 4))


@pytest.mark.parametrize("moments", ["keep", "reset", "rotate"])
@pytest.mark.parametrize("at", [39, 40])
def test_a_skipped_step_leaves_galore_as_if_the_batch_had_not_been(tmp_path, moments, at):
    """Also where it would have chosen the subspaces (before every third step)."""

    def galore():
        return GaLore(rank=4, update_gap=3, targets="all-linear", moments=moments)

    def fit(folder, batches):
        module = Loud(
            llama(), FullFineTuning(), optimizer=adamw_slow, lr_scheduler="constant", warmup=0
        )
        guard = SpikeGuard("skip")
        run(folder, module, guard, batches, callbacks=[galore(), guard])
        return guard, trainable(module)

    batches = poisoned(at=at)
    guard, skipped = fit(tmp_path / "a", batches)
    assert guard.count == 1
    del batches.batches[at]
    _, without = fit(tmp_path / "b", batches)
    assert all(torch.equal(skipped[name], without[name]) for name in without)


class Loud(AdapterFineTuneModule):
    """Of a bad batch the gradients are finite and large, so that subspaces are chosen from them."""

    def nll(self, batch):
        nll, tokens = super().nll(batch)
        return nll * (50 if (batch["labels"] == 60).any() else 1), tokens


def adamw_slow(groups):
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)


def test_restore_takes_galore_s_subspaces_back_too(tmp_path):
    galore = GaLore(rank=4, update_gap=7, targets="all-linear")
    states = []

    class Watch(Callback):
        def on_train_batch_end(self, *_):
            state = galore.engine.state_dict()
            found = trainable(module)
            states.append((json.dumps(state, default=lambda t: t.tolist()), found))

    module = Loud(llama(), FullFineTuning(), optimizer=adamw_slow)
    guard = SpikeGuard("restore", every=10)
    make_trainer(tmp_path, callbacks=[galore, guard, Watch()]).fit(module, poisoned(at=36))
    assert guard.count == 1, guard.count
    assert states[36][0] == states[29][0]
    assert all(torch.equal(states[36][1][name], value) for name, value in states[29][1].items())


@pytest.mark.parametrize("action", ["skip", "lower-lr", "restore"])
@pytest.mark.parametrize("stop", [35, 40, 43])
def test_a_run_resumed_around_a_spike_is_to_the_bit_the_one_that_was_not_stopped(
    tmp_path, action, stop
):
    """At 40 a copy for restore was taken, and not yet proven."""

    def fit(folder, **settings):
        guard, module = SpikeGuard(action, every=10), ours(optimizer=adamw_slow)
        path = settings.pop("ckpt_path", None)
        saving = AdapterCheckpoint(folder, monitor=None, every_n_train_steps=1)
        trainer = make_trainer(
            folder, callbacks=[guard, saving], enable_checkpointing=True, **settings
        )
        trainer.fit(module, Resumable(poisoned(at=42).batches), ckpt_path=path)
        return guard, trainable(module)

    whole, expected = fit(tmp_path / "a")
    assert whole.count == 1
    fit(tmp_path / "b", max_steps=stop)
    kept = torch.load(tmp_path / "b" / "last.ckpt", weights_only=True)
    assert kept["callbacks"]["SpikeGuard"]["count"] == (stop > 42)
    guard, found = fit(tmp_path / "b", ckpt_path=tmp_path / "b" / "last.ckpt")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert guard.recent == whole.recent
    assert (guard.count, guard.lr_factor, guard.quiet) == (1, whole.lr_factor, whole.quiet)


class Resumable(Batches):
    """Goes on where it was left, as Lightning asks of a loader."""

    def __init__(self, batches):
        super().__init__(batches)
        self.at = 0

    def __iter__(self):
        while self.at < len(self.batches):
            self.at += 1
            yield self.batches[self.at - 1]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


CONFIG = """
trainer:
  max_steps: 60
  max_epochs: -1
  accelerator: cpu
  log_every_n_steps: 1
  limit_val_batches: 0
  default_root_dir: {root}
  callbacks:
    - class_path: lit_adapters.SpikeGuard
      init_args:
        action: {action}
model:
  base: tiny
  lr_scheduler: constant
  warmup: 0
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {{lr: 5.0e-3}}
data:
  path: {data}
  batch_size: 2
  val_size: 2
samples:
  limit: 0
"""


@pytest.mark.parametrize("action", ["warn", "lower-lr"])
def test_a_config_names_the_guard_and_a_bad_record_shows_in_the_logs(tmp_path, action, caplog):
    records = [{"prompt": f"Say {n % 3}.", "completion": "one two three four"} for n in range(62)]
    for number in (30, 31):
        records[number]["completion"] = "qzx jvk wyq zzq"
    data, config = tmp_path / "pairs.jsonl", tmp_path / "run.yaml"
    data.write_text("\n".join(map(json.dumps, records)))
    config.write_text(CONFIG.format(root=tmp_path, action=action, data=data))
    command_line("fit", "--config", config)
    (metrics,) = tmp_path.glob("lightning_logs/version_0/metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    events = [row for row in rows if row.get("spike/loss")]
    assert events, [row["train/loss"] for row in rows]
    rates = [float(row["lr"]) for row in rows if row["lr"]]
    assert rates[0] == pytest.approx(5e-3)
    assert rates[-1] == pytest.approx(5e-3 * (1 if action == "warn" else 0.3 ** len(events)))
    assert "jumps from about" in caplog.text
