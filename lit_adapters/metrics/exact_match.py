"""Exact match of generated answers, per task."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lit_adapters.metrics.base import Answer, TextMetric, groups


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


def exact_match(
    results: Iterable[tuple[str, str, str]], sources: Sequence[str] | None = None
) -> dict[str, Score]:
    """Score ``(task, prediction, reference)`` triples by task and source, as `groups` says."""
    tasks, right = [], []
    for task, prediction, reference in results:
        tasks.append(task)
        right.append(matches(prediction, reference))
    marks = zip(tasks, sources if sources is not None else [""] * len(tasks), strict=True)
    return {
        name: Score(sum(right[i] for i in own), len(own)) for name, own in groups(marks).items()
    }


def _final(text: str) -> str:
    return text.rpartition("####")[2].strip()
