"""Functional representations: ``act(slot[value], slot)``, as in ViGGO."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lit_adapters.metrics.base import Answer, TextMetric

_SLOT = r"(\w+)(?:\[([^\[\]]*)\])?"
_ONE_SLOT = re.compile(_SLOT)
_CALL = re.compile(rf"(\w+)\(((?:{_SLOT}(?:,{_SLOT})*)?)\)")
_AROUND_MARKS = re.compile(r" ?([\[\](),]) ?")


class Call(NamedTuple):
    """An act and its slots: names with values, or without, in any order."""

    act: str
    slots: Counter[tuple[str, str | None]]


class SlotF1(TextMetric):
    """Slot F1 over all answers, and the share of calls that are right in act and all slots.

    The order of slots does not matter; a slot is right if name and value are. Speaks of answers
    whose reference is such a call; an answer that is none has no slots.
    """

    names = ("slot_f1", "slot_exact")
    width = 3

    def count(self, answer: Answer) -> list[float] | None:
        """Return right slots, slots given and expected together, and 1 for a right call."""
        expected = parse(answer.reference)
        if expected is None:
            return None
        given = parse(answer.prediction)
        slots = given.slots if given else Counter()
        both = slots.total() + expected.slots.total()
        return [(slots & expected.slots).total(), both, float(given == expected)]

    def scores(self, sums: Sequence[float], answers: int) -> list[float]:
        """Return F1 = 2 right / (given + expected), 1 if there are none at all, and the share."""
        right, both, exact = sums
        return [2 * right / both if both else 1.0, exact / answers]


def parse(text: str) -> Call | None:
    """Read a call; None if the text is anything else, or more. White space is evened out."""
    even = _AROUND_MARKS.sub(r"\1", " ".join(text.split()))
    found = _CALL.fullmatch(even)
    if found is None:
        return None
    return Call(found[1], Counter((s[1], s[2]) for s in _ONE_SLOT.finditer(found[2])))
