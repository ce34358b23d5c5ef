"""Before and after: the same prompts answered when a fit starts, while it runs and when it ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_adapters.callbacks.answer_tables import (
    answer_table,
    in_turns,
    markdown,
    metric_table,
    score_table,
)
from lit_adapters.callbacks.sample_files import append_samples, write_json, write_samples
from lit_adapters.data import Example, prompt_ids, stop_ids
from lit_adapters.generation import generate
from lit_adapters.metrics import (
    Answer,
    ExactMatch,
    TextMetric,
    Value,
    exact_match,
    score_by_task,
)
from lit_adapters.sharding import inside
from lit_adapters.trained_state import random_state, set_random_state


class SampleGenerations(Callback):
    """Answer held-out prompts before and after training; show some, count exact matches of all.

    Those shown are answered at every validation too. Takes the test split of the trainer's data
    module. Training is not disturbed: random state and modes are restored. Skipped when
    ``limit_val_batches=0``. The answers are also written to ``samples.jsonl`` below the logger's
    folder, and those shown to ``samples.csv``, step by step, and to TensorBoard. Every rank answers
    every prompt, as sharded models must.

    Args:
        show: Answers in the printed table.
        limit: Prompts answered for the count; 0 switches the callback off.
        max_new_tokens: Longest answer, tokens.
        batch_size: Prompts generated at a time.
        at_validation: Whether the prompts shown are answered at every validation of a fit as well.
        metrics: Further scores of the answers, such as ``lit_adapters.metrics.ROUGE``.
        scores_file: Where ``test`` writes all its scores; ``test_scores.json`` below the logger's
            folder if null.
    """

    def __init__(
        self,
        show: int = 6,
        limit: int = 200,
        max_new_tokens: int = 128,
        batch_size: int = 64,
        at_validation: bool = True,
        metrics: list[TextMetric] | None = None,
        scores_file: str | None = None,
    ) -> None:
        if limit < 0:
            raise ValueError(f"limit {limit} is below 0; give a number of prompts, or 0 for none")
        self.show = show
        self.limit = limit
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.at_validation = at_validation
        self.metrics = [ExactMatch(), *(metrics or [])]
        self.scores_file = scores_file
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
            _log_some(trainer, examples, self.before, in_turns(examples)[: self.show])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer the prompts shown again, print and log; not where `on_train_end` comes next."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not (fitting and self.at_validation and self.show):
            return
        last = trainer.estimated_stepping_batches  # -1 of a stream whose length nobody knows
        if 0 <= last <= trainer.global_step:
            return
        examples = self._examples(trainer)
        chosen = [examples[i] for i in in_turns(examples)[: self.show]]
        if not chosen:
            return
        answers = self._answer(trainer, pl_module, chosen, "")
        _log_some(trainer, chosen, answers, range(len(chosen)))
        if trainer.is_global_zero:
            title = f"Answers after {trainer.global_step} steps"
            Console().print(answer_table(title, chosen, {"answer": answers}))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer again, print, log and write."""
        examples = self._examples(trainer)
        if not examples:
            return
        after = self._answer(trainer, pl_module, examples, "Answers after training")
        shown = in_turns(examples)[: self.show]
        folder = _log_some(trainer, examples, after, shown)
        if not trainer.is_global_zero:
            return
        answers = {"before": self.before, "after": after}
        scores = {when: self._scores(examples, own) for when, own in answers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(
                {
                    f"{name}/{task}/{when}": value.value
                    for when, by_task in scores.items()
                    for task, values in by_task.items()
                    for name, value in values.items()
                },
                step=trainer.global_step,
            )
        write_samples(folder / "samples.jsonl", examples, self.before, after)
        console = Console()
        some = {when: [own[i] for i in shown] for when, own in answers.items()}
        title = "Before and after, on held-out prompts"
        console.print(answer_table(title, [examples[i] for i in shown], some))
        console.print(score_table(*(_exact(examples, own) for own in answers.values())))
        if len(self.metrics) > 1:
            console.print(metric_table("Scores on held-out records", scores))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the model under test."""
        examples = self._examples(trainer)
        if not examples:
            return
        answers = self._answer(trainer, pl_module, examples, "Answers")
        folder = _folder(trainer)
        if not trainer.is_global_zero:
            return
        found = self._scores(examples, answers)
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"test/{n}/{t}": v.value for t, values in found.items() for n, v in values.items()}
            )
        Console().print(score_table(None, _exact(examples, answers)))
        if len(self.metrics) > 1:
            Console().print(metric_table("Scores on held-out records", {"score": found}))
        measured = {name: value.item() for name, value in trainer.callback_metrics.items()}
        generated = {t: {n: v._asdict() for n, v in own.items()} for t, own in found.items()}
        file = Path(self.scores_file or folder / "test_scores.json")
        write_json(file, {**measured, "answers": generated})

    def _examples(self, trainer: Trainer) -> list[Example]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not self.limit or trainer.limit_val_batches == 0 or not hasattr(data, "examples"):
            return []
        return spread(data.examples("test"), self.limit)

    def _scores(
        self, examples: Sequence[Example], answers: Sequence[str]
    ) -> dict[str, dict[str, Value]]:
        given = (
            Answer(e.prompt, answer, e.response, e.task, e.source)
            for e, answer in zip(examples, answers, strict=True)
        )
        return score_by_task(given, self.metrics)

    def _answer(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        examples: Sequence[Example],
        title: str,
    ) -> list[str]:
        """Answer all examples; without a title, without a progress bar: there is one already."""
        model = cast(PreTrainedModel, pl_module.model)
        tokenizer = cast(PreTrainedTokenizerBase, pl_module.tokenizer)
        state = random_state()
        with (
            Progress(transient=True, disable=not (title and trainer.is_global_zero)) as bar,
            trainer.precision_plugin.forward_context(),
            torch.inference_mode(False),  # what the model keeps of this must serve training too
        ):
            task = bar.add_task(title, total=len(examples))
            answers = inside(
                model,
                lambda whole: generate(
                    whole,
                    tokenizer,
                    prompt_ids(examples, tokenizer),
                    self.max_new_tokens,
                    batch_size=self.batch_size,
                    progress=lambda n: bar.advance(task, n),
                    stop=stop_ids(examples, tokenizer),
                ),
            )
        set_random_state(state)
        return answers


def spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """Return at most ``limit`` examples, evenly spaced over the whole."""
    step = max(1.0, len(examples) / limit)
    return [examples[int(i * step)] for i in range(min(limit, len(examples)))]


def _exact(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    results = ((e.task, a, e.response) for e, a in zip(examples, answers, strict=True))
    return exact_match(results, [e.source for e in examples])


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.log_dir or trainer.default_root_dir)  # asked on every rank


def _log_some(
    trainer: Trainer, examples: Sequence[Example], answers: Sequence[str], which: Sequence[int]
) -> Path:
    """Add some answers to ``samples.csv`` and TensorBoard; return the folder of the file."""
    folder = _folder(trainer)
    if trainer.is_global_zero and which:
        chosen, given = [examples[i] for i in which], [answers[i] for i in which]
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", markdown(chosen, given), trainer.global_step)
        append_samples(folder / "samples.csv", trainer.global_step, chosen, given)
    return folder
