"""OLoRA: start at an orthonormal basis of the weight's columns (arXiv 2406.01775)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_adapters.initialisers.base import Factors


@dataclass(frozen=True)
class OLoRA:
    """``B = Q_r`` and ``A = R_r`` of the QR decomposition ``W = Q R``: cheap and deterministic.

    ``Q_r`` is the first ``rank`` columns of ``Q``, ``R_r`` the first ``rank`` rows of ``R``
    (algorithm 1).
    """

    reads_weight = True
    reads_gradient = False
    pins_origin = True

    def __call__(self, weight: Tensor, rank: int, scale: float, **unread: Any) -> Factors:
        """Return the factors for ``weight``."""
        Q = torch.linalg.qr(weight[:, :rank]).Q  # later columns do not change the first ones
        return Factors(Q.T @ weight, Q)
