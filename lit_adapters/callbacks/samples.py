"""Before and after: the same prompts answered when a fit starts and when it ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.data import Example
from lit_adapters.generation import generate
from lit_adapters.metrics import Score, exact_match, matches
from lit_adapters.trained_state import random_state, set_random_state


class SampleGenerations(Callback):
    """Answer held-out prompts before and after training; show some, count exact matches of all.

    Takes the test split of the trainer's data module. Training is not disturbed: random state and
    modes are restored. Skipped when ``limit_val_batches=0``. The answers are also written to
    ``samples.jsonl`` below the logger's folder.

    Args:
        show: Answers in the printed table.
        limit: Prompts answered for the count; 0 switches the callback off.
        max_new_tokens: Longest answer, tokens.
        batch_size: Prompts generated at a time.
    """

    def __init__(
        self, show: int = 6, limit: int = 200, max_new_tokens: int = 128, batch_size: int = 64
    ) -> None:
        self.show = show
        self.limit = limit
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.before: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        """Keep the answers from before training for a resumed run."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the answers of the run that is resumed."""
        self.before = list(state_dict["before"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer before the first step; a resumed run has its answers already."""
        examples = self._examples(trainer)
        if examples and len(self.before) != len(examples):
            self.before = self._answer(trainer, pl_module, examples, "Answers before training")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer again, print, log and write."""
        examples = self._examples(trainer)
        if not examples:
            return
        after = self._answer(trainer, pl_module, examples, "Answers after training")
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank
        if not trainer.is_global_zero:
            return
        scores = {
            when: exact_match(
                (e.task, a, e.response) for e, a in zip(examples, answers, strict=True)
            )
            for when, answers in (("before", self.before), ("after", after))
        }
        for logger in trainer.loggers:
            logger.log_metrics(
                {
                    f"exact_match/{t}/{w}": s.share
                    for w, by in scores.items()
                    for t, s in by.items()
                },
                step=trainer.global_step,
            )
        _write(folder, examples, self.before, after)
        console = Console()
        console.print(answer_table(examples, self.before, after, self.show))
        console.print(score_table(scores["before"], scores["after"]))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count exact matches of the model under test."""
        examples = self._examples(trainer)
        if not examples:
            return
        answers = self._answer(trainer, pl_module, examples, "Answers")
        found = exact_match((e.task, a, e.response) for e, a in zip(examples, answers, strict=True))
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics({f"test/exact_match/{t}": s.share for t, s in found.items()})
            Console().print(score_table(None, found))

    def _examples(self, trainer: Trainer) -> list[Example]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self.limit or trainer.limit_val_batches == 0 or not hasattr(data, "examples"):
            return []
        return spread(data.examples("test"), self.limit)

    def _answer(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        examples: Sequence[Example],
        title: str,
    ) -> list[str]:
        model = cast(PreTrainedModel, pl_module.model)
        tokenizer = cast(PreTrainedTokenizerBase, pl_module.tokenizer)
        state = random_state()
        with (
            Progress(transient=True, disable=not trainer.is_global_zero) as bar,
            trainer.precision_plugin.forward_context(),
        ):
            task = bar.add_task(title, total=len(examples))
            answers = generate(
                model,
                tokenizer,
                [example.prompt for example in examples],
                self.max_new_tokens,
                batch_size=self.batch_size,
                progress=lambda n: bar.advance(task, n),
            )
        set_random_state(state)
        return answers


def spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """Return at most ``limit`` examples, evenly spaced over the whole."""
    step = max(1.0, len(examples) / limit)
    return [examples[int(i * step)] for i in range(min(limit, len(examples)))]


def answer_table(
    examples: Sequence[Example], before: Sequence[str], after: Sequence[str], show: int
) -> Table:
    """Return prompts, expected answers, and answers before and after; tasks take turns."""
    table = Table(title="Before and after, on held-out prompts", show_lines=True)
    for column in ("prompt", "expected", "before", "after"):
        table.add_column(column, overflow="fold", ratio=1)
    for i in _turns([example.task for example in examples])[:show]:
        style = "green" if matches(after[i], examples[i].response) else "red"
        cells = (_question(examples[i]), *map(_short, (examples[i].response, before[i], after[i])))
        table.add_row(*map(Text, cells[:3]), Text(cells[3], style=style))
    return table


def score_table(before: dict[str, Score] | None, after: dict[str, Score]) -> Table:
    """Return exact matches by task."""
    table = Table(title="Exact match on held-out records")
    for column in ("task", "before", "after") if before is not None else ("task", "right"):
        table.add_column(column)
    for task, score in after.items():
        table.add_row(task, *([str(before[task])] if before is not None else []), str(score))
    return table


def _turns(tasks: Sequence[str]) -> list[int]:
    """Indices in an order in which every task comes up in turn."""
    rounds: dict[str, int] = {}
    keyed = []
    for index, task in enumerate(tasks):
        rounds[task] = rounds.get(task, 0) + 1
        keyed.append((rounds[task], index))
    return [index for _, index in sorted(keyed)]


def _question(example: Example) -> str:
    """The part of a prompt that differs between records: what stands between its headings."""
    parts = example.prompt.split("### ")[1:-1] or [example.prompt]
    return _short("\n".join(part.partition("\n")[2].strip() or part for part in parts))


def _short(text: str, limit: int = 240) -> str:
    text = text.strip()
    return text if len(text) <= limit else text[:limit] + "..."


def _write(
    folder: Path, examples: Sequence[Example], before: Sequence[str], after: Sequence[str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as file:
        for example, first, second in zip(examples, before, after, strict=True):
            row = {
                "task": example.task,
                "prompt": example.prompt,
                "expected": example.response,
                "before": first,
                "after": second,
                "match": matches(second, example.response),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
