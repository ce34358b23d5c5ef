"""Resuming through the command line: what is said now beats what the checkpoint says."""

import sys
from pathlib import Path

import pytest
import torch

from lit_adapters.__main__ import main
from lit_adapters.saved_settings import trusted_settings

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "alpaca_lora.yaml"

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:.*Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step`"),
]


def command(root: Path, *more: str) -> None:
    words = [
        "fit", "--config", str(CONFIG), f"--trainer.default_root_dir={root}",
        "--data.train_limit=64", "--trainer.limit_val_batches=0", "--trainer.max_epochs=2",
        *more,
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit_adapters", *words])
        main()


def fit(root: Path, *more: str) -> dict:
    """A short fit; returns its last checkpoint."""
    command(root, *more)
    files = sorted(root.glob("lightning_logs/version_*/checkpoints/last.ckpt"))
    return torch.load(files[-1], weights_only=True) | {"path": files[-1]}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    more = ["--trainer.max_steps=5", "--model.adapter.init_args.rank=4", "--model.warmup=0"]
    return fit(tmp_path_factory.mktemp("first"), *more)


def resumed(first, root, *more: str) -> dict:
    common = ["--trainer.max_steps=8", "--model.adapter.init_args.rank=4", "--model.warmup=0"]
    return fit(root, *common, f"--ckpt_path={first['path']}", *more)


def test_the_step_goes_on(first, tmp_path):
    assert first["global_step"] == 5
    assert resumed(first, tmp_path)["global_step"] == 8


def test_a_flag_inside_the_adapter_changes_that_setting_alone(first, tmp_path):
    found = resumed(first, tmp_path, "--model.adapter.init_args.dropout=0.25")
    settings = found["hyper_parameters"]["adapter"]["init_args"]
    assert settings["dropout"] == 0.25
    assert settings["rank"] == 4


def test_a_learning_rate_given_on_resume_is_used(first, tmp_path):
    found = resumed(
        first, tmp_path, "--model.optimizer.init_args.lr=1e-3", "--model.lr_scheduler=constant"
    )
    (group,) = found["optimizer_states"][0]["param_groups"]
    assert group["lr"] == pytest.approx(1e-3)
    assert group["initial_lr"] == pytest.approx(1e-3)


def test_a_checkpoint_cannot_choose_what_is_imported():
    evil = {"class_path": "os.system", "init_args": {"command": "true"}}
    assert trusted_settings({"optimizer": evil, "lr_scheduler": evil, "base": evil}) == {}
    with pytest.raises(ValueError, match="unknown; expected one of"):
        trusted_settings({"adapter": evil})


def test_a_config_cannot_call_the_system(tmp_path, capsys):
    with pytest.raises(SystemExit):
        fit(tmp_path, "--model.optimizer.class_path=os.system")
    assert "os" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limits", "reached"),
    [
        (["--trainer.max_steps=5"], "where max_steps 5 ends"),
        (["--trainer.max_steps=9", "--trainer.max_epochs=0"], "where max_epochs 0 ends"),
        (["--trainer.max_steps=9", "--trainer.limit_train_batches=0"], None),
    ],
)
def test_a_fit_that_was_done_says_that_nothing_is_trained(first, tmp_path, capsys, limits, reached):
    same = ["--model.adapter.init_args.rank=4", "--model.warmup=0"]
    command(tmp_path, *same, *limits, f"--ckpt_path={first['path']}")
    said = " ".join(capsys.readouterr().out.split())
    assert "nothing: the checkpoint stands at step 5" in said
    assert reached is None or reached in said
    assert ("raise it" in said) == (reached is not None)


def test_a_fit_that_goes_on_does_not_say_so(first, tmp_path, capsys):
    resumed(first, tmp_path)
    assert "nothing: the checkpoint" not in " ".join(capsys.readouterr().out.split())
