"""benchmarks/scaling_ranks.py: what two real ranks send and hold is what the arithmetic says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and FSDP on Linux")


@pytest.fixture(scope="module")
def found():
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling_ranks.py", "--ranks=2", "--hidden=32", "--layers=2",
         "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_two_ranks_send_and_hold_what_the_arithmetic_says(found):
    rows = found["measured"]
    assert {row["strategy"] for row in rows} == {"ddp", "fsdp", "fsdp2"}
    assert {row["method"] for row in rows} == {"LoRA", "DoRA", "full", "GaLore"}
    for row in rows:
        sent = {k: v for k, v in row["sent"].items() if k != "scalars"}
        expected = {k: v for k, v in row["sent_arithmetic"].items() if v}
        assert sent == pytest.approx(expected, rel=0.01), row
        assert row["held"] == pytest.approx(row["held_arithmetic"], rel=0.01), row


def test_large_models_are_projected(found):
    rows = {
        (row["model"], row["method"], row["strategy"], row["devices"]): row
        for row in found["projected"]
    }
    matrices = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336) + 2 * 128256 * 4096
    norms = 65 * 4096
    full = rows["8B", "full", "ddp", 8]
    assert full["held"]["weights"] == 2 * (matrices + norms)
    assert full["sent"] == pytest.approx(2 * 7 / 8 * 2 * (matrices + norms), rel=1e-6)
    sharded = rows["8B", "full", "fsdp2", 64]["held"]
    assert sharded["optimizer"] == pytest.approx(2 * 2 * (matrices + norms) / 64, rel=1e-3)
