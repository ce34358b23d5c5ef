"""ROUGE: how much of a reference's words an answer shares, in any script."""

from collections import Counter
from collections.abc import Sequence

import regex

from lit_adapters.metrics.base import Answer, TextMetric

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"
# A word; in scripts that are written without spaces, a character with its marks.
_WORD = regex.compile(
    rf"[{_UNSPACED}--\p{{M}}]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--{_UNSPACED}]+", regex.V1
)


class ROUGE(TextMetric):
    """ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004): F1, averaged over answers.

    Words are lower-cased and not stemmed. English comes out as in the rouge_score package; other
    than there, letters of all scripts count, and Chinese, Japanese and Thai are compared by
    character. ROUGE-L takes an answer as one sequence, whatever its line breaks.
    """

    names = ("rouge1", "rouge2", "rougeL")
    width = 3

    def count(self, answer: Answer) -> list[float]:
        """Return the three F1 of one answer."""
        prediction, reference = words(answer.prediction), words(answer.reference)
        return [
            overlap_f1(prediction, reference, 1),
            overlap_f1(prediction, reference, 2),
            f1(longest_common(prediction, reference), len(prediction), len(reference)),
        ]

    def scores(self, sums: Sequence[float], answers: int) -> list[float]:
        """Return the means."""
        return [total / answers for total in sums]


def words(text: str) -> list[str]:
    """Split into lower-case words of letters and digits; unspaced scripts into characters."""
    return _WORD.findall(text.lower())


def overlap_f1(prediction: Sequence[str], reference: Sequence[str], n: int) -> float:
    """Return F1 of the n-grams, each counted as often as it occurs."""
    ours, theirs = _grams(prediction, n), _grams(reference, n)
    return f1((ours & theirs).total(), ours.total(), theirs.total())


def f1(common: float, predicted: float, expected: float) -> float:
    """Return the harmonic mean of common / predicted and common / expected."""
    return 2 * common / (predicted + expected) if predicted + expected else 0.0


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for i, candidate in enumerate(other, start=1):
            best = diagonal + 1 if word == candidate else max(row[i], row[i - 1])
            diagonal, row[i] = row[i], best
    return row[-1]


def _grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
