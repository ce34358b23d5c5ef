"""Every method on the embedded base and data: same steps, three seeds, one table, one plot.

python examples/compare_methods.py [--steps 300] [--seeds 1 2 3] [--methods lora dora] [--json]

Each run is the command a user would type, ``fit --config configs/alpaca_<method>.yaml``, in a
process of its own. Finished runs are kept in ``--out``, so a broken-off comparison goes on where it
stopped. The plot needs matplotlib: ``pip install -e '.[plot]'``.
"""

import argparse
import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(p.stem.removeprefix("alpaca_") for p in ROOT.glob("configs/alpaca_*.yaml"))


def arguments(method: str, seed: int, steps: int, more: list[str]) -> list[str]:
    return [
        *("fit", "--config", f"configs/alpaca_{method}.yaml"),
        *(f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.max_steps={steps}"),
        *more,
    ]


def kept(method: str, seed: int, steps: int, more: list[str]) -> str:
    """Return a name for the result that changes with the command and the config."""
    config = (ROOT / f"configs/alpaca_{method}.yaml").read_text()
    said = f"{arguments(method, seed, steps, more)}{config}"
    return f"{method}-{seed}-{hashlib.sha256(said.encode()).hexdigest()[:8]}.json"


def processor_seconds() -> float:
    """Of all processes that were started here and have ended: other work hardly changes them."""
    spent = os.times()
    return spent.children_user + spent.children_system


def run(method: str, seed: int, steps: int, more: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lit_adapters", *arguments(method, seed, steps, more)]
        command.append(f"--trainer.default_root_dir={folder}")
        start = processor_seconds()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        version = Path(folder) / "lightning_logs" / "version_0"
        weights = version / "checkpoints" / "adapter" / "adapter_model.safetensors"
        logged = columns(version / "metrics.csv")
        assert logged["val/loss"][-1][0] == steps - 1, "the last validation is not at the end"
        return {
            "method": method,
            "seed": seed,
            "steps": steps,
            "seconds": processor_seconds() - start,
            "adapter_bytes": weights.stat().st_size,
            "trainable": int(logged["parameters/trainable"][0][1]),
            "peak_mb": max(value for _, value in logged["memory/peak_mb"]),
            "train_loss": logged["train/loss"],
            "val_loss": logged["val/loss"][-1][1],
            "exact_match": {
                name.split("/")[1]: points[-1][1]
                for name, points in logged.items()
                if name.startswith("exact_match/") and name.endswith("/after")
            },
        }


def columns(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) points by name."""
    found = defaultdict(list)
    for row in csv.DictReader(file.open()):
        for name, value in row.items():
            if value and name not in ("step", "epoch"):
                found[name].append((int(row["step"] or 0), float(value)))
    return found


def table(runs: list[dict]) -> str:
    tasks = sorted(runs[0]["exact_match"])
    head = ["method", "validation loss", *tasks, "trainable", "adapter", "seconds", "peak memory"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for method in dict.fromkeys(r["method"] for r in runs):
        own = [r for r in runs if r["method"] == method]
        losses = [r["val_loss"] for r in own]
        cells = [
            method,
            f"{mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})",
            *(f"{mean(r['exact_match'][t] for r in own):.0%}" for t in tasks),
            f"{own[0]['trainable']:,}",
            f"{own[0]['adapter_bytes'] / 1e3:,.0f} kB",
            f"{mean(r['seconds'] for r in own):.0f}",
            f"{mean(r['peak_mb'] for r in own):.0f} MB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[dict], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    names = list(dict.fromkeys(r["method"] for r in runs))
    for number, method in enumerate(names):
        curves = [smoothed(r["train_loss"]) for r in runs if r["method"] == method]
        steps = [step for step, _ in curves[0]]
        values = [[value for _, value in curve] for curve in curves]
        color, dash = plt.cm.tab10(number % 10), "-" if number < 10 else "--"
        middle = [mean(at) for at in zip(*values, strict=True)]
        axes.plot(steps, middle, dash, color=color, label=method, linewidth=1.6)
        low, high = (list(map(pick, zip(*values, strict=True))) for pick in (min, max))
        axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel="train loss (nats per token)", yscale="log")
    axes.set_title(f"Embedded base and data, {len(curves)} seeds: mean, and lowest to highest")
    axes.grid(alpha=0.3, which="both")
    axes.legend(ncols=2, frameon=False)
    figure.savefig(file, dpi=120)


def smoothed(points: list, keep: float = 0.8) -> list:
    """Return the exponential moving average."""
    average, curve = points[0][1], []
    for step, value in points:
        average = keep * average + (1 - keep) * value
        curve.append((step, average))
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_methods"))
    parser.add_argument("--json", action="store_true", help="print all runs, curves included")
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = []
    for seed in options.seeds:  # seed by seed: a broken-off comparison is a whole one of fewer
        for method in options.methods:
            file = options.out / kept(method, seed, options.steps, more)
            if not file.exists():
                print(f"{method}, seed {seed} ...", file=sys.stderr, flush=True)
                result = run(method, seed, options.steps, more)
                file.write_text(json.dumps(result))
            runs.append(json.loads(file.read_text()))
    runs.sort(key=lambda r: options.methods.index(r["method"]))
    print(json.dumps(runs) if options.json else table(runs))
    picture = options.out / "compare_methods.png"
    if find_spec("matplotlib"):
        plot(runs, picture)
        print(f"plot: {picture}", file=sys.stderr)
    else:
        print("no plot: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
