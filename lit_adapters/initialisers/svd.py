"""The leading singular triplets of a matrix, exactly or by a randomised range finder."""

import torch
from torch import Tensor


def leading_svd(
    matrix: Tensor,  # (m, n), fp32
    rank: int,
    niter: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``U`` (m, rank), ``S`` (rank,) and ``Vh`` (rank, n), largest first.

    If randomised, the largest entry of each row of ``Vh`` is positive.

    Args:
        matrix: Any real matrix in fp32.
        rank: Triplets wanted; at most ``min(m, n)``.
        niter: Power iterations of the randomised range finder with ``2 rank`` columns (Halko et
            al., arXiv 0909.4061, algorithm 4.4); None is the full SVD, and so is a rank at which
            nothing is saved.
        generator: Draws the test matrix, on the CPU, so that every device sees the same one.
    """
    columns = 2 * rank  # with only `rank`, a flat spectrum loses a tenth of the subspace
    if niter is None or columns >= min(matrix.shape):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank], S[:rank], Vh[:rank]
    shape = (matrix.shape[1], columns)
    test = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    Q = _orthonormal(matrix @ test.to(matrix.device))
    for _ in range(niter):
        Q = _orthonormal(matrix @ _orthonormal(matrix.T @ Q))
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    U, Vh = Q @ U[:, :rank], Vh[:rank]
    # Signs would hang on the last bits of the matrix, which are others on other devices.
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0)  # (rank, 1)
    return U * signs.T, S[:rank], signs * Vh


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q
