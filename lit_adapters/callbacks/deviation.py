"""How far a loss lies above what the losses before it let expect."""

import math
from collections.abc import Sequence
from statistics import median

MEMORY = 11  # steps whose median is the expectation of the next
FEWEST = 5  # losses from which anything can be told
FLOOR = 0.05  # least noise assumed: without any, rounding would be a spike
# Of a normal distribution: its median absolute deviation, and about the largest of a hundred.
MIDDLE, LARGEST = 0.6745, 2.5


def deviation(earlier: Sequence[tuple[float, float]], loss: float, weight: float) -> float:
    """Return by how many robust standard deviations ``loss`` exceeds its expectation.

    Each loss is expected to be the median of the few before it, which follows a loss that falls.
    The standard deviation is the larger of what two things say of a normal distribution: the median
    of the window's second differences, in which a steep fall does not show, and the largest error
    of such an expectation in it, so that heavy tails count. All in logarithms if losses are
    positive, since noise falls with the loss; else relative to the median.
    A step of less than the usual weight may deviate more, by the square root. Two high losses in a
    row tell more than one: then the lower counts times the root of 2, if that is more.

    Args:
        earlier: Recent steps in order, `FEWEST` or more, all finite: loss, and weight (the tokens
            or batches that it is the mean of).
        loss: The loss in question; one that is not finite deviates infinitely.
        weight: Its weight.
    """
    if not math.isfinite(loss):
        return math.inf
    losses = [*(value for value, _ in earlier), loss]
    usual = median(weight for _, weight in earlier)
    noise = [math.sqrt(max(1.0, usual / w)) for w in (*(w for _, w in earlier), weight)]
    if min(losses) > 0:
        values = [math.log(value) for value in losses]
    else:
        unit = median(map(abs, losses[:-1])) or 1.0
        values = [value / unit for value in losses]
    *errors, before, now = (
        (values[i] - median(values[max(0, i - MEMORY) : i])) / noise[i]
        for i in range(2, len(values))
    )
    bends = (abs(a - 2 * b + c) for a, b, c in zip(values, values[1:], values[2:-1], strict=False))
    spread = max(median(bends) / (MIDDLE * math.sqrt(6)), max(errors) / LARGEST, FLOOR)
    return max(now, min(before, now) * math.sqrt(2)) / spread
