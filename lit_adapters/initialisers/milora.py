"""MiLoRA: start at the minor singular components of the weight (arXiv 2406.09044)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_adapters.initialisers.base import Factors
from lit_adapters.initialisers.pissa import balanced
from lit_adapters.initialisers.svd import full_svd


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
        U, S, Vh = full_svd(weight)
        return balanced(U[:, -rank:], S[-rank:], Vh[-rank:], scale)
