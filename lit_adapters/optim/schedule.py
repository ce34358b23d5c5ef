"""Learning-rate schedules: linear warm-up, then cosine, linear or constant."""

import math
from typing import Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Decay = Literal["cosine", "linear", "constant"]


def warmup_then(decay: Decay, optimizer: Optimizer, total: float, warmup: float) -> LambdaLR:
    """Return a schedule to be advanced once per optimizer step.

    Args:
        decay: Shape after the warm-up; cosine and linear reach 0 at ``total``.
        optimizer: Every group's own learning rate is multiplied, so ratios between groups stay.
        total: Optimizer steps in the whole run; infinity is fine for a constant rate.
        warmup: Optimizer steps of warm-up if 1 or more, else their share of ``total``.

    Raises:
        ValueError: if ``warmup`` is negative, or the shape depends on ``total`` and that is
            infinite.
    """
    if not warmup >= 0:
        raise ValueError(f"warmup must be 0 or more steps, or a share below 1, got {warmup}")
    if total == float("inf") and (decay != "constant" or 0 < warmup < 1):
        raise ValueError(
            f"lr_scheduler={decay!r} with warmup={warmup} needs to know the last step, and this "
            "run has none; set max_steps or max_epochs, or take lr_scheduler='constant' with "
            "warmup in steps"
        )
    warm = warmup if warmup >= 1 or warmup == 0 else warmup * total

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        done = min(1.0, (step - warm) / max(1.0, total - warm))
        return {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1.0,
        }[decay]

    return LambdaLR(optimizer, factor)
