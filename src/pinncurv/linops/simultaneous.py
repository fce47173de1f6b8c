"""Simultaneous diagonalization of two symmetric positive definite matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.psd import (
    CholeskyFactorization,
    Factorization,
    FactorizationError,
    FactorizationReport,
    check_nonsingular,
    cholesky_with_flag,
    eigh,
    symmetrize,
)
from pinncurv.linops.reading import read


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
    s1: float | Tensor
    s2: float | Tensor
    reports: tuple[FactorizationReport, ...]


@dataclass(frozen=True)
class Pencil:
    """Two positive definite matrices, to be diagonalized by a congruence.

    M = P_1 / s_1 + P_2 / s_2 = R Rᵀ,  R⁻¹ (P_1 / s_1) R⁻ᵀ = U diag(a) Uᵀ,  E = R⁻ᵀ U

    with s_i the mean eigenvalue of P_i. Whitening by the sum is better conditioned than whitening
    by one of the two, and treats both alike. The eigenvalues obey a ∈ [0, 1], and more exactly
    a ≥ λ_1 / (s_1 m_max) and 1 − a ≥ λ_2 / (s_2 m_max) for P_i ≥ λ_i I and M ≤ m_max I; they are
    clipped to these bounds (with the trace of M, 2n, as m_max), which rounding violates if the P_i
    are numerically singular. What that takes happens in two parts, so that a device is waited for
    once between them, for any number of pencils.

    Attributes:
        scaled: P_1 / s_1.
        M: P_1 / s_1 + P_2 / s_2.
        L: Cholesky's factor of M, if the algorithm did not fail.
        numbers: On the device, the sum of M, the smaller trace, whether Cholesky's algorithm did
            not fail, s_1, s_2, λ_1 and λ_2.
        name: What the matrices are.
    """

    scaled: Float[Tensor, "n n"]
    M: Float[Tensor, "n n"]
    L: Float[Tensor, "n n"]
    numbers: Float[Tensor, " 7"]
    name: str

    @classmethod
    def of(cls, P: Float[Tensor, "2 n n"], floors: Sequence[float | Tensor], name: str) -> Pencil:
        """Begin with two matrices, and the lower bounds λ_1, λ_2 on their eigenvalues."""
        means = P.diagonal(dim1=-2, dim2=-1).mean(-1)
        s = torch.where(means > 0, means, 1.0)  # one for a zero matrix
        scaled = P / s[:, None, None]
        M = scaled[0] + scaled[1]
        # a number is filled in on the device, not sent there
        bounds = [f if isinstance(f, Tensor) else P.new_full((), f) for f in floors]
        L, good = cholesky_with_flag(M, bounds[0] / s[0] + bounds[1] / s[1])
        numbers = [M.sum(), means.amin(), good.to(M), *s.unbind(), *bounds]
        return cls(scaled[0], M, L, torch.stack(numbers), name)

    def diagonalize(self, numbers: Sequence[float] | None) -> SimultaneousDiagonalization:
        """Go on, knowing the numbers; None if they are known to be good, but stay on the device.

        Raises:
            FactorizationError: If a trace is negative, or M is numerically singular and both floors
                are zero.
        """
        values = self.numbers.unbind() if numbers is None else numbers
        s1, s2, floor1, floor2 = values[3:]
        if numbers is not None and numbers[1] < 0:
            raise FactorizationError(
                f"The matrices in {self.name} must be positive semidefinite, got a trace of "
                f"{numbers[1] * len(self.M):.1e}. Check the signs of the sums that define the "
                "factors."
            )
        good, floor = numbers is None or bool(numbers[2]), floor1 / s1 + floor2 / s2
        factorization = self._factorization(good, floor)
        whitened = factorization.whiten(factorization.whiten(self.scaled).mT)
        largest = 2.0 * len(self.M)  # the trace of M bounds its largest eigenvalue
        eigen = eigh(whitened, f"{self.name}, whitened", floor1 / (s1 * largest))
        a1 = eigen.eigenvalues.clamp(max=1)
        return SimultaneousDiagonalization(
            factorization.whiten_adjoint(eigen.eigenvectors),
            a1,
            (1 - a1).clamp_(min=floor2 / (s2 * largest)),
            s1,
            s2,
            (factorization.report, eigen.report),
        )

    def _factorization(self, good: bool, floor: float | Tensor) -> Factorization:
        if good:
            return CholeskyFactorization(self.L, FactorizationReport(self.name, "cholesky", floor))
        decomposition = eigh(self.M, self.name, floor)
        check_nonsingular(decomposition)
        return decomposition


def diagonalize(
    P1: Float[Tensor, "n n"],
    P2: Float[Tensor, "n n"],
    floor1: float,
    floor2: float,
    name: str,
) -> SimultaneousDiagonalization:
    """Diagonalize two symmetric positive definite matrices by a congruence, see ``Pencil``.

    Raises:
        FactorizationError: As ``Pencil.diagonalize`` does.
    """
    pencil = Pencil.of(torch.stack([P1, P2]), (floor1, floor2), name)
    (numbers,) = read(pencil.numbers)
    if not is_good(numbers):
        symmetrize(P1, f"{name}, term 1")
        symmetrize(P2, f"{name}, term 2")
    return pencil.diagonalize(numbers)


def is_good(numbers: Sequence[float]) -> bool:
    """Whether a pencil is finite and positive definite, by its numbers."""
    return isfinite(numbers[0]) and numbers[1] >= 0 and bool(numbers[2])
