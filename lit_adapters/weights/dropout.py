"""Dropout whose mask costs a quarter of torch's to draw, and a quarter of a float to keep."""

import torch
from torch import Tensor

LEVELS = 1 << 16  # of a draw: 16 random bits an element, four from one number of the generator


def dropout(x: Tensor, probability: float) -> Tensor:
    """Zero elements of ``x`` and let the others grow, so that each keeps its expected value."""
    return kept(x, keep_mask(x, probability)) * growth(probability)


def kept(x: Tensor, keep: Tensor | None) -> Tensor:
    """``x``, zero where ``keep`` (of its shape) is 0."""
    return x if keep is None else x * keep


def keep_mask(x: Tensor, probability: float) -> Tensor:
    """Draw which elements of ``x`` stay: uint8, 1 or 0, of its shape; from torch's generator.

    Not bool: what makes or reads bool takes three times as long on a processor.
    """
    count = x.numel()
    # All 64 bits (but one number of 2^64). Torch cannot trace `random_`, which is a little faster.
    low, high = -(2**63), 2**63 - 1
    numbers = torch.randint(low, high, ((count + 3) // 4,), device=x.device)
    bits = numbers.view(torch.int16)[:count].view(x.shape)
    highest = _dropped(probability) - LEVELS // 2 - 1  # of the draws that zero an element
    return bits.clamp_(highest, highest + 1).sub_(highest).to(torch.uint8)


def growth(probability: float) -> float:
    """What elements that stay are multiplied with."""
    return LEVELS / (LEVELS - _dropped(probability))


def _dropped(probability: float) -> int:
    """Levels of a draw that zero an element: the probability to the nearest 1 / 65536, not 0."""
    return min(max(round(probability * LEVELS), 1), LEVELS - 1)
