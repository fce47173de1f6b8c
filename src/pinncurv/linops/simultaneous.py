"""Simultaneous diagonalization of two symmetric positive definite matrices."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.psd import FactorizationError, FactorizationReport, eigh, factorize


@dataclass(frozen=True)
class SimultaneousDiagonalization:
    """A basis in which two matrices are diagonal.

    Eᵀ P_1 E = s_1 diag(a_1), Eᵀ P_2 E = s_2 diag(a_2), a_1 + a_2 = 1

    Attributes:
        E: The basis, one vector per column ``[n, n]``.
        a1: The first matrix in that basis, up to ``s1`` ``[n]``.
        a2: The second matrix in that basis, up to ``s2`` ``[n]``.
        s1: The mean eigenvalue of the first matrix.
        s2: The mean eigenvalue of the second matrix.
        reports: What was done to factorize P_1 / s_1 + P_2 / s_2 and the whitened P_1.
    """

    E: Float[Tensor, "n n"]
    a1: Float[Tensor, " n"]
    a2: Float[Tensor, " n"]
    s1: float
    s2: float
    reports: tuple[FactorizationReport, ...]


def diagonalize(
    P1: Float[Tensor, "n n"],
    P2: Float[Tensor, "n n"],
    floor1: float,
    floor2: float,
    name: str,
) -> SimultaneousDiagonalization:
    """Diagonalize two positive definite matrices by a congruence.

    M = P_1 / s_1 + P_2 / s_2 = R Rᵀ,  R⁻¹ (P_1 / s_1) R⁻ᵀ = U diag(a) Uᵀ,  E = R⁻ᵀ U

    with s_i the mean eigenvalue of P_i. Whitening by the sum is better conditioned than whitening
    by one of the two, and treats both alike. The eigenvalues obey a ∈ [0, 1], and more exactly
    a ≥ λ_1 / (s_1 m_max) and 1 − a ≥ λ_2 / (s_2 m_max) for P_i ≥ λ_i I and M ≤ m_max I; they are
    clipped to these bounds (with the trace of M, 2n, as m_max), which rounding violates if the P_i
    are numerically singular. The P_i are symmetric and finite; λ_1, λ_2 are ``floor1``, ``floor2``.

    Raises:
        FactorizationError: If M is numerically singular and both floors are zero.
    """
    trace1, trace2 = P1.trace().item(), P2.trace().item()
    if min(trace1, trace2) < 0:
        raise FactorizationError(
            f"The matrices in {name} must be positive semidefinite, got a trace of "
            f"{min(trace1, trace2):.1e}. Check the signs of the sums that define the factors."
        )
    s1, s2 = trace1 / len(P1) or 1.0, trace2 / len(P2) or 1.0  # one for a zero matrix
    scaled = P1 / s1
    M = torch.add(scaled, P2, alpha=1 / s2)
    factorization = factorize(M, name, floor1 / s1 + floor2 / s2)
    whitened = factorization.whiten(factorization.whiten(scaled).mT)
    largest = 2.0 * len(M)  # the trace of M bounds its largest eigenvalue
    eigen = eigh(whitened, f"{name}, whitened", floor1 / (s1 * largest))
    a1 = eigen.eigenvalues.clamp(max=1)
    return SimultaneousDiagonalization(
        factorization.whiten_adjoint(eigen.eigenvectors),
        a1,
        (1 - a1).clamp_(min=floor2 / (s2 * largest)),
        s1,
        s2,
        (factorization.report, eigen.report),
    )
