"""What `check` prints, for people and for scripts."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from lit_adapters.check.findings import Findings
from lit_adapters.estimate.table import ROWS

EXCHANGE = "for other ranks"


def show(found: Findings, console: Console) -> None:
    """Print what was found, problems last."""
    if found.counts:
        table = Table("", "", title=f"{found.strategy}", show_header=False)
        for name, count in found.counts.items():
            table.add_row(name, f"{count:,}")
        for name, count in found.parameters.items():
            table.add_row(f"parameters, {name}", f"{count:,}")
        console.print(table)
    if found.units:
        table = Table("unit", "times", "parameters", "dtypes", title="Gathered and freed together")
        for row in found.units:
            dtypes = ", ".join(row["dtypes"])
            table.add_row(row["name"], str(row["count"]), f"{row['parameters']:,}", dtypes)
        console.print(table)
    if found.bytes:
        table = Table("", "bytes", title="A rank holds, by estimate", show_header=False)
        for kind, label in {**ROWS, "exchange": EXCHANGE}.items():
            table.add_row(label, decimal(found.bytes[kind]))
        table.add_section()
        table.add_row("peak", decimal(found.bytes["peak"], precision=2), style="bold")
        console.print(table)
    for text in found.unknown:
        console.print(f"not looked at: {text}", markup=False)
    for text in found.problems:
        console.print(f"would fail: {text}", markup=False, style="bold")
    if not found.problems:
        console.print("nothing here would stop this fit", style="bold")


def as_json(found: Findings) -> dict[str, Any]:
    """Return the same for scripts."""
    return {"works": not found.problems, **asdict(found)}
