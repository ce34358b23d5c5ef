"""How answers and their scores are shown."""

import html
from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from lit_adapters.data import Example
from lit_adapters.metrics import Score, Value, matches

ScoresByTask = Mapping[str, Mapping[str, Value]]


def answer_table(
    title: str, examples: Sequence[Example], answers: Mapping[str, Sequence[str]]
) -> Table:
    """Return prompts, expected answers and answers by column; the last column shows what is right.

    Args:
        title: Of the table.
        examples: One a row.
        answers: Answers to all examples, by the heading of their column.
    """
    table = Table(title=title, show_lines=True)
    for column in ("prompt", "expected", *answers):
        table.add_column(column, overflow="fold", ratio=1)
    for i, example in enumerate(examples):
        *_, last = given = [own[i] for own in answers.values()]
        style = "green" if matches(last, example.response) else "red"
        cells = (_question(example), *map(_short, (example.response, *given)))
        table.add_row(*map(Text, cells[:-1]), Text(cells[-1], style=style))
    return table


def score_table(before: dict[str, Score] | None, after: dict[str, Score]) -> Table:
    """Return exact matches by task."""
    table = Table(title="Exact match on held-out records")
    for column in ("task", "before", "after") if before is not None else ("task", "right"):
        table.add_column(column)
    for task, score in after.items():
        table.add_row(task, *([str(before[task])] if before is not None else []), str(score))
    return table


def metric_table(title: str, columns: Mapping[str, ScoresByTask]) -> Table:
    """Return every score by task and metric; the scores of each column are of the same answers."""
    *_, last = columns.values()
    table = Table(title=title)
    for column in ("task", "metric", "answers", *columns):
        table.add_column(column)
    for task, values in last.items():
        for name, (_, count) in values.items():
            shown = [f"{scores[task][name].value:.4g}" for scores in columns.values()]
            table.add_row(task, name, str(count), *shown)
    return table


def in_turns(examples: Sequence[Example]) -> list[int]:
    """Indices in an order in which every task comes up in turn."""
    rounds: dict[str, int] = {}
    keyed = []
    for index, example in enumerate(examples):
        rounds[example.task] = rounds.get(example.task, 0) + 1
        keyed.append((rounds[example.task], index))
    return [index for _, index in sorted(keyed)]


def markdown(examples: Sequence[Example], answers: Sequence[str]) -> str:
    """Return prompts, expected answers and answers as a table for TensorBoard."""
    rows = [("prompt", "expected", "answer"), ("---", "---", "---")]
    for example, answer in zip(examples, answers, strict=True):
        rows.append((_question(example), example.response, answer))
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in rows)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>")


def _question(example: Example) -> str:
    """The part of a prompt that differs between records: what stands between its headings."""
    parts = example.prompt.split("### ")[1:-1] or [example.prompt]
    return _short("\n".join(part.partition("\n")[2].strip() or part for part in parts))


def _short(text: str, limit: int = 240) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + "..."
