"""QPiSSA (arXiv 2404.02948, section 4) and LoftQ (arXiv 2310.08659): quantise what is left."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_adapters.initialisers.base import Factors
from lit_adapters.initialisers.pissa import balanced
from lit_adapters.initialisers.svd import leading_svd

Store = Callable[[Tensor], Tensor]  # quantises a matrix into the base; returns what that now holds


class Split(NamedTuple):
    """A matrix ``W`` as ``Q + scale * B A``, where the base holds ``Q``."""

    start: Factors  # where training begins
    taken: Factors  # Q is the quantised ``W - scale * B A`` of these


class RewritesBase(ABC):
    """An initialiser that writes the base: D2's one exception."""

    @abstractmethod
    def split(
        self, weight: Tensor, rank: int, scale: float, *, generator: torch.Generator, store: Store
    ) -> Split:
        """Split ``weight`` (out, in), fp32, as it was before it was quantised."""


def remainder(weight: Tensor, taken: Factors, scale: float) -> Tensor:
    """Return ``W - scale * B A``, the same to the bit whenever it is asked for."""
    return weight - scale * (taken.B.to(weight.device) @ taken.A.to(weight.device))


@dataclass(frozen=True)
class _Alternating(RewritesBase):
    """Settings of both.

    Args:
        iterations: Rounds of decomposing and quantising.
        niter: Iterations at most of a randomised SVD; null is the exact SVD.
    """

    iterations: int = 5
    niter: int | None = 4

    reads_weight = True
    reads_gradient = False
    pins_origin = False

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        *,
        generator: torch.Generator,
        lookup: bool = False,
        gradient: Tensor | None = None,
    ) -> Factors:
        """Refuse: there is no base to quantise."""
        raise ValueError(f"{type(self).__name__} writes a quantised base; use `initialise`")

    def _leading(
        self, matrix: Tensor, rank: int, scale: float, generator: torch.Generator
    ) -> Factors:
        return balanced(*leading_svd(matrix, rank, self.niter, generator), scale)


@dataclass(frozen=True)
class QPiSSA(_Alternating):
    """PiSSA on a quantised base: the residual is quantised, which it bears better than the weight.

    ``B A <- SVD_r(W - Q) / scale`` and ``Q <- quantised(W - scale * B A)``, in turns, beginning
    with ``Q = 0`` and ending with the second: what the base holds is made from exactly the factors
    that training starts from. One iteration is the paper's plain QPiSSA.

    Args:
        iterations: Rounds; 5 in the paper.
        niter: Iterations at most of a randomised SVD; null is the exact SVD.
    """

    def split(
        self, weight: Tensor, rank: int, scale: float, *, generator: torch.Generator, store: Store
    ) -> Split:
        """Split ``weight`` (out, in)."""
        held = torch.zeros_like(weight)
        for _ in range(self.iterations):
            factors = self._leading(weight - held, rank, scale, generator)
            held = store(remainder(weight, factors, scale))
        return Split(factors, factors)


@dataclass(frozen=True)
class LoftQ(_Alternating):
    """The other order: the weight is quantised first, and the factors absorb the error.

    ``Q <- quantised(W - scale * B A)`` and ``B A <- SVD_r(W - Q) / scale``, in turns, beginning
    with ``B A = 0``.

    Args:
        iterations: Rounds; 5 in the paper. With 1 the base stays as it was.
        niter: Iterations at most of a randomised SVD; null is the exact SVD.
    """

    def split(
        self, weight: Tensor, rank: int, scale: float, *, generator: torch.Generator, store: Store
    ) -> Split:
        """Split ``weight`` (out, in)."""
        factors = Factors(
            torch.zeros(rank, weight.shape[1], device=weight.device),
            torch.zeros(weight.shape[0], rank, device=weight.device),
        )
        for _ in range(self.iterations):
            taken = factors
            held = store(remainder(weight, taken, scale))
            factors = self._leading(weight - held, rank, scale, generator)
        return Split(factors, taken)
