"""The promise of the front page, run whole: `fit --config configs/alpaca_lora.yaml`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_main_job_learns_the_tasks_and_writes_a_small_adapter(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "main_job.py")),
            *("--json", "--seeds", "2"),
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    (found,) = json.loads(done.stdout)
    before, after = found["exact_match"]["before"], found["exact_match"]["after"]
    for task in ("representation", "sql"):
        right, total = after[task]
        assert before[task][0] <= 0.02 * total
        assert right >= 0.5 * total
    assert found["last_train_loss"] < 0.2 * found["first_train_loss"]
    assert found["adapter_bytes"] < 1_000_000
