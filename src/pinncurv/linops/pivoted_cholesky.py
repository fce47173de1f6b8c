"""A few columns that stand for a positive semidefinite matrix, by randomly pivoted Cholesky."""

from __future__ import annotations

from collections.abc import Callable
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
    diagonal: Float[Tensor, " R"],
    columns: Callable[[Int[Tensor, " b"]], Float[Tensor, "R b"]],
    rank: int,
    generator: torch.Generator,
    block: int = 40,
) -> PartialCholesky:
    """Draw the next pivot in proportion to what the matrix has left on its diagonal.

    P(i) ∝ diag(K - F Fᵀ)_i

    The expected trace of K - F Fᵀ is near that of the best approximation of somewhat lower rank.
    Pivots are proposed a block at a time and accepted with what of their diagonal entry the pivots
    before them have left: that draws from the same distribution with fewer calls of ``columns``.
    There are fewer pivots than asked for if nothing but rounding is left.

    Cost: the diagonal and a few columns more than k; 2 R k (k + b).

    Args:
        diagonal: That of K.
        columns: Returns columns of K.
        rank: k.
        generator: On the CPU.
        block: b, how many pivots are proposed at a time.

    Source: Chen, Epperly, Tropp, Webber 2022, algorithm 2.1; Epperly, Tropp, Webber 2024
    (acceleration by rejection).
    """
    pivots: list[int] = []
    F, left = diagonal.new_zeros(len(diagonal), 0), diagonal
    rounding = len(diagonal) * torch.finfo(diagonal.dtype).eps * float(diagonal.max())
    while len(pivots) < rank and bool((left > rounding).any()):
        before = left.where(left > rounding, 0.0).cpu()
        proposed = before.multinomial(min(block, rank - len(pivots)), True, generator=generator)
        distinct, places = proposed.unique(return_inverse=True)
        G = columns(distinct.to(F.device)) - F @ F[distinct].mT
        new: list[Tensor] = []
        for i, place in zip(proposed.tolist(), places.tolist(), strict=True):
            chance = float(torch.rand((), generator=generator, dtype=before.dtype))
            if float(G[i, place]) <= max(chance * float(before[i]), rounding):
                continue
            column = G[:, place] / G[i, place].sqrt()
            G = G - column[:, None] * column[distinct]
            left = (left - column.square()).clamp(min=0)
            new.append(column)
            pivots.append(i)
        F = torch.cat([F, *(column[:, None] for column in new)], 1)
    return PartialCholesky(F, torch.tensor(pivots, dtype=torch.int64, device=F.device))
