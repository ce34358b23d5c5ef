"""LoRA-GA: start so that the first step follows the full gradient (arXiv 2407.05000)."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lit_adapters.initialisers.base import Factors
from lit_adapters.initialisers.factored import Factored
from lit_adapters.initialisers.svd import leading_svd

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal["stable", "unit", "gd", "weight_svd"]

ACCURACY = 0.05  # the square is the energy missed: less than another batch changes
USELESS = (
    "LoRAGA got a gradient that is zero, infinite or NaN; do the batches train any token, and does "
    "the model's loss depend on this layer?"
)


@dataclass(frozen=True)
class LoRAGA:
    """``A = c V[:, :r]^T`` and ``B = c U[:, r:2r]`` of the gradient ``G = U S V^T``.

    With ``c = out^(1/4) / sqrt(gamma)`` (section 3.3, the authors' code). The first step of plain
    gradient descent then moves the weight by ``-lr scale^2 (B B^T G + G A^T A)``, which is the best
    approximation of ``G`` of rank ``2r`` (theorem 3.1). The paper uses ``alpha / sqrt(rank)``
    (rsLoRA) as the scale.

    ``A`` and ``B`` need ``2r`` different singular vectors. Where a matrix has fewer, the two sets
    overlap in its middle, and the step is no longer optimal.

    Args:
        gamma: Divides the start; 16 in the paper's language-model runs.
        direction: Which singular vectors go where: ArB2r gives ``A`` the first r and ``B`` the
            second, A2rBr the reverse, ArBr alternates (``B`` even, ``A`` odd), random shuffles.
        scale: stable as above; unit is ``c = 1``; gd is ``c = 1 / scale``; weight_svd puts the mean
            square root of the weight's leading singular values (over the scale) on both.
        niter: Iterations at most of a randomised SVD; null is the exact SVD.
    """

    gamma: float = 16.0
    direction: Direction = "ArB2r"
    scale: Scale = "stable"
    niter: int | None = 4

    reads_gradient: ClassVar[Literal["factored"]] = "factored"
    pins_origin = True

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"gamma must be above 0, got {self.gamma}")

    @property
    def reads_weight(self) -> bool:
        """Whether the scale looks at the weight."""
        return self.scale == "weight_svd"

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        *,
        generator: torch.Generator,
        gradient: Tensor | Factored | None = None,
        **unread: Any,
    ) -> Factors:
        """Return the factors for ``weight`` from its ``gradient``; both (out, in).

        Raises:
            ValueError: if the gradient is missing, zero or not finite.
        """
        if gradient is None:
            raise ValueError("LoRAGA needs gradients: call initialise(model, LoRAGA(), batches)")
        found = min(2 * rank, *gradient.shape)
        ones = torch.ones(gradient.shape[1], 1, dtype=torch.float32, device=gradient.device)
        if not (gradient @ ones).isfinite().all():  # infinity and NaN spread
            raise ValueError(USELESS)
        U, S, Vh = leading_svd(gradient, found, self.niter, generator, ACCURACY)
        if not S[0] > 0:
            raise ValueError(USELESS)
        for_A, for_B = _choose(self.direction, rank, found, generator)
        c = self._constant(weight, rank, scale, generator)
        return Factors(c * Vh[for_A], c * U[:, for_B])

    def _constant(
        self, weight: Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> float:
        if self.scale == "unit":
            return 1.0
        if self.scale == "stable":
            return weight.shape[0] ** 0.25 / math.sqrt(self.gamma)
        if scale == 0:
            raise ValueError(f"LoRAGA(scale={self.scale!r}) divides by alpha, which is 0")
        if self.scale == "gd":
            return 1 / scale
        _, S, _ = leading_svd(weight, rank, self.niter, generator)
        return (S / scale).sqrt().mean().item()


def _choose(
    direction: Direction, rank: int, found: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the indices of the singular vectors of ``A`` and of ``B``, ``rank`` each."""
    order = torch.arange(found, device="cpu")  # said, for a trainer sets a default device
    if direction == "random":
        order = torch.randperm(found, generator=generator, device="cpu")
    if direction == "ArBr" and found == 2 * rank:
        return order[1::2], order[0::2]
    first, second = order[:rank], order[found - rank :]
    return (second, first) if direction == "A2rBr" else (first, second)
