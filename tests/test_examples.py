"""Every example runs as a user runs it."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

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
    runs = {(r["name"], r["tokens"]): r for r in json.loads((tmp_path / "all").read_text())}
    trained, frozen = (runs["LoRA r8, all linear", rows] for rows in ("trained", "frozen"))
    assert trained["trainable"] - frozen["trainable"] == 3 * 128  # three rows of a tied embedding
    assert all(run["val_loss"] > 0 and run["exact_match"] for run in runs.values())

    kept = {file: file.stat().st_mtime for file in tmp_path.glob("*.json")}
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.stdout.split("plot")[0].split() == first.stdout.split("plot")[0].split()
    assert {file: file.stat().st_mtime for file in tmp_path.glob("*.json")} == kept
