"""What every score of generated answers is: a function of sums over the answers."""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Answer(NamedTuple):
    """One answered prompt."""

    prompt: str
    prediction: str
    reference: str
    task: str = ""
    source: str = ""


class Value(NamedTuple):
    """A score, and of how many answers."""

    value: float
    answers: int


class TextMetric(Metric, ABC):
    """A score of generated answers, as one pure function from an answer to numbers that add up.

    `count` says what an answer adds, `scores` what the sums mean; for one answer alone its own
    numbers are the sums. That makes results the same however answers are batched or shared among
    ranks. As a torchmetrics container it is updated with answers, and `compute` adds up the ranks.
    """

    higher_is_better = True
    full_state_update = False
    names: tuple[str, ...]
    """The scores, as logs and tables call them."""
    width: int
    """How many numbers `count` gives."""
    sums: Tensor  # (1 + width,): the answers, and what `count` gave for them

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(1 + self.width), "sum")  # fp32: MPS has no fp64

    @abstractmethod
    def count(self, answer: Answer) -> Sequence[float] | None:
        """Return what an answer adds to the sums; None if the metric says nothing about it."""

    @abstractmethod
    def scores(self, sums: Sequence[float], answers: int) -> Sequence[float]:
        """Return the scores, in the order of `names`, of sums over one or more answers."""

    def update(self, answers: Iterable[Answer]) -> None:
        """Add answers."""
        numbers = [n for n in map(self.count, answers) if n is not None]
        if numbers:
            self.sums += self.sums.new_tensor([len(numbers), *add_up(numbers)])

    def compute(self) -> dict[str, float]:
        """Return the scores over the answers of all ranks; nothing before the first answer."""
        answers, *sums = self.sums.tolist()
        return (
            dict(zip(self.names, self.scores(sums, int(answers)), strict=True)) if answers else {}
        )


def score(answer: Answer, metrics: Iterable[TextMetric]) -> dict[str, float]:
    """Score one answer by every metric that says something about it."""
    found: dict[str, float] = {}
    for metric in metrics:
        numbers = metric.count(answer)
        if numbers is not None:
            found.update(zip(metric.names, metric.scores(numbers, 1), strict=True))
    return found


def score_by_task(
    answers: Iterable[Answer], metrics: Sequence[TextMetric]
) -> dict[str, dict[str, Value]]:
    """Score answers by what `groups` says: their tasks and, of several, their sources."""
    given = list(answers)
    return {
        name: _score_together([given[i] for i in own], metrics)
        for name, own in groups((a.task, a.source) for a in given).items()
    }


def groups(marks: Iterable[tuple[str, str]]) -> dict[str, list[int]]:
    """Return which answers, given the task and source of each, are scored together, by index.

    By task, in order of first appearance, those without one as ``all``; then, if they come from
    several sources, by ``source/<name>`` too.
    """
    by_task: dict[str, list[int]] = defaultdict(list)
    by_source: dict[str, list[int]] = defaultdict(list)
    for index, (task, source) in enumerate(marks):
        by_task[task or "all"].append(index)
        by_source[f"source/{source}"].append(index)
    return {**by_task, **(by_source if len(by_source) > 1 else {})}


def _score_together(answers: Sequence[Answer], metrics: Sequence[TextMetric]) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for metric in metrics:
        numbers = [n for n in map(metric.count, answers) if n is not None]
        if numbers:
            values = metric.scores(add_up(numbers), len(numbers))
            found.update(
                (name, Value(value, len(numbers)))
                for name, value in zip(metric.names, values, strict=True)
            )
    return found


def add_up(numbers: Iterable[Sequence[float]]) -> list[float]:
    """Return the sums by column."""
    return [math.fsum(column) for column in zip(*numbers, strict=True)]
