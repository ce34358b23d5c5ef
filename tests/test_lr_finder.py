"""Lightning's learning-rate finder on the module: what it finds is used, all else is as before."""

import csv
import json

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from torch.optim.lr_scheduler import CosineAnnealingLR

from lit_adapters import (
    AdapterCheckpoint,
    AdapterFineTuneModule,
    FullFineTuning,
    GaLore,
    InstructionDataModule,
    LoRA,
    SpikeGuard,
)
from tests.data.word_tokenizer import word_tokenizer
from tests.models import base_bytes, gpt2, llama, trainable
from tests.test_cli import fit_arguments
from tests.test_cli import run as command_line
from tests.test_datamodule import RECORDS
from tests.test_module import make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
]


@pytest.fixture
def data(tmp_path):
    """Makes a data module; the batches of an epoch are of different lengths."""
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))

    def make(**settings):
        return InstructionDataModule(
            str(file),
            tokenizer=word_tokenizer(),
            batch_size=4,
            val_size=6,
            max_length=32,
            **settings,
        )

    return make


def adamw(groups):
    return torch.optim.AdamW(groups, lr=1e-3)


def sgd(groups):
    return torch.optim.SGD(groups, lr=1e-3)


def module(optimizer=adamw, base=None, **settings):
    """Dropout in base and adapter: whatever touches the random state shows."""
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.1)
    base = base or gpt2(vocab_size=len(word_tokenizer()), **dropout)
    settings = {"adapter": LoRA(rank=4, dropout=0.1), "warmup": 3, **settings}
    return AdapterFineTuneModule(base, tokenizer=word_tokenizer(), optimizer=optimizer, **settings)


class Watch(Callback):
    """Rates that optimizers step with, and what they are trained on."""

    def __init__(self):
        self.rates, self.ids = [], []

    def on_train_start(self, trainer, *_):
        trainer.optimizers[0].register_step_pre_hook(self.rate)

    def rate(self, optimizer, *_):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.ids.append(batch["input_ids"].tolist())


def trainer_of(folder, *callbacks, **settings):
    watch = Watch()
    settings = {"max_epochs": 8, "num_sanity_val_steps": 1, **settings}
    saving = {} if "enable_checkpointing" in settings else {"enable_checkpointing": True}
    callbacks = [*callbacks, watch, AdapterCheckpoint(folder / "out")]
    return make_trainer(folder, callbacks=callbacks, **saving, **settings), watch


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fit_after_a_search_is_to_the_bit_the_fit_without(tmp_path, data, accumulate):
    """Adapter, optimizer, random state, data, steps, logs; and no file is left."""
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 0.5}
    seed_everything(5, verbose=False)
    trainer, watch = trainer_of(tmp_path / "a", **settings)
    plain = module()
    trainer.fit(plain, data())

    seed_everything(5, verbose=False)
    searching, seen = trainer_of(tmp_path / "b", SpikeGuard("restore"), **settings)
    searched, theirs = module(), data()
    finder = Tuner(searching).lr_find(
        searched, datamodule=theirs, num_training=20, max_lr=0.01, update_attr=False
    )
    assert len(finder.results["lr"]) > 10
    assert seen.ids == []
    assert not list((tmp_path / "b").rglob("*.ckpt"))
    assert not list((tmp_path / "b" / "out").iterdir())
    searching.fit(searched, theirs)
    assert equal(trainable(searched), trainable(plain))
    assert base_bytes(searched.model) == base_bytes(plain.model)
    assert (seen.ids, seen.rates) == (watch.ids, watch.rates)
    assert searching.global_step == trainer.global_step
    for name in ("train/loss", "val/loss", "lr"):
        assert searching.logger[name] == trainer.logger[name]


@pytest.mark.parametrize(
    ("settings", "packed"),
    [
        ({"batching": "packed"}, True),
        ({"batching": "packed", "batch_tokens": 40}, True),
        ({"streaming": True, "shuffle_buffer": 8}, True),
        ({"streaming": True, "shuffle_buffer": 8, "batching": "padded"}, False),
        ({"streaming": True, "batch_tokens": 40}, True),
    ],
    ids=str,
)
def test_a_fit_after_a_search_sees_the_packed_or_streamed_data_of_one_without(
    tmp_path, data, settings, packed
):
    runs = []
    for searches in (False, True):
        seed_everything(5, verbose=False)
        trainer, watch = trainer_of(tmp_path / str(searches), max_epochs=-1, max_steps=17)
        ours, theirs = module(base=llama(vocab_size=len(word_tokenizer()))), data(**settings)
        if searches:  # ends within an epoch, and not its first
            Tuner(trainer).lr_find(ours, datamodule=theirs, num_training=11, update_attr=False)
            assert watch.ids == []
        trainer.fit(ours, theirs)
        runs.append((watch.ids, trainable(ours)))
    (plain, expected), (seen, found) = runs
    assert all(len(batch) == 1 for batch in plain) == packed
    assert len(plain) == 17
    assert seen == plain
    assert equal(found, expected)


def test_an_evaluation_after_a_search_is_one(tmp_path, data):
    trainer, _ = trainer_of(tmp_path)
    ours, theirs = module(), data()
    Tuner(trainer).lr_find(ours, datamodule=theirs, num_training=4, update_attr=False)
    after = trainer.validate(ours, theirs, verbose=False)
    fresh = trainer_of(tmp_path)[0].validate(module(), data(), verbose=False)
    assert after[0]["val/loss"] == pytest.approx(fresh[0]["val/loss"], rel=1e-6)


