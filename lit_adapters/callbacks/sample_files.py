"""Files of answers and scores."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_adapters.data import Example
from lit_adapters.metrics import matches


def append_samples(
    file: Path, step: int, examples: Sequence[Example], answers: Sequence[str]
) -> None:
    """Add a row for each answer that was given at an optimizer step; names come first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    is_new = not file.exists()
    with file.open("a", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        if is_new:
            writer.writerow(("step", "task", "prompt", "expected", "answer", "match"))
        for e, answer in zip(examples, answers, strict=True):
            right = matches(answer, e.response)
            writer.writerow((step, e.task, e.prompt, e.response, answer, right))


def write_samples(
    file: Path, examples: Sequence[Example], before: Sequence[str], after: Sequence[str]
) -> None:
    """Write the answers before and after training."""
    rows = (
        {
            "task": example.task,
            "prompt": example.prompt,
            "expected": example.response,
            "before": first,
            "after": second,
            "match": matches(second, example.response),
        }
        for example, first, second in zip(examples, before, after, strict=True)
    )
    write_whole(file, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Write one object for scripts to read."""
    write_whole(file, [json.dumps(values, ensure_ascii=False, indent=2) + "\n"])


def write_whole(file: Path, texts: Iterable[str]) -> None:
    """Write a file under another name first, so that what has its name is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    passing = file.with_name(f"{file.name}.tmp")
    try:
        with passing.open("w", encoding="utf-8") as handle:
            handle.writelines(texts)
            handle.flush()
            os.fsync(handle.fileno())
        passing.replace(file)
    finally:
        passing.unlink(missing_ok=True)
