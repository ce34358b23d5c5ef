"""Trainings that cannot come to anything stop in words, and leave a good checkpoint."""

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lit_adapters import AdapterCheckpoint, AdapterFineTuneModule, InitAdapters, LoRA, PiSSA
from lit_adapters.guards import PATIENCE
from tests.models import llama
from tests.test_module import examples, in_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
]


def fit(folder, optimizer, adapter=None, *callbacks):
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