def test_what_was_found_is_what_the_fit_uses(tmp_path, data):
    trainer, watch = trainer_of(tmp_path)
    ours, theirs = module(lora_plus_ratio=16.0, lr_scheduler="constant"), data()
    found = Tuner(trainer).lr_find(ours, datamodule=theirs, num_training=30).suggestion()
    assert ours.learning_rate == ours.hparams["learning_rate"] == found
    assert 1e-8 < found < 1
    assert found != 1e-3
    trainer.fit(ours, theirs)
    first, second = watch.rates[-1][:2]
    assert first == pytest.approx(found)
    assert second == pytest.approx(16 * found)
    assert watch.rates[0][0] == pytest.approx(found / 4)  # of 3 steps of warm-up


def test_the_search_steps_with_the_rates_that_it_reports_and_compares_means_over_tokens(
    tmp_path, data
):
    rates = []

    def recorded(groups):
        optimizer = sgd(groups)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    trainer, _ = trainer_of(tmp_path)
    ours = module(recorded, adapter=LoRA(rank=4))
    finder = Tuner(trainer).lr_find(
        ours, datamodule=data(), num_training=12, min_lr=1e-7, max_lr=1e-5, update_attr=False
    )
    assert rates == pytest.approx(finder.results["lr"])
    assert (rates[0], rates[-1]) == (pytest.approx(1e-7), pytest.approx(1e-5, rel=0.5))
    # At these rates nothing is learned: every smoothed loss is about that of the start.
    with torch.no_grad():
        batch = next(iter(ours.trainer.datamodule.train_dataloader()))
        nll, tokens = ours.nll(batch)
    assert finder.results["loss"][-3:] == pytest.approx([(nll / tokens).item()] * 3, rel=0.2)


def test_a_search_into_the_absurd_ends_early_and_is_undone(tmp_path, data):
    trainer, _ = trainer_of(tmp_path)
    ours = module(sgd)
    ours.configure_model()
    before = trainable(ours)
    finder = Tuner(trainer).lr_find(
        ours,
        datamodule=data(),
        min_lr=1e-3,
        max_lr=1e30,
        num_training=60,
        early_stop_threshold=None,
        update_attr=False,
    )
    assert len(finder.results["loss"]) < 60
    assert equal(trainable(ours), before)


@pytest.mark.parametrize("schedule", ["cosine", lambda o: CosineAnnealingLR(o, 12)])
@pytest.mark.parametrize(
    "rates",
    [
        {"lora_plus_ratio": 4.0},
        {"embedding_lr": 3e-4, "adapter": LoRA(rank=2, targets=["wte", "c_attn"])},
    ],
    ids=["lora-plus", "embedding"],
)
def test_found_by_a_callback_the_rate_is_used_as_if_given(tmp_path, data, schedule, rates):
    """The run goes on to the bit as one that was told this rate, whatever the schedule."""
    seed_everything(5, verbose=False)
    finder = LearningRateFinder(num_training_steps=30)
    trainer, watch = trainer_of(tmp_path / "a", finder)
    searched = module(lr_scheduler=schedule, **rates)
    trainer.fit(searched, data())
    found = searched.learning_rate
    assert found == finder.optimal_lr.suggestion() != 1e-3

    seed_everything(5, verbose=False)
    told, seen = trainer_of(tmp_path / "b")
    plain = module(lr_scheduler=schedule, **rates, learning_rate=found)
    told.fit(plain, data())
    assert watch.rates == [pytest.approx(rates, rel=1e-9) for rates in seen.rates]
    assert watch.ids == seen.ids
    for name, value in trainable(searched).items():
        torch.testing.assert_close(value, trainable(plain)[name], rtol=1e-5, atol=1e-7)


def test_galore_waits_for_the_search(tmp_path, data):
    galore = GaLore(rank=4, targets="all-linear")
    trainer, _ = trainer_of(tmp_path, galore)
    ours, theirs = module(adapter=FullFineTuning()), data()
    finder = Tuner(trainer).lr_find(ours, datamodule=theirs, num_training=15, update_attr=False)
    assert len(finder.results["lr"]) == 15
    trainer.fit(ours, theirs)
    assert galore.engine.projected


def test_a_given_rate_wins_over_the_optimizer_s_and_keeps_ratios(tmp_path, data):
    def uneven(groups):
        return torch.optim.SGD([{**g, "lr": 0.1 * (1 + i)} for i, g in enumerate(groups)], lr=0.1)

    trainer, watch = trainer_of(tmp_path, max_steps=1)
    ours = module(uneven, warmup=0, lr_scheduler="constant", learning_rate=0.02)
    ours.adapter = FullFineTuning()
    trainer.fit(ours, data())
    assert watch.rates == [pytest.approx([0.02, 0.04])]
    kept = torch.load(tmp_path / "out" / "last.ckpt", weights_only=True)
    assert kept["hyper_parameters"]["learning_rate"] == 0.02


def test_the_command_line_finds_a_rate_and_trains_with_it(tmp_path):
    """And says so in the checkpoint, from which a resumed run takes it."""
    callback = "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateFinder"
    command_line(
        *fit_arguments(tmp_path, callback, "--trainer.callbacks.num_training_steps=25"),
        "--model.lr_scheduler=constant",
        "--model.warmup=0",
        "--trainer.limit_val_batches=0",
        "--samples.limit=0",
        "--trainer.max_steps=3",
    )
    (version,) = tmp_path.glob("lightning_logs/version_0")
    with (version / "metrics.csv").open() as file:
        rates = {row["lr"] for row in csv.DictReader(file) if row["lr"]}
    kept = torch.load(version / "checkpoints" / "last.ckpt", weights_only=True)
    found = kept["hyper_parameters"]["learning_rate"]
    assert [float(rate) for rate in rates] == [pytest.approx(found)]
