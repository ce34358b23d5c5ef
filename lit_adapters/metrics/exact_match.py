"""Exact match of generated answers, per task."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lit_adapters.metrics.base import Answer, TextMetric


class Score(NamedTuple):
    """How many answers of a task are right."""

    right: int
    total: int

    @property
    def share(self) -> float:
        """Right answers as a share of all."""
        return self.right / max(1, self.total)

    def __str__(self) -> str:
        return f"{self.right}/{self.total} ({self.share:.0%})"


class ExactMatch(TextMetric):
    """Share of answers that `matches` calls right."""

    names = ("exact_match",)
    width = 1

    def count(self, answer: Answer) -> list[float]:
        """Return 1 if right, 0 if wrong."""
        return [float(matches(answer.prediction, answer.reference))]

    def scores(self, sums: Sequence[float], answers: int) -> list[float]:
        """Return the share of right answers."""
        return [sums[0] / answers]


def matches(prediction: str, reference: str) -> bool:
    """Whether a prediction is right: equal up to white space, or up to its final ``#### answer``.

    A reference that ends in ``#### answer`` (grade-school arithmetic) is compared by that answer
    alone, however it was reached.
    """
    if "####" in reference:
        return "####" in prediction and _final(prediction) == _final(reference)
    return prediction.split() == reference.split()


def exact_match(results: Iterable[tuple[str, str, str]]) -> dict[str, Score]:
    """Score ``(task, prediction, reference)`` triples by task, in order of first appearance."""
    counts: dict[str, list[bool]] = defaultdict(list)
    for task, prediction, reference in results:
        counts[task or "all"].append(matches(prediction, reference))
    return {task: Score(sum(right), len(right)) for task, right in counts.items()}


def _final(text: str) -> str:
    return text.rpartition("####")[2].strip()
