"""The main job over several seeds: exact match before and after, losses, seconds, adapter bytes.

python benchmarks/main_job.py [--seeds 1 2 3] [--json] [-- more flags for fit]

Runs ``fit --config configs/alpaca_lora.yaml`` as a user would, once per seed.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lit_adapters.metrics import Score, exact_match

ROOT = Path(__file__).resolve().parents[1]


def run(seed: int, more: list[str]) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "lit_adapters", "fit", "--config", "configs/alpaca_lora.yaml"),
            *(f"--seed_everything={seed}", f"--data.seed={seed}"),
            *(f"--trainer.default_root_dir={folder}", *more),
        ]
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        (version,) = Path(folder).glob("lightning_logs/version_0")
        weights = version / "checkpoints" / "adapter" / "adapter_model.safetensors"
        return {
            "seed": seed,
            "seconds": round(seconds, 1),
            "adapter_bytes": weights.stat().st_size,
            **losses(version / "metrics.csv"),
            "exact_match": scores(version / "samples.jsonl"),
        }


def losses(file: Path) -> dict[str, float]:
    found: dict[str, list[float]] = defaultdict(list)
    for row in csv.DictReader(file.open()):
        for name in ("train/loss", "val/loss"):
            if row.get(name):
                found[name].append(float(row[name]))
    train = found["train/loss"]
    return {
        "first_train_loss": round(train[0], 3),
        "last_train_loss": round(train[-1], 3),
        "val_loss": round(found["val/loss"][-1], 3),
    }


def scores(file: Path) -> dict[str, dict[str, list[int]]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        when: {
            task: [score.right, score.total]
            for task, score in exact_match(
                (r["task"], r[when], r["expected"]) for r in rows
            ).items()
        }
        for when in ("before", "after")
    }


def table(runs: list[dict]) -> Table:
    tasks = sorted(runs[0]["exact_match"]["after"])
    shown = Table(title="Exact match on held-out records, before -> after")
    for column in ("seed", *tasks, "train loss", "val loss", "adapter", "seconds"):
        shown.add_column(column)
    for r in runs:
        before, after = r["exact_match"]["before"], r["exact_match"]["after"]
        shown.add_row(
            str(r["seed"]),
            *(f"{Score(*before[t])} -> {Score(*after[t])}" for t in tasks),
            f"{r['first_train_loss']} -> {r['last_train_loss']}",
            str(r["val_loss"]),
            f"{r['adapter_bytes'] / 1e3:.0f} kB",
            str(r["seconds"]),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--json", action="store_true")
    options, more = parser.parse_known_args()
    runs = [run(seed, [m for m in more if m != "--"]) for seed in options.seeds]
    if options.json:
        print(json.dumps(runs, indent=2))
    else:
        Console().print(table(runs))


if __name__ == "__main__":
    main()
