"""Exact match of generated answers, per task."""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple


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
