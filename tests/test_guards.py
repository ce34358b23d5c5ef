"""Trainings that cannot come to anything stop in words, and leave a good checkpoint."""

import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn
from torch.utils.data import DataLoader

from lit_adapters import AdapterCheckpoint, AdapterFineTuneModule, InitAdapters, LoRA, PiSSA
from lit_adapters.data import collate
from lit_adapters.datamodule import InstructionDataModule
from lit_adapters.guards import PATIENCE
from tests.data.word_tokenizer import word_tokenizer
from tests.models import llama, snapshot
from tests.test_module import adamw, examples, in_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def fit(folder, optimizer, adapter=None, *callbacks, **settings):
    module = AdapterFineTuneModule(
        llama(), adapter or LoRA(rank=2), optimizer=optimizer, lr_scheduler="constant", warmup=0
    )
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=PATIENCE + 3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[AdapterCheckpoint(folder, monitor=None, every_n_train_steps=1), *callbacks],
        **settings,
    )
    trainer.fit(module, in_batches(examples(60), 4))
    return module


def test_a_loss_that_is_no_number_stops_before_the_step_and_the_checkpoint_is_good(tmp_path):
    def explosive(groups):
        return torch.optim.SGD(groups, lr=1e30)

    with pytest.raises(RuntimeError, match=r"training loss is (nan|inf) after \d+ .*Lower the"):
        fit(tmp_path, explosive)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert kept["global_step"] >= 1
    assert all(value.isfinite().all() for value in kept["state_dict"].values())


class Breaks(Callback):
    """Makes the loss NaN in some batches."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.model.model.norm.weight.fill_(torch.nan if batch_idx in self.batches else 1)


def in_fp16():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**4))


def test_under_a_scaler_steps_without_a_loss_are_left_out(tmp_path):
    once = Breaks({1, *range(3, PATIENCE + 2)})  # and one fewer in a row than are too many
    module = fit(tmp_path, adamw, None, once, plugins=in_fp16())
    assert all(p.isfinite().all() for p in module.parameters() if p.requires_grad)
    assert module.trainer.global_step == PATIENCE + 3


def test_under_a_scaler_a_loss_that_stays_no_number_stops_the_training(tmp_path):
    with pytest.raises(RuntimeError, match=r"training loss is nan after 11 .*instead of fp16"):
        fit(tmp_path, adamw, None, Breaks(range(2, 100)), plugins=in_fp16())


def test_an_optimizer_of_something_else_is_found_at_its_first_step(tmp_path):
    def stray(groups):
        return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)

    with pytest.raises(RuntimeError, match="no parameter of the optimizer got a gradient"):
        fit(tmp_path, stray)


def still(groups):
    return torch.optim.SGD(groups, lr=0.0)


def test_adapters_that_stay_at_zero_stop_the_training(tmp_path):
    with pytest.raises(RuntimeError, match=r"after 10 .*lora_B is still zero.*rate 0\)"):
        fit(tmp_path, still)


@pytest.mark.parametrize(
    ("optimizer", "callbacks"),
    [(lambda groups: torch.optim.SGD(groups, lr=0.1), []), (still, [InitAdapters(PiSSA())])],
    ids=["ordinary", "pinned"],
)
def test_what_moves_or_started_elsewhere_is_left_alone(tmp_path, optimizer, callbacks):
    assert fit(tmp_path, optimizer, None, *callbacks).trainer.global_step == PATIENCE + 3


def masked(rows, which):
    """The same rows; those that ``which`` picks by number train nothing."""
    for number, row in enumerate(rows):
        if which(number):
            row["labels"] = [-100] * len(row["labels"])
    return rows


def train(folder, batches, module=None, **settings):
    module = module or AdapterFineTuneModule(llama(), LoRA(rank=2))
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **settings,
    )
    trainer.fit(module, batches)
    return module


NOTHING_TRAINED = r"no token of optimizer step 3 is trained.*-100.*batch\['labels'\].*max_length"


@pytest.mark.parametrize("foreign", [False, True], ids=["ours", "DataLoader"])
def test_a_window_of_masked_labels_stops_the_training_with_its_number(tmp_path, foreign):
    rows = masked(examples(12), lambda number: number in (4, 5))
    batches = in_batches(rows, 2)
    if foreign:
        batches = DataLoader(rows, batch_size=2, collate_fn=partial(collate, pad_id=0))
    module = AdapterFineTuneModule(llama(), LoRA(rank=2), optimizer=adamw)
    module.configure_model()
    seen = []

    class Watching(Callback):
        def on_train_batch_start(self, *_):
            seen.append(snapshot(module.model))

    with pytest.raises(RuntimeError, match=NOTHING_TRAINED):
        train(tmp_path, batches, module, callbacks=[Watching()])
    assert module.trainer.global_step == 2
    assert len(seen) == 3
    assert snapshot(module.model)["state"] == seen[-1]["state"]  # momentum would have moved it
    assert snapshot(module.model)["requires_grad"] == seen[-1]["requires_grad"]


def test_a_masked_batch_beside_others_in_its_window_is_fine(tmp_path):
    rows = masked(examples(12), lambda number: number % 4 < 2)
    module = train(tmp_path, in_batches(rows, 2), accumulate_grad_batches=2)
    assert module.trainer.global_step == 3


@pytest.mark.parametrize("others", [0, 7])
def test_a_rank_without_labels_is_fine_as_long_as_another_has_some(tmp_path, monkeypatch, others):
    """The sum over ranks decides, which all of them know: all go on, or all stop."""

    def of_all_ranks(self, both, *_, reduce_op="mean"):
        if both.shape != (2,):  # what is logged
            return both
        assert reduce_op == "sum"
        return both + torch.tensor([1.5 * others, others], dtype=both.dtype)

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", of_all_ranks)
    rows = masked(examples(4), lambda number: True)
    if others:
        assert train(tmp_path, in_batches(rows, 2)).trainer.global_step == 2
    else:
        with pytest.raises(RuntimeError, match="no token of optimizer step 1 is trained"):
            train(tmp_path, in_batches(rows, 2))


def test_our_data_module_never_makes_a_batch_without_labels(tmp_path):
    """What would be left without one is dropped, and counted, before the first step."""
    file = tmp_path / "a.json"
    records = [{"prompt": "a " * (3 + 9 * (n % 2)), "completion": "b"} for n in range(20)]
    file.write_text(json.dumps(records))
    data = InstructionDataModule(
        str(file), tokenizer=word_tokenizer(), max_length=8, batch_size=1, val_size=2
    )
    module, report = train(tmp_path, data), data.reports["train"]
    assert module.trainer.global_step == report.kept >= 8
    assert report.dropped == report.long_prompts == 18 - report.kept
