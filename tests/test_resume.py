"""A run killed at any moment and resumed equals one that was never stopped, bit for bit."""

import csv
import json
import os
import shutil
import signal
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.word_tokenizer import word_tokenizer
from tests.models import gpt2, llama

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
LETTERS = string.ascii_lowercase
RECORDS = [
    {"prompt": " ".join(LETTERS[i % 20 : i % 20 + 3]), "completion": " ".join(LETTERS[: 1 + i % 6])}
    for i in range(26)
]
STEPS = 12  # 22 examples for training in batches of 4, two epochs
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
}


@pytest.fixture(scope="module")
def ask():
    """Send a request to the script; return its exit code."""
    script = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "resume_script.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
    )

    def send(request):
        script.stdin.write(json.dumps(request) + "\n")
        script.stdin.flush()
        code = script.stdout.readline()
        assert code, f"the script itself ended with {script.wait(timeout=60)}"
        return int(code)

    yield send
    script.stdin.close()
    script.wait(timeout=60)
    script.stdout.close()


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Bases with dropout and a small file of records."""
    folder = tmp_path_factory.mktemp("material")
    tokenizer = word_tokenizer()
    size = len(tokenizer)
    models = {
        "gpt2": gpt2(vocab_size=size, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
        "llama": llama(vocab_size=size, attention_dropout=0.1),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    return folder


def request_for(
    material,
    folder,
    every=2,
    data=None,
    seed=1,
    base=None,
    schedule="cosine",
    warmup=0.2,
    **trainer,
):
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"path": str(material / "pairs.jsonl"), "batch_size": 4, "val_size": 4}
    return {
        "folder": str(folder),
        "output": str(folder / "output.txt"),
        "base": str(base or material / "gpt2"),
        "seed": seed,
        "every": every,
        "schedule": schedule,
        "warmup": warmup,
        "data": {**settings, **(data or {})},
        "trainer": trainer,
    }


@pytest.fixture(scope="module")
def whole_run(ask, material, tmp_path_factory):
    """The run that was never stopped, one for each choice of settings."""
    done = {}

    def run(**settings):
        key = json.dumps(settings, sort_keys=True)
        if key not in done:
            folder = tmp_path_factory.mktemp("whole")
            code = ask(request_for(material, folder, **settings))
            assert code == 0, (folder / "output.txt").read_text()[-3000:]
            done[key] = folder
        return done[key]

    return run


def log_of(folder):
    """What was logged, by (step, key); a value that is logged again must be the same one."""
    found = {}
    for line in (folder / "log.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key in row.keys() - {"step"}:
            name = row["step"], key
            assert found.setdefault(name, row[key]) == row[key], f"{name} differs when repeated"
    return found


def assert_same_log(found, expected):
    """By step, so that the message shows where the runs part."""
    differing = {k: (found.get(k), expected.get(k)) for k in sorted(found.keys() | expected.keys())}
    assert not {k: pair for k, pair in differing.items() if pair[0] != pair[1]}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_same_run(found, expected):
    """Losses, gradients, rates and validation by step; final, last and best weights."""
    assert_same_log(log_of(found), log_of(expected))
    assert_same_tensors(torch.load(found / "final.pt"), torch.load(expected / "final.pt"))
    for name in ("last.ckpt", "best.ckpt"):
        states = [torch.load(folder / "out" / name)["state_dict"] for folder in (found, expected)]
        assert_same_tensors(*states)
    weights = Path("out") / "adapter" / "adapter_model.safetensors"
    assert_same_tensors(load_file(found / weights), load_file(expected / weights))


def killed_and_resumed(ask, material, folder, kill, source="last.ckpt", **settings):
    """Kill a run, resume it under another seed: nothing may hang on the seed of the start."""
    code = ask({**request_for(material, folder, **settings), "kill": kill})
    output = (folder / "output.txt").read_text()[-3000:]
    assert code == -signal.SIGKILL, output
    assert not (folder / "final.pt").exists()
    path = folder / "out" / source
    resumed = {**request_for(material, folder, **settings, seed=2), "ckpt_path": str(path)}
    code = ask(resumed)
    assert code == 0, (folder / "output.txt").read_text()[-3000:]


MOMENTS = [
    ("batch", 3),  # epoch 0, one batch after a save
    ("batch", 6),  # the first of epoch 1: the last save was inside the last batch of epoch 0
    ("batch", 9),  # the middle of epoch 1
    ("validation", 0),
    ("validation", 1),
    ("torn", 2),  # while last.ckpt of step 4 is written: that of step 2 counts
    ("torn", 4),  # while best.ckpt of epoch 0 is written
    ("rename", 3),
    ("rename", 5),
    ("rename", 8),  # best.ckpt of epoch 1, after all training
    ("renamed", 1),  # between the save of step 2 and the end of its batch
    ("renamed", 4),
    ("folder", 1),  # best.ckpt is there, its adapter folder is not
]


@pytest.mark.parametrize("kill", MOMENTS, ids=lambda kill: "-".join(map(str, kill)))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(ask, material, whole_run, tmp_path, kill):
    killed_and_resumed(ask, material, tmp_path, kill)
    if kill == ("renamed", 1):  # a step is logged after it is saved: this line cannot be there
        lost = log_of(whole_run()).items() - log_of(tmp_path).items()
        assert {(step, name) for (step, name), _ in lost} == {
            (1, name) for name in ("train/loss", "train/grad_norm", "lr")
        }
        with (tmp_path / "log.jsonl").open("a") as log:
            log.write(json.dumps({"step": 1, **{name: value for (_, name), value in lost}}) + "\n")
    assert_same_run(tmp_path, whole_run())
    assert len([1 for _, key in log_of(tmp_path) if key == "train/loss"]) == STEPS


@pytest.mark.parametrize(
    "kill",
    [("batch", 1), ("batch", 3), ("batch", 5), ("batch", 9), ("rename", 2), ("validation", 0)],
    ids=lambda kill: "-".join(map(str, kill)),
)
@pytest.mark.parametrize("every", [1, 2])
def test_accumulation_windows_are_resumed_at_their_edges(
    ask, material, whole_run, tmp_path, kill, every
):
    settings = {"accumulate_grad_batches": 2}
    if kill == ("batch", 1) or (every == 2 and kill == ("batch", 3)):
        code = ask({**request_for(material, tmp_path, every=every, **settings), "kill": kill})
        assert code == -signal.SIGKILL
        assert not list(tmp_path.rglob("*.ckpt"))  # no optimizer step that would be due yet
        return
    killed_and_resumed(ask, material, tmp_path, kill, every=every, **settings)
    assert_same_run(tmp_path, whole_run(every=every, **settings))


@pytest.mark.parametrize("kill", [("batch", 3), ("batch", 9), ("rename", 3)], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_mixed_precision_is_resumed_exactly(ask, material, whole_run, tmp_path, kill, accumulate):
    settings = {"precision": "bf16-mixed", "accumulate_grad_batches": accumulate, "every": 1}
    killed_and_resumed(ask, material, tmp_path, kill, **settings)
    assert_same_run(tmp_path, whole_run(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"precision": "bf16-true"},
        {"val_check_interval": 4},
        {"limit_val_batches": 0},
        {"max_epochs": -1, "max_steps": 10},
        {
            "limit_val_batches": 0,
            "max_steps": 11,
            "every": 4,
        },  # killed soon after the end of an epoch
        {"gradient_clip_val": 0.1},
        {"data": {"num_workers": 1}},
        {"data": {"group_by_length": False, "val_size": 1}},
        {"data": {"batch_tokens": 30}},
        {"data": {"batching": "padded"}},
        {"base": "llama"},
        {"every": 10, "limit_train_batches": 20, "max_epochs": 1, "data": {"batch_size": 1}},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_other_settings_are_resumed_exactly(ask, material, whole_run, tmp_path, settings):
    settings = dict(settings)
    if "base" in settings:
        settings["base"] = str(material / settings["base"])
    at = 13 if "limit_train_batches" in settings else 7
    if settings.get("limit_val_batches") == 0:
        folder = whole_run(**settings)
        shutil.copy(folder / "out" / "last.ckpt", folder / "out" / "best.ckpt")
    killed_and_resumed(ask, material, tmp_path, ("batch", at), **settings)
    if settings.get("limit_val_batches") == 0:
        assert not (tmp_path / "out" / "best.ckpt").exists()
        shutil.copy(tmp_path / "out" / "last.ckpt", tmp_path / "out" / "best.ckpt")
    assert_same_run(tmp_path, whole_run(**settings))


@pytest.mark.parametrize("kill", [("renamed", 2), ("validation", 0)], ids=lambda kill: kill[0])
def test_a_validation_within_an_epoch_is_made_up_for(ask, material, whole_run, tmp_path, kill):
    """Validation comes after the batch whose end writes last.ckpt; a kill between the two."""
    settings = {"val_check_interval": 4, "num_sanity_val_steps": 0}
    killed_and_resumed(ask, material, tmp_path, kill, **settings)
    expected = log_of(whole_run(**settings))
    found = log_of(tmp_path)
    validated = [{step for step, key in log if key == "val/loss"} for log in (found, expected)]
    assert validated[0] == validated[1]
    assert_same_tensors(
        torch.load(tmp_path / "out" / "best.ckpt")["state_dict"],
        torch.load(whole_run(**settings) / "out" / "best.ckpt")["state_dict"],
    )


def test_a_validation_inside_an_accumulation_window_does_not_spoil_last(
    ask, material, whole_run, tmp_path
):
    settings = {"val_check_interval": 3, "accumulate_grad_batches": 2, "every": 3}
    killed_and_resumed(ask, material, tmp_path, ("batch", 9), **settings)
    assert_same_run(tmp_path, whole_run(**settings))


def test_a_run_killed_twice_is_resumed_exactly(ask, material, whole_run, tmp_path):
    first = {**request_for(material, tmp_path), "kill": ("batch", 3)}
    path = {"ckpt_path": str(tmp_path / "out" / "last.ckpt")}
    second = {**request_for(material, tmp_path, seed=2), **path, "kill": ("torn", 2)}
    assert [ask(first), ask(second)] == [-signal.SIGKILL] * 2
    assert ask({**request_for(material, tmp_path, seed=3), **path}) == 0
    assert_same_run(tmp_path, whole_run())


@pytest.mark.parametrize("limits", [{}, {"max_steps": 11}], ids=["epochs", "steps"])
def test_the_best_checkpoint_can_be_resumed_as_well(ask, material, whole_run, tmp_path, limits):
    killed_and_resumed(ask, material, tmp_path, ("batch", 9), source="best.ckpt", **limits)
    expected = whole_run(**limits)
    assert_same_log(log_of(tmp_path), log_of(expected))
    assert_same_tensors(torch.load(tmp_path / "final.pt"), torch.load(expected / "final.pt"))


@pytest.mark.parametrize(
    ("short", "long", "every"),
    [
        ({"max_epochs": 1}, {"max_epochs": 2}, 100),
        ({"max_epochs": 1}, {"max_steps": STEPS, "max_epochs": -1}, 2),
        ({"max_epochs": 1}, {"max_steps": STEPS, "max_epochs": -1}, 100),
        ({"max_steps": 3}, {"max_steps": STEPS}, 100),
        ({"max_steps": 9}, {"max_steps": STEPS}, 100),
        ({"max_steps": 6}, {"max_steps": STEPS}, 2),
        ({"max_steps": 7}, {"max_epochs": 2}, 100),
    ],
    ids=str,
)
def test_a_finished_run_can_be_trained_for_longer(
    ask, material, whole_run, tmp_path, short, long, every
):
    """As if it had been meant to be that long, where the schedule does not depend on it."""
    settings = {"schedule": "constant", "warmup": 0, "every": every}
    assert ask(request_for(material, tmp_path, **settings, **short)) == 0
    path = {"ckpt_path": str(tmp_path / "out" / "last.ckpt")}
    assert ask({**request_for(material, tmp_path, seed=2, **settings, **long), **path}) == 0
    expected = whole_run(schedule="constant", warmup=0)
    trained = [
        {key: value for key, value in log_of(folder).items() if key[1] == "train/loss"}
        for folder in (tmp_path, expected)
    ]
    assert_same_log(*trained)
    assert_same_tensors(torch.load(tmp_path / "final.pt"), torch.load(expected / "final.pt"))


@pytest.mark.skipif(not SHARED.exists(), reason="real files are not here")
def test_a_real_model_on_real_data_is_resumed_exactly(ask, material, whole_run, tmp_path):
    settings = {
        "base": str(SHARED / "models" / "stories260k"),
        "data": {
            "path": str(SHARED / "data" / "alpaca_en_demo.json"),
            "train_limit": 24,
            "max_length": 256,
            "val_size": 8,
        },
        "accumulate_grad_batches": 2,
        "limit_val_batches": 1,
    }
    killed_and_resumed(ask, material, tmp_path, ("batch", 7), **settings)
    assert_same_run(tmp_path, whole_run(**settings))


# --- the command line ----------------------------------------------------------------------------


def command(material, root, *more):
    return [
        "fit",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        f"--model.base={material / 'gpt2'}",
        "--model.adapter=LoRA",
        "--model.adapter.rank=3",
        "--model.adapter.dropout=0.1",
        "--model.warmup=3",
        f"--data.path={material / 'pairs.jsonl'}",
        "--data.batch_size=4",
        "--data.val_size=4",
        "--checkpoint.every_n_train_steps=2",
        "--samples.limit=0",
        *more,
    ]


def metrics(root, version):
    """Every logged value by step and key, as text."""
    (file,) = root.glob(f"*/version_{version}/metrics.csv")
    with file.open() as handle:
        return {
            (int(row["step"]), key): row[key]
            for row in csv.DictReader(handle)
            for key in ("train/loss", "lr", "val/loss")
            if row[key]
        }


def test_the_command_line_resumes_exactly_and_flags_beat_the_checkpoint(ask, material, tmp_path):
    whole, root = tmp_path / "whole", tmp_path / "killed"
    output = str(tmp_path / "output.txt")
    kill = [
        "--trainer.callbacks+=tests.resume_script.Kill",
        "--trainer.callbacks.where=batch",
        "--trainer.callbacks.at=9",
    ]
    assert ask({"command": command(material, whole), "output": output}) == 0
    assert ask({"command": command(material, root, *kill), "output": output}) == -signal.SIGKILL
    (last,) = root.rglob("last.ckpt")
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 8
    assert checkpoint["hyper_parameters"]["warmup"] == 3

    done = subprocess.run(
        [
            sys.executable,
            *("-m", "lit_adapters"),
            *command(material, root, f"--ckpt_path={last}"),
        ],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = metrics(whole, 0)
    found = metrics(root, 1)
    assert {step for step, key in found if key == "train/loss"} == set(range(8, 12))
    assert found == {key: value for key, value in expected.items() if key[0] >= 8}

    # Only what is said here differs from the checkpoint: the rest comes out of it.
    said = [
        "fit",
        f"--ckpt_path={last}",
        f"--trainer.default_root_dir={root}",
        "--trainer.accelerator=cpu",
        "--trainer.max_epochs=2",
        "--trainer.log_every_n_steps=1",
        "--model.warmup=10",
        f"--data.path={material / 'pairs.jsonl'}",
        "--data.batch_size=4",
        "--data.val_size=4",
        "--samples.limit=0",
    ]
    assert ask({"command": said, "output": output}) == 0, Path(output).read_text()[-3000:]
    (last,) = root.glob("*/version_2/**/last.ckpt")
    saved = torch.load(last, weights_only=True)["hyper_parameters"]
    assert saved["warmup"] == 10
    assert saved["base"] == str(material / "gpt2")
    assert saved["adapter"]["init_args"]["rank"] == 3
    rates = {step: float(rate) for (step, key), rate in metrics(root, 2).items() if key == "lr"}
    assert rates[9] == pytest.approx(2e-4 * 10 / 11)  # still warming up: step 10 of 10
