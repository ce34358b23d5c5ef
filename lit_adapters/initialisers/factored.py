"""A matrix that is known by two factors: the gradient of a weight, on a batch of few tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factored:
    """``left^T right`` (m, n), which is not formed: it multiplies as a tensor would.

    Args:
        left: (tokens, m), fp32.
        right: (tokens, n), fp32.
    """

    left: Tensor
    right: Tensor

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
        return Factored(self.right, self.left)

    def __matmul__(self, columns: Tensor) -> Tensor:
        return self.left.T @ (self.right @ columns)

    def __truediv__(self, divisor: float) -> "Factored":
        if self.left.shape[1] < self.right.shape[1]:  # the narrower one is what is copied
            return Factored(self.left / divisor, self.right)
        return Factored(self.left, self.right / divisor)

    def dense(self) -> Tensor:
        """The matrix (m, n)."""
        return self.left.T @ self.right


def is_smaller(tokens: int, shape: Sequence[int]) -> bool:
    """Whether factors of so many rows are smaller than a matrix of this shape."""
    return tokens * sum(shape) < shape[0] * shape[1]
