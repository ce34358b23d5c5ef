"""Stochastic rounding: a sum that is kept in bf16 loses no small addend on average."""

import torch
from torch import Tensor


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """Round fp32 to bf16, up or down with the probability that makes the mean exact.

    bf16 is the upper half of fp32: random bits are added to the lower half, which is then cut off.
    Infinities and NaN stay what they are. ``generator`` is on the device of ``values``.
    """
    bits = values.contiguous().view(torch.int32)
    noise = torch.randint(
        1 << 16, values.shape, generator=generator, dtype=torch.int32, device=values.device
    )
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
