"""The table and the picture of `galore_pretraining.py`, from its runs."""

import math
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

Run = dict[str, Any]
POINTS = 40  # of a curve


def by_row(runs: list[Run]) -> dict[tuple[str, int, float], list[Run]]:
    """Gather the seeds of each row of the table."""
    rows = defaultdict(list)
    for run in runs:
        rows[run["method"], run["rank"], run["lr"]].append(run)
    return dict(rows)


def table(runs: list[Run]) -> str:
    head = ["method", "rank", "peak lr", "perplexity (each seed)", "over full rank", "in the paper"]
    head += ["gain closed", "of the matrices' gain", "optimizer state", "weights", "CPU s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * 3 + "|---:" * (len(head) - 3) + "|"]
    means = {key: mean(r["loss"] for r in own) for key, own in by_row(runs).items()}
    best = {name: min(v for k, v in means.items() if k[0] == name) for name, *_ in means}
    full, floor = best.get("Full rank", math.nan), best.get("Matrices frozen", math.nan)
    untrained = mean(r["untrained_loss"] for r in runs)
    for key, own in by_row(runs).items():
        loss, paper = means[key], own[0]["paper"]
        each = ", ".join(f"{math.exp(r['loss']):.2f}" for r in own)
        cells = [
            *(key[0], str(key[1] or ""), f"{key[2]:g}" if key[2] else ""),
            f"{math.exp(loss):.2f} ({each})",
            f"{math.exp(loss - full):.3f}",
            f"{paper:.3f}" if paper else "",
            f"{(untrained - loss) / (untrained - full):.1%}",
            f"{(floor - loss) / (floor - full):.0%}",
            *(f"{own[0][size] / 1e6:.2f} MB" for size in ("optimizer_bytes", "weight_bytes")),
            f"{mean(r['seconds'] for r in own):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs: list[Run], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = list(dict.fromkeys(r["method"] for r in runs))
    largest = max(r["rank"] for r in runs)
    for (name, rank, _), own in by_row(runs).items():
        color, label = f"C{names.index(name)}", f"{name}, r {rank}" if rank else name
        dash = "--" if 0 < rank < largest else "-"
        curves = list(zip(*(smoothed(r["train_loss"]) for r in own), strict=True))
        at = [len(own[0]["train_loss"]) * (i + 1) / len(curves) for i in range(len(curves))]
        left.plot(at, list(map(mean, curves)), dash, color=color, label=label, linewidth=1.4)
        low, high = list(map(min, curves)), list(map(max, curves))
        left.fill_between(at, low, high, color=color, alpha=0.12, linewidth=0)
        size = (own[0]["optimizer_bytes"] + own[0]["weight_bytes"]) / 1e6
        for run in own:
            shape = "s" if dash == "--" else "o"
            right.plot(size, math.exp(run["loss"]), shape, color=color, markersize=5)
        right.annotate(f" {label}", (size, math.exp(own[0]["loss"])), fontsize=8)
    left.set(xlabel="optimizer step", ylabel="train loss (nats per token)")
    right.set(xlabel="weights and optimizer state (MB)", ylabel="held-out perplexity")
    right.margins(x=0.2)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=110)


def smoothed(losses: list[float]) -> list[float]:
    """Return means over as many stretches as a curve has points."""
    width = max(1, len(losses) // POINTS)
    return [mean(losses[start : start + width]) for start in range(0, len(losses), width)]


def short(run: Run) -> Run:
    """Return a run with few and short numbers."""
    curve = [round(loss, 4) for loss in smoothed(run["train_loss"])]
    return {**run, "train_loss": curve, "seconds": round(run["seconds"], 1)}
