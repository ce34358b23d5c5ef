"""A matrix that is known by two factors: the gradient of a weight, on one batch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """``scale * left^T right`` (m, n), which is not formed: it multiplies as a tensor would.

    Args:
        left: (tokens, m), fp32.
        right: (tokens, n), fp32.
        scale: Of the product.
    """

    left: Tensor
    right: Tensor
    scale: float = 1.0

    @property
    def shape(self) -> torch.Size:
        """(m, n)."""
        return torch.Size((self.left.shape[1], self.right.shape[1]))

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return self.left.device

    @property
    def T(self) -> "Factored":  # noqa: N802 - as of a tensor
        """The transposed matrix (n, m)."""
        return Factored(self.right, self.left, self.scale)

    def __matmul__(self, columns: Tensor) -> Tensor:
        return (self.left.T @ (self.right @ columns)).mul_(self.scale)

    def __truediv__(self, divisor: float) -> "Factored":
        return replace(self, scale=self.scale / divisor)

    def multiplies_faster(self, columns: int) -> bool:
        """Whether so many columns are multiplied in less time than by forming the matrix first."""
        tokens, (m, n) = len(self.left), self.shape
        return tokens * (m + n) * columns < m * n * (tokens + columns)

    def dense(self) -> Tensor:
        """The matrix (m, n)."""
        return (self.left.T @ self.right).mul_(self.scale)


def is_smaller(tokens: int, shape: Sequence[int]) -> bool:
    """Whether factors of so many rows are smaller than a matrix of this shape."""
    return tokens * sum(shape) < shape[0] * shape[1]
