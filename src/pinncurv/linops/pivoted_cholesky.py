"""A few columns that stand for a positive semidefinite matrix, by randomly pivoted Cholesky."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PartialCholesky:
    """A factor of a positive semidefinite matrix that is exact in the rows of its pivots.

    K ≈ F Fᵀ = K_:P (K_PP)⁻¹ K_P:

    Args:
        factor: F, one column per pivot.
        pivots: P, in the order in which they were drawn.
    """

    factor: Float[Tensor, "R k"]
    pivots: Int[Tensor, " k"]


def pivoted_cholesky(
    matrix: Float[Tensor, "R R"], rank: int, generator: torch.Generator
) -> PartialCholesky:
    """Draw each pivot in proportion to what the matrix has left on its diagonal.

    P(i) ∝ diag(K - F Fᵀ)_i

    The expected trace of K - F Fᵀ is near that of the best approximation of somewhat lower rank.
    There are fewer pivots than asked for if nothing but rounding is left.

    Cost: R k²; of K, the diagonal and k columns are looked at.

    Args:
        matrix: K.
        rank: k.
        generator: On the CPU.

    Source: Chen, Epperly, Tropp, Webber 2022, algorithm 2.1.
    """
    left, F = matrix.diagonal(), matrix.new_zeros(len(matrix), rank)
    rounding = len(matrix) * torch.finfo(matrix.dtype).eps * float(left.max())
    pivots: list[int] = []
    while len(pivots) < rank and bool((left > rounding).any()):
        chances = left.where(left > rounding, 0.0).cpu()
        i = int(chances.multinomial(1, generator=generator))
        column = matrix[:, i] - F @ F[i]
        F[:, len(pivots)] = column / column[i].sqrt()
        left = left - F[:, len(pivots)].square()
        pivots.append(i)
    order = torch.tensor(pivots, dtype=torch.int64, device=F.device)
    return PartialCholesky(F[:, : len(pivots)], order)
