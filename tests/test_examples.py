"""Every example runs as a user runs it."""

import importlib
import json
import logging
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lit_adapters.estimate import estimate

ROOT = Path(__file__).resolve().parents[1]


def test_an_existing_project_trains_adapters_and_finds_them_again(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "existing_project.py")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "adapter folder:" in done.stdout
    (folder,) = tmp_path.rglob("adapter")
    assert (folder / "adapter_model.safetensors").stat().st_size < 1_000_000


def test_few_lines_are_added_to_an_existing_project():
    lines = (ROOT / "examples" / "existing_project.py").read_text().splitlines()
    assert sum("# +" in line for line in lines) <= 11


def test_the_comparison_makes_a_table_and_goes_on_where_it_stopped(tmp_path):
    command = [
        *(sys.executable, str(ROOT / "examples" / "compare_methods.py"), "--methods", "lora"),
        *("llama_adapter", "--seeds", "1", "--steps", "5", "--out", str(tmp_path)),
        *("--samples.limit=2", "--samples.max_new_tokens=2", "--trainer.limit_val_batches=2"),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    head, _, *rows = first.stdout.strip().splitlines()
    assert head.startswith("| method | validation loss |")
    assert [row.split("|")[1].strip() for row in rows] == ["lora", "llama_adapter"]
    assert "224,256" in rows[0]
    assert (tmp_path / "compare_methods.png").exists() == bool(find_spec("matplotlib"))

    again = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert "lora, seed 1" not in again.stderr  # kept, not run again
    runs = json.loads(again.stdout)
    assert [run["method"] for run in runs] == ["lora", "llama_adapter"]
    assert all(run["train_loss"] and run["val_loss"] > 0 for run in runs)


def test_the_study_makes_a_table_for_each_question_and_goes_on_where_it_stopped(tmp_path):
    command = [
        *(sys.executable, str(ROOT / "examples" / "lora_vs_full.py"), "--groups", "tokens"),
        *("--seeds", "1", "--steps", "2", "--processes", "1", "--out", str(tmp_path)),
        *("--json", str(tmp_path / "all"), "--answers", "3"),
    ]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    rows = [line.split("|") for line in first.stdout.splitlines() if line.startswith("|")]
    assert [(row[1].strip(), row[2].strip()) for row in rows[2:]] == [
        ("full", "none"),
        ("LoRA r8, all linear", "none"),
        ("full", "trained"),
        ("LoRA r8, all linear", "frozen"),
        ("LoRA r8, all linear", "trained"),
    ]
    runs = {(r["name"], r["tokens"]): r for r in json.loads((tmp_path / "all").read_text())["runs"]}
    trained, frozen = (runs["LoRA r8, all linear", rows] for rows in ("trained", "frozen"))
    assert trained["trainable"] - frozen["trainable"] == 3 * 128  # three rows of a tied embedding
    assert all(run["val_loss"] > 0 and run["exact_match"] for run in runs.values())

    kept = {file: file.stat().st_mtime for file in tmp_path.glob("*.json")}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout.split("plot")[0].split() == first.stdout.split("plot")[0].split()
    assert {file: file.stat().st_mtime for file in tmp_path.glob("*.json")} == kept

    next(iter(kept)).unlink()
    part = subprocess.run([*command, "--finished"], capture_output=True, text=True, check=False)
    assert part.stdout.count("\n| ") == first.stdout.count("\n| ") - 1
    assert len(list(tmp_path.glob("*.json"))) == len(kept) - 1


@pytest.fixture
def study(monkeypatch):
    """The study's two files, with short sequences and few steps."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    memory = importlib.import_module("lora_vs_full_memory")
    monkeypatch.setattr(memory, "LENGTH", 32)
    monkeypatch.setattr(memory, "STEPS", 3)
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield importlib.import_module("lora_vs_full"), memory
    logger.setLevel(level)  # the study makes it quiet


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.*`is_gradient_checkpointing`")
def test_the_largest_batch_of_a_memory_is_the_estimates_and_is_really_trained(
    study, tmp_path, monkeypatch
):
    ours, memory = study
    trained, collate = [], memory.collate
    monkeypatch.setattr(
        memory, "collate", lambda rows, pad_id: trained.append(len(rows)) or collate(rows, pad_id)
    )
    few = ours.fit_memory(ours.FULL, 30, tmp_path)
    many = ours.fit_memory(ours.LORA, 30, tmp_path)
    assert many["batch"] > few["batch"] > 0  # of what gradients and optimizer leave
    assert trained == [few["batch"]] * 3 + [many["batch"]] * 3
    peaks = [peak(memory, ours.adapter_for(ours.LORA), many["batch"] + more) for more in (0, 1)]
    assert peaks[0] <= 30e6 < peaks[1]
    nothing = ours.fit_memory(ours.FULL, 5, tmp_path)
    assert nothing == {"name": "full", "memory": 5, "batch": 0, "length": 32}
    assert ours.fit_memory(ours.FULL, 30, tmp_path) == few  # kept
    shown = ours.memory_table([few, many]).splitlines()
    assert shown[0] == "| trained | in 30 MB |"
    assert f"| {few['batch']} x 32 tokens, {few['tokens_per_second']:,.0f} tokens/s |" in shown[2]
    assert "nothing fits" in ours.memory_table([nothing])


def peak(memory, adapter, size):
    module = memory.AdapterFineTuneModule("tiny", adapter)
    training = memory.Training(module, size, memory.LENGTH, clip=True)
    return estimate(memory.Rehearsal(training)).peak
