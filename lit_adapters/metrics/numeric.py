"""Numeric answers behind ``####``, as in GSM8K."""

import re
from collections.abc import Sequence
from decimal import Decimal

from lit_adapters.metrics.base import Answer, TextMetric

MARK = "####"
_NUMBER = re.compile(
    r"(?P<sign>[-\u2212]?)\s*\$?\s*(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
)


class NumericAnswer(TextMetric):
    """Share of answers whose number behind the last ``####`` is that of the reference.

    Numbers are compared by value: 1,000 is 1000 and 1000.0. Speaks of answers whose reference has
    such a number; an answer that has none is wrong, for the form is part of the task.
    """

    names = ("numeric",)
    width = 1

    def count(self, answer: Answer) -> list[float] | None:
        """Return 1 if right, 0 if wrong."""
        expected = final_number(answer.reference)
        return None if expected is None else [float(final_number(answer.prediction) == expected)]

    def scores(self, sums: Sequence[float], answers: int) -> list[float]:
        """Return the share of right answers."""
        return [sums[0] / answers]


def final_number(text: str) -> Decimal | None:
    """Return the first number behind the last ``####``; None if there is none."""
    found = _NUMBER.search(text.rpartition(MARK)[2]) if MARK in text else None
    if found is None:
        return None
    sign = "-" if found["sign"] else ""
    return Decimal(sign + found["digits"].replace(",", ""))
