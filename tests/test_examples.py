"""Every example runs as a user runs it."""

import subprocess
import sys
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
