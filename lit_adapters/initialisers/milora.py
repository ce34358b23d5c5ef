"""MiLoRA: start at the minor singular components of the weight (arXiv 2406.09044)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_adapters.initialisers.base import Factors
from lit_adapters.initialisers.pissa import balanced


@dataclass(frozen=True)
class MiLoRA:
    """``scale * B A`` is the part of ``W`` with its ``rank`` smallest singular values.

    Training then moves what the base uses least and leaves its principal components, which carry
    what it knows (section 3). Always an exact SVD: range finders find large components only.
    """

    reads_weight = True
    reads_gradient = False
    pins_origin = True

    def __call__(self, weight: Tensor, rank: int, scale: float, **unread: Any) -> Factors:
        """Return the factors for ``weight``."""
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return balanced(U[:, -rank:], S[-rank:], Vh[-rank:], scale)
