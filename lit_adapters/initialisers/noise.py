"""Random starts with a zero product: Kaiming (the reference LoRA code's) and Gaussian."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_adapters.initialisers.base import Factors


@dataclass(frozen=True)
class Kaiming:
    """``A ~ U(-1/sqrt(in), 1/sqrt(in))``, ``B = 0``; an embedding: ``A = 0``, ``B ~ N(0, 1)``.

    The default of LoRA (arXiv 2106.09685, section 4.1, with the uniform draw of the authors' code).
    """

    reads_weight = False
    reads_gradient = False
    pins_origin = False

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        *,
        generator: torch.Generator,
        lookup: bool = False,
        **unread: Any,
    ) -> Factors:
        """Return the factors for a matrix of the shape of ``weight``."""
        out_features, in_features = weight.shape
        if lookup:
            return _lookup_factors(out_features, in_features, rank, generator)
        bound = 1 / math.sqrt(in_features)
        A = _empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        return Factors(A, _empty(out_features, rank).zero_())


@dataclass(frozen=True)
class Gaussian:
    """``A ~ N(0, 1/rank^2)``, ``B = 0``; an embedding: ``A = 0``, ``B ~ N(0, 1)``.

    The Gaussian of the paper (arXiv 2106.09685, section 4.1), with the spread that PEFT gives it.
    """

    reads_weight = False
    reads_gradient = False
    pins_origin = False

    def __call__(
        self,
        weight: Tensor,
        rank: int,
        scale: float,
        *,
        generator: torch.Generator,
        lookup: bool = False,
        **unread: Any,
    ) -> Factors:
        """Return the factors for a matrix of the shape of ``weight``."""
        out_features, in_features = weight.shape
        if lookup:
            return _lookup_factors(out_features, in_features, rank, generator)
        A = _empty(rank, in_features).normal_(std=1 / rank, generator=generator)
        return Factors(A, _empty(out_features, rank).zero_())


def _lookup_factors(out_features: int, in_features: int, rank: int, g: torch.Generator) -> Factors:
    B = _empty(out_features, rank).normal_(generator=g)
    return Factors(_empty(rank, in_features).zero_(), B)


def _empty(rows: int, columns: int) -> Tensor:
    # Said in full: a trainer builds models under another default dtype and device.
    return torch.empty(rows, columns, dtype=torch.float32, device="cpu")
