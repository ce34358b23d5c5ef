"""GaLore's subspaces as pure functions: taken from a gradient, projected on, and back."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["std", "reverse_std", "left", "right", "full"]
SVD = Literal["exact", "randomised"]

POWER_ITERATIONS = 2  # of the randomised range finder


class Projector(NamedTuple):
    """Orthonormal bases of a subspace; a side that is not projected is None."""

    left: Tensor | None  # (m, r)
    right: Tensor | None  # (r, n)


def sides(shape: tuple[int, int], side: Side) -> tuple[bool, bool]:
    """Return whether the rows' space (left) and the columns' space (right) are projected.

    ``std`` takes the shorter dimension, right where they are equal, so that the state is smallest;
    ``reverse_std`` the other one.
    """
    if side in ("std", "reverse_std"):
        right = (shape[0] >= shape[1]) == (side == "std")
        return not right, right
    return side in ("left", "full"), side in ("right", "full")


def projected_shape(shape: tuple[int, int], rank: int, side: Side) -> tuple[int, int]:
    """Return the shape of a projected (m, n) gradient: (r, n), (m, r) or, for ``full``, (r, r)."""
    left, right = sides(shape, side)
    return rank if left else shape[0], rank if right else shape[1]


def subspace(
    gradient: Tensor,  # (m, n)
    rank: int,
    side: Side,
    svd: SVD,
    generator: torch.Generator,
) -> Projector:
    """Return the leading singular directions of ``gradient``, in its dtype.

    Computed in fp32. Signs are those that the decomposition returns: an optimizer's moments outlive
    the subspace, so another choice of signs is another algorithm. The randomised one's hang on the
    last bits of the gradient: there the largest entry of each right direction is positive.

    Args:
        gradient: Finite; arXiv 2403.03507, algorithm 2.
        rank: Directions wanted; at most ``min(m, n)``.
        side: Which side is projected.
        svd: The full decomposition, or a randomised range finder of ``2 rank`` columns (Halko et
            al., arXiv 0909.4061, algorithm 4.4); that is the full one where it would save nothing.
        generator: Draws the test matrix, on the CPU, so that every device sees the same one.
    """
    matrix = gradient.float()  # half precision has no SVD
    if svd == "exact" or 2 * rank >= min(matrix.shape):
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        U, Vh = _randomised(matrix, 2 * rank, generator)
    left, right = sides((matrix.shape[0], matrix.shape[1]), side)
    # Copies: a slice would keep the whole factor alive.
    return Projector(
        U[:, :rank].to(gradient.dtype, copy=True).contiguous() if left else None,
        Vh[:rank].to(gradient.dtype, copy=True).contiguous() if right else None,
    )


def project(gradient: Tensor, to: Projector) -> Tensor:
    """Return ``R = P_left^T G P_right^T``, in the dtype of ``gradient`` (m, n)."""
    R = gradient
    if to.left is not None:
        R = to.left.T @ R
    if to.right is not None:
        R = R @ to.right.T
    return R


def add_back(weight: Tensor, R: Tensor, by: Projector, scale: float) -> None:
    """``weight += scale * P_left R P_right``, in place, without a temporary of its size.

    Args:
        weight: (m, n), of the dtype of ``R``.
        R: An optimizer's change of the projected weight.
        by: The subspace of ``R``; its dtype may be another.
        scale: The paper's alpha.
    """
    left = None if by.left is None else by.left.to(R.dtype)
    right = None if by.right is None else by.right.to(R.dtype)
    if left is not None and right is not None:
        R, left = left @ R, None
    if left is not None:
        weight.addmm_(left, R, alpha=scale)
    elif right is not None:
        weight.addmm_(R, right, alpha=scale)


def rotate(moment: Tensor, old: Projector, new: Projector) -> Tensor:
    """Return a first moment kept in subspace ``old`` as seen in ``new``."""
    rotated = moment
    if old.left is not None and new.left is not None:
        rotated = (new.left.T @ old.left).to(moment.dtype) @ rotated
    if old.right is not None and new.right is not None:
        rotated = rotated @ (old.right @ new.right.T).to(moment.dtype)
    return rotated


def _randomised(
    matrix: Tensor, columns: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # U (m, columns), Vh (columns, n)
    test = torch.randn((matrix.shape[1], columns), generator=generator)
    Q = torch.linalg.qr(matrix @ test.to(matrix.device)).Q
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, _, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)  # (columns, 1)
    return Q @ U * signs.T, signs * Vh
