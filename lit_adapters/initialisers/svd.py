"""The leading singular triplets of a matrix, exactly or by filtered subspace iteration."""

import math

import torch
from torch import Tensor

from lit_adapters.initialisers.factored import Factored

RANGE = math.log(1e12)  # between what a filter multiplies most and least: QR in fp32 keeps both
MORE_COLUMNS = 16  # at least: as fast as fewer, and they tell a small rank from a flat rest


def leading_svd(
    matrix: Tensor | Factored,  # (m, n), fp32
    rank: int,
    niter: int | None,
    generator: torch.Generator,
    accuracy: float = 1e-4,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (m, rank), ``S`` (rank,) and ``Vh`` (rank, n), largest first.

    If iterated, the largest entry of each row of ``Vh`` is positive.

    Args:
        matrix: Any real matrix in fp32, or its factors.
        rank: Triplets wanted; at most ``min(m, n)``.
        niter: Iterations at most, each a product with the matrix and one with its transpose; it
            ends sooner where that is accurate. None is the full SVD, and so is a rank at which
            nothing is saved.
        generator: Draws the test matrix, on the CPU, so that every device sees the same one.
        accuracy: Error of ``U S Vh`` at which the iteration ends, relative to its norm.
    """
    columns = rank + max(rank // 2, MORE_COLUMNS)
    if niter is None or 4 * columns > min(matrix.shape):
        dense = matrix.dense() if isinstance(matrix, Factored) else matrix
        U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    if isinstance(matrix, Factored) and not matrix.multiplies_faster(columns * (2 * niter + 2)):
        matrix = matrix.dense()
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix  # fewer rows to decompose
    shape = (tall.shape[1], columns)
    test = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    image = tall @ test.to(tall.device)
    size = image.abs().max().item()
    size = 1.0 if size == 0 or 1e-9 < size < 1e9 else size  # else fourth powers would be lost
    if size != 1:
        tall, image = tall / size, image / size
    U, S, Vh = _iterated(tall, image, rank, niter, accuracy)
    U, Vh = (Vh[:rank].T, U[:, :rank].T) if wide else (U[:, :rank], Vh[:rank])
    # Signs would hang on the last bits of the matrix, which are others on other devices.
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)  # (rank, 1)
    return U * signs.T, S[:rank] * size, signs * Vh


def _iterated(
    matrix: Tensor | Factored, image: Tensor, rank: int, niter: int, accuracy: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return triplets of a tall matrix, of which the first ``rank`` are accurate.

    A range finder (Halko et al., arXiv 0909.4061, algorithm 4.4), whose powers of ``W W^T`` are
    Chebyshev polynomials instead, as in arXiv 1805.10121: they grow fastest above the values that
    are not wanted, of which the least one found is taken for the largest. It starts from the
    ``image`` of as many random vectors as there shall be triplets.
    """
    Q = torch.linalg.qr(image).Q
    while True:
        V, S, Zh = torch.linalg.svd(matrix.T @ Q, full_matrices=False)
        U = Q @ Zh.T
        if niter <= 0:
            return U, S, V.T
        image = matrix @ V  # U S, where they are singular vectors
        error = _error(U[:, :rank], S, image[:, :rank])
        if not error > accuracy:
            return U, S, V.T
        first, last, least = S[[0, rank - 1, -1]].tolist()
        cut = max(least, 1e-7 * first) ** 2
        wanted = math.log(2 * error / accuracy) / _growth(last, cut) + 1
        degree = min(max(int(min(RANGE / _growth(first, cut), wanted)), 1), niter)
        niter -= degree
        older, newer = U, image.mul_(2 / cut * S).sub_(U)
        for _ in range(degree - 1):  # T_{k+1} = 2 x T_k - T_{k-1} of x = 2 W W^T / cut - 1
            next_ = (matrix @ (matrix.T @ newer)).mul_(4 / cut)
            older, newer = newer, next_.sub_(older).sub_(newer, alpha=2)
        Q = torch.linalg.qr(newer).Q


def _growth(value: float, cut: float) -> float:
    """Return the logarithm of what each degree multiplies directions of this value by."""
    return math.acosh(max(2 * value**2 / cut - 1, 1 + 1e-6))


def _error(U: Tensor, S: Tensor, image: Tensor) -> float:
    """Estimate the error of ``U S Vh``, relative to its norm, from ``image = W V``.

    To first order a residual is the part of a direction that lies outside, times what its square
    has above those there; that part enters ``U U^T W`` on two sides, at most twice over. What lies
    outside is taken to be of the least value found, so with flat spectra the truth can be above.
    """
    squares = (S / S[0]).square()
    kept = squares[: U.shape[1]]
    residual = torch.linalg.vector_norm(image - U * S[: U.shape[1]], dim=0) / S[0]
    outside = residual * kept / (kept - squares[-1]).clamp(min=torch.finfo(S.dtype).tiny)
    return 2 * (outside.norm() / kept.sum().sqrt()).item()
