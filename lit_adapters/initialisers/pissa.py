"""PiSSA: start at the principal singular components of the weight (arXiv 2404.02948)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_adapters.initialisers.base import Factors
from lit_adapters.initialisers.svd import leading_svd


@dataclass(frozen=True)
class PiSSA:
    """``scale * B A = U_r S_r V_r^T`` of ``W = U S V^T``, the square root of ``S_r`` on each side.

    The paper freezes ``W - scale * B A`` and trains ``A`` and ``B`` (equations 2 to 4); here ``W``
    stays as it is and the start is subtracted in the adapter, which gives the same gradients. Its
    settings are ``alpha = rank`` and no dropout.

    Args:
        niter: Iterations at most of a randomised SVD, which ends sooner where the error of
            ``scale * B A`` is 1e-4 of its norm; null is the exact SVD.
    """

    niter: int | None = 64

    reads_weight = True
    reads_gradient = False
    pins_origin = True

    def __call__(
        self, weight: Tensor, rank: int, scale: float, *, generator: torch.Generator, **unread: Any
    ) -> Factors:
        """Return the factors for ``weight``."""
        U, S, Vh = leading_svd(weight, rank, self.niter, generator)
        return balanced(U, S, Vh, scale)


def balanced(U: Tensor, S: Tensor, Vh: Tensor, scale: float) -> Factors:
    """Return factors with ``scale * B A = U S Vh`` and ``A A^T = B^T B = S / scale``."""
    if scale == 0:
        raise ValueError("a start at singular components needs alpha above 0: it divides by it")
    root = (S / scale).sqrt()
    return Factors(root[:, None] * Vh, U * root)
