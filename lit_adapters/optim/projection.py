"""GaLore's subspaces as pure functions: taken from a gradient, projected on, and back."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Side = Literal["std", "reverse_std", "left", "right", "full"]
SVD = Literal["exact", "randomised"]

BLOCKS = 7  # of the Krylov space, at most
ENOUGH = 1 - 1e-4  # of the squared norm; more blocks would hold no more
LEAST_COLUMNS = 8  # of a block
NOISE = 1e-5  # of what a block has, above its rounding


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

    Computed in fp32. Signs are those that torch's decomposition returns: an optimizer's moments
    outlive the subspace, so another choice of signs is another algorithm. The randomised one's hang
    on the last bits of the gradient: there the largest entry of each direction of the shorter side
    is positive.

    Args:
        gradient: Finite; arXiv 2403.03507, algorithm 2.
        rank: Directions wanted; at most ``min(m, n)``.
        side: Which side is projected.
        svd: The full decomposition, or the best directions in a random block Krylov space (Musco
            and Musco, arXiv 1504.05477, algorithm 2); these in the whole space where that would be
            half of it.
        generator: Draws on the CPU, so that every device sees the same space.
    """
    matrix = gradient.float()  # half precision has no SVD
    left, right = sides((matrix.shape[0], matrix.shape[1]), side)
    if svd == "exact":
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        V = Vh.T
    elif matrix.shape[0] >= matrix.shape[1]:
        V = _leading(matrix, rank, generator)
        U = _images(matrix, V) if left else V
    else:
        U = _leading(matrix.T, rank, generator)
        V = _images(matrix.T, U) if right else U
    # Copies: a slice would keep the whole factor alive.
    return Projector(
        U[:, :rank].to(gradient.dtype, copy=True).contiguous() if left else None,
        V[:, :rank].T.to(gradient.dtype, copy=True).contiguous() if right else None,
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


def _columns(rank: int) -> int:
    """Return how many columns a block has."""
    return max(LEAST_COLUMNS, math.ceil(rank / 2))


def _leading(matrix: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return the leading right singular directions (n, rank) of ``matrix`` (m, n)."""
    A = matrix / _largest(matrix)  # whose squares are not lost
    Q = None
    if 2 * BLOCKS * _columns(rank) <= A.shape[1]:
        Q, A = _krylov(A, rank, generator)
    E = torch.linalg.eigh(A.T @ A).eigenvectors[:, -rank:].flip(1)  # of the largest, first
    V = E if Q is None else Q @ E
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))  # (1, rank)
    return V * torch.where(largest < 0, -1.0, 1.0)


def _krylov(A: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis Q (n, k) of a Krylov space of ``A^T A``, and ``A Q`` (m, k)."""
    columns = _columns(rank)

    def draw(rows: int) -> Tensor:
        return torch.randn((rows, columns), generator=generator, device="cpu").to(A.device)

    Q, images, missing = A.new_empty(A.shape[1], 0), [draw(A.shape[0])], ENOUGH * _squares(A)
    while Q.shape[1] < rank or (len(images) <= BLOCKS and missing > 0):
        block = A.T @ images[-1]
        # Where nothing is left of it but rounding, which knows some directions only, go at random.
        block += NOISE * _largest(block) * draw(A.shape[1])
        for _ in range(2):  # rounding undoes the first time where little is left
            block = torch.linalg.qr(block - Q @ (Q.T @ block)).Q
        Q = torch.cat([Q, block], 1)
        images.append(A @ block)
        missing -= _squares(images[-1])
    return Q, torch.cat(images[1:], 1)


def _squares(matrix: Tensor) -> float:
    rows = matrix if matrix.is_contiguous() else matrix.T  # whose entries are one vector
    return float(torch.dot(rows.reshape(-1), rows.reshape(-1)))


def _largest(matrix: Tensor) -> Tensor:
    """Return the largest absolute entry, or next to nothing if all are 0."""
    low, high = matrix.aminmax()
    return torch.maximum(-low, high).clamp(min=1e-30)


def _images(A: Tensor, V: Tensor) -> Tensor:
    """Return the left singular directions (m, r) to right ones (n, r): ``A V``, orthonormal."""
    Q, R = torch.linalg.qr(A @ V)
    return Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
