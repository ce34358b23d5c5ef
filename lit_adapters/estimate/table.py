"""What `estimate` prints, for people and for scripts."""

from dataclasses import asdict, dataclass
from typing import Any, cast

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lit_adapters.estimate.estimation import Estimate
from lit_adapters.estimate.memory_trace import CATEGORIES
from lit_adapters.estimate.shapes import Training

ROWS = {
    "base": "frozen base",
    "adapter": "adapter, trained",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations",
    "logits": "logits, loss",
    "workspace": "workspace",
}


@dataclass(frozen=True)
class Column:
    """What was found for one way of training."""

    name: str
    batch_size: int
    estimate: Estimate | None
    largest_batch: int | None = None  # if memory is given
    problem: str | None = None  # why there is no estimate


def verdict(columns: list[Column], memory: int | None) -> str:
    """Say in one line whether it fits, and what would."""
    configured = columns[0].estimate
    assert configured is not None
    need = decimal(configured.peak, precision=2)
    if memory is None:
        return f"{columns[0].name} takes {need} at its peak; --memory 24GB says what fits"
    have = decimal(memory, precision=2)
    if configured.peak <= memory:
        return (
            f"fits: {columns[0].name} takes {need} of {have}; the largest micro-batch is "
            f"{columns[0].largest_batch}"
        )
    others = [f"{c.name} (up to {c.largest_batch})" for c in columns if c.largest_batch]
    remedy = f"micro-batches that fit: {', '.join(others)}" if others else "nothing here fits"
    return f"does not fit: {columns[0].name} takes {need}, and there is {have}; {remedy}"


def show(columns: list[Column], training: Training, memory: int | None, console: Console) -> None:
    """Print a table for people."""
    table = Table(title=f"Memory of {_conditions(training)}")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column.name, justify="right")
    done = [column.estimate for column in columns]
    for key, label in ROWS.items():
        cells = (None if e is None else e.largest[cast(Any, key)] for e in done)
        table.add_row(label, *map(_size, cells), end_section=key == CATEGORIES[-1])
    table.add_row("peak", *(_size(None if e is None else e.peak) for e in done), style="bold")
    table.add_row("in", *("-" if e is None else e.stage for e in done))
    table.add_row("micro-batch", *(str(column.batch_size) for column in columns))
    if memory is not None:
        most = ("-" if c.largest_batch is None else str(c.largest_batch) for c in columns)
        table.add_row("largest that fits", *most)
    console.print(table)
    console.print("Each part at its own largest; not all are held at the time of the peak.")
    for column in columns:
        if column.problem:
            console.print(f"{column.name}: {column.problem}", markup=False)
    console.print(verdict(columns, memory), markup=False, style="bold")


def as_json(columns: list[Column], training: Training, memory: int | None) -> dict[str, Any]:
    """Return the same for scripts, in bytes."""
    configured, *others = map(asdict, columns)
    return {
        "base": training.module.base,
        "max_length": training.max_length,
        "precision": training.precision,
        "device": training.device,
        "memory": memory,
        "fits": None if memory is None else configured["estimate"]["peak"] <= memory,
        "configured": configured,
        "alternatives": others,
        "verdict": verdict(columns, memory),
    }


def _conditions(training: Training) -> str:
    return (
        f"{training.module.base}: {training.max_length} tokens a sequence, {training.precision}, "
        f"{training.device}, one device"
    )


def _size(size: int | None) -> str:
    return "-" if size is None else decimal(size)
