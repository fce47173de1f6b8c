"""The singular value decomposition of a matrix with many more rows than columns."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.machine import sizes_of


def tall_svd_(
    X: Float[Tensor, "R k"],
) -> tuple[Float[Tensor, "R m"], Float[Tensor, " m"], Float[Tensor, "m k"]]:
    """Return P, σ and Wᵀ of a matrix, which may be written over, in little more memory than it has.

    X = P diag(σ) Wᵀ,  X_b = Q_b R_b,  [R_1; R_2; ...] = U diag(σ) Wᵀ,  P_b = Q_b U_b  for blocks b

    Each step is a Householder factorization, so that it is as accurate as that of X as a whole.

    Args:
        X: The matrix, of m = min(R, k) singular values.

    Source: Demmel, Grigori, Hoemmen, Langou 2012 (TSQR).
    """
    R, k = X.shape
    number = R // max(1, 2 * k, sizes_of(X.device).held // max(1, k))
    if number < 2:
        P, sigma, Wt = torch.linalg.svd(X, full_matrices=False)
        return P, sigma, Wt
    blocks, triangles = X.tensor_split(number), []
    for block in blocks:
        Q, triangle = torch.linalg.qr(block)
        block.copy_(Q)
        triangles.append(triangle)
    U, sigma, Wt = torch.linalg.svd(torch.cat(triangles), full_matrices=False)
    for block, part in zip(blocks, U.split(k), strict=True):
        block.copy_(block @ part)
    return X, sigma, Wt
