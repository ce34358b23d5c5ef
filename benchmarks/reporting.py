"""What the benchmarks print and write: a Markdown table, and JSON of everything behind it."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import named

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def parser(description: str, name: str) -> argparse.ArgumentParser:
    """Return a parser that has ``--json``."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument(
        "--json",
        nargs="?",
        type=Path,
        const=RESULTS / f"{name}.json",
        metavar="FILE",
        help=f"write everything measured to this file ({name}.json in benchmarks/results if none "
        "is said), and the tables as .md beside it",
    )
    return made


def shown(value: Any) -> str:
    """A cell of a table: three digits of a number, at most."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, float):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.0e}"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.095 else f"{value:.3f}"


def table(rows: Sequence[Row]) -> str:
    """Markdown; the columns are the keys of all rows, in order; numbers stand at the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    texts = {c for c in columns if any(isinstance(row.get(c), str) for row in rows)}
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---" if c in texts else "---:" for c in columns) + "|",
    ]
    lines += ["| " + " | ".join(shown(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def publish(
    options: argparse.Namespace,
    packages: Sequence[str],
    tables: Mapping[str, Sequence[Row]],
    notes: str,
    device: str = "cpu",
    **more: Any,
) -> str:
    """Print the tables under their titles, and write them if asked to.

    Args:
        options: Of the command line; told as settings.
        packages: Whose versions are told, beside torch's.
        tables: Rows by title.
        notes: How to read them.
        device: Where it ran.
        more: What only the JSON holds, such as every turn of a race.
    """
    machine = named(device, *packages)
    settings = {
        key: value
        for key, value in vars(options).items()
        if isinstance(value, bool | int | float | str | list) and value != []
    }
    said = ", ".join(
        f"{key.replace('_', ' ')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in settings.items()
    )
    parts = [f"{machine}. {said}.", notes]
    for title, rows in tables.items():
        parts += [f"## {title}", table(rows)]
    text = "\n\n".join(parts)
    print(text)
    if options.json:
        content = {"machine": machine, "settings": settings, "tables": tables, **more}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(text + "\n")
    return text
