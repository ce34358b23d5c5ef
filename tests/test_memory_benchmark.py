"""The benchmark of memory at a tiny size: what must hold at any size, and what it writes."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"hidden": 64, "layers": 4, "vocabulary": 1024, "batch": 4, "tokens": 64, "rounds": 1}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    file = tmp_path_factory.mktemp("memory") / "memory.json"
    sizes = [f"--{name}={value}" for name, value in SIZES.items()]
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", *sizes, "--device=cpu", f"--json={file}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, json.loads(file.read_text())


@pytest.fixture(scope="module")
def rows(ran):
    return {row["method"]: row for key in ("methods", "galore_windows") for row in ran[1][key]}


def test_states_and_origins_have_the_bytes_that_they_must(rows):
    lora, full, galore = rows["LoRA"], rows["full, AdamW"], rows["GaLore, AdamW"]
    for row in (lora, full):  # two fp32 moments, and a count for each tensor
        moments = 8 * row["trained_parameters"]
        assert moments < row["optimizer_bytes"] < moments * 1.05
    origin = rows["PiSSA (origin pinned)"]["weight_bytes"] - lora["weight_bytes"]
    assert origin == 4 * lora["trained_parameters"]
    assert full["weight_bytes"] == 4 * full["trained_parameters"] == galore["weight_bytes"]
    assert (full["galore_bytes"], lora["galore_bytes"]) == (0, 0)
    # Squares of 64 and matrices of 176 x 64, rank 16: a subspace of 64 rows and a shadow.
    layer = 4 * (16 * (64 + 64)) + 3 * (16 * (64 + 176))
    assert galore["galore_bytes"] == 4 * SIZES["layers"] * layer
    assert rows["full, AdamW8bit"]["optimizer_bytes"] < 0.3 * full["optimizer_bytes"]
    assert rows["GaLore, AdamW"]["optimizer_bytes"] < 0.6 * full["optimizer_bytes"]
    assert rows["QLoRA (nf4)"]["weight_bytes"] < 0.6 * lora["weight_bytes"]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ("LoRA, all layers recomputed", "LoRA, every 2nd layer recomputed"),
        ("LoRA, every 2nd layer recomputed", "LoRA"),
        ("LoRA", "LoRA, loss from full logits"),
        ("LoRA", "DoRA"),
        ("LoRA", "PiSSA (origin pinned)"),
        ("QLoRA (nf4)", "LoRA"),
        ("full, AdamW8bit", "full, AdamW"),
        ("GaLore, AdamW8bit", "GaLore, AdamW"),
        ("same subspace, accumulation 4", "new subspace (exact), accumulation 4"),
        ("new subspace (exact), accumulation 1", "new subspace (exact), accumulation 4"),
    ],
)
def test_peaks_are_in_order(rows, less, more):
    assert rows[less]["peak_bytes"] < rows[more]["peak_bytes"]


def test_the_same_method_has_the_same_peak(rows):
    again = rows["LoRA again (A/A)"]
    assert again["peak_bytes"] == rows["LoRA"]["peak_bytes"]


def test_the_table_has_every_row_and_names_no_host(ran):
    printed, saved = ran
    assert saved["machine"].startswith("CPU, ")
    assert saved["settings"] == {**SIZES, "device": "cpu"}
    for row in (*saved["methods"], *saved["galore_windows"]):
        assert f"| {row['method']} | {row['trained_parameters']:,} |" in printed
        assert len(row["seconds"]) == 1
    assert len(platform.node()) < 4 or platform.node() not in printed + json.dumps(saved)
