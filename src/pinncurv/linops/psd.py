"""The one path for factorizations of symmetric positive semidefinite matrices.

Symmetrize, check that all entries are finite, factorize in float64, escalate where that fails
(Cholesky, then an eigendecomposition, then an eigendecomposition of a matrix that is shifted by a
few units of rounding), and report what was done.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from math import inf, isfinite, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.reading import read
from pinncurv.machine import symmetric_product

FACTORIZATION_DTYPE = torch.float64


class FactorizationError(ValueError):
    """A matrix that should be symmetric positive (semi)definite could not be factorized."""


@dataclass(frozen=True)
class FactorizationReport:
    """What was done to factorize one matrix.

    Attributes:
        name: What the matrix is.
        method: ``"cholesky"``, ``"eigh"``, ``"shifted eigh"``, or ``"pseudo-inverse by eigh"``.
        floor: The lower bound that eigenvalues were clipped to, or below which a pseudo-inverse
            dropped them, a number or on the device.
        eigenvalues: The eigenvalues before clipping, ``None`` after a Cholesky factorization.
    """

    name: str
    method: str
    floor: float | Tensor
    eigenvalues: Float[Tensor, " n"] | None = None

    @property
    def clipped(self) -> int:
        """The number of eigenvalues that were below the floor."""
        return 0 if self.eigenvalues is None else int((self.eigenvalues < self.floor).sum())


class Factorization(ABC):
    """A factorization of a symmetric positive definite matrix.

    M = R Rᵀ
    """

    report: FactorizationReport

    @property
    @abstractmethod
    def root(self) -> Float[Tensor, "n n"]:
        """A square matrix of the factorization, from which size, device and dtype follow."""

    @property
    def device(self) -> torch.device:
        return self.root.device

    @property
    def dtype(self) -> torch.dtype:
        return self.root.dtype

    @abstractmethod
    def whiten(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return R⁻¹ X."""

    @abstractmethod
    def whiten_adjoint(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return R⁻ᵀ X."""

    def solve(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return M⁻¹ X = R⁻ᵀ R⁻¹ X."""
        return self.whiten_adjoint(self.whiten(X))

    def inverse(self) -> Float[Tensor, "n n"]:
        """Return M⁻¹ = Wᵀ W with W = R⁻¹, exactly symmetric."""
        return symmetric_product(self.whiten(torch.eye(len(self.root)).to(self.root)))


@dataclass(frozen=True)
class CholeskyFactorization(Factorization):
    """M = L Lᵀ with lower triangular L."""

    L: Float[Tensor, "n n"]
    report: FactorizationReport

    @property
    def root(self) -> Float[Tensor, "n n"]:
        return self.L

    def whiten(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return torch.linalg.solve_triangular(self.L, X, upper=False)

    def whiten_adjoint(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return torch.linalg.solve_triangular(self.L.mT, X, upper=True)


@dataclass(frozen=True)
class EigenFactorization(Factorization):
    """M = V diag(m) Vᵀ with positive m, and R = V diag(√m)."""

    eigenvalues: Float[Tensor, " n"]
    eigenvectors: Float[Tensor, "n n"]
    report: FactorizationReport

    @property
    def root(self) -> Float[Tensor, "n n"]:
        return self.eigenvectors

    def whiten(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return (self.eigenvectors.mT @ X) / self.eigenvalues.sqrt().unsqueeze(-1)

    def whiten_adjoint(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        return self.eigenvectors @ (X / self.eigenvalues.sqrt().unsqueeze(-1))

    def solve(self, X: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        V, m = self.eigenvectors, self.eigenvalues
        return V @ ((V.mT @ X) / m.unsqueeze(-1))

    def damped(self, damping: float) -> EigenFactorization:
        """Return the eigendecomposition of M + λ I, after checking that this is nonsingular."""
        report = replace(self.report, floor=self.report.floor + damping)
        damped = EigenFactorization(self.eigenvalues + damping, self.eigenvectors, report)
        check_nonsingular(damped)
        return damped


def symmetrize(
    matrix: Float[Tensor, "n n"], name: str, dtype: torch.dtype = FACTORIZATION_DTYPE
) -> Float[Tensor, "n n"]:
    """Check that a matrix is finite, and return its symmetric part.

    (M + Mᵀ) / 2

    Raises:
        FactorizationError: If an entry is not finite; says the name of the matrix.
    """
    return symmetric_part(check_entries(matrix.to(dtype), name))


def check_entries(M: Float[Tensor, "n n"], name: str) -> Float[Tensor, "n n"]:
    """Check that a matrix is finite, and return it.

    Raises:
        FactorizationError: If an entry is not finite; says the name of the matrix.
    """
    # a finite sum proves finite entries in one reduction; the converse fails on overflow
    if not isfinite(read(M.sum())[0][0]) and not bool(M.isfinite().all()):
        count = int((~M.isfinite()).sum())
        raise FactorizationError(
            f"The entries of {name} must be finite, got {count} of {M.numel()} that are not. "
            "Look for a diverged loss (smaller steps, more damping) or an overflow in the model."
        )
    return M


def symmetric_part(M: Float[Tensor, "*K n n"]) -> Float[Tensor, "*K n n"]:
    """Return (M + Mᵀ) / 2."""
    half = 0.5 * M
    return half + half.mT


def eigh(
    matrix: Float[Tensor, "n n"], name: str, floor: float | Tensor = 0.0
) -> EigenFactorization:
    """Eigendecomposition of a symmetric positive semidefinite matrix.

    M = V diag(max(m, floor)) Vᵀ, see ``factorize`` for the arguments

    Raises:
        FactorizationError: If the eigendecomposition fails.
    """
    method = "eigh"
    try:
        m, V = torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        method = "shifted eigh"
        m, V = _shifted_eigh(matrix, name)
    report = FactorizationReport(name, method, floor, m)
    return EigenFactorization(m.clamp(min=floor), V, report)


def _shifted_eigh(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Eigendecomposition by way of M + δ I with δ of the size of a few rounding errors."""
    n = matrix.shape[-1]
    shift = n * torch.finfo(matrix.dtype).eps * float(torch.linalg.matrix_norm(matrix))
    try:
        m, V = torch.linalg.eigh(matrix + shift * torch.eye(n).to(matrix))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise FactorizationError(
            f"The eigendecomposition of {name} ({n}x{n}) failed twice: {error} "
            "Look for entries of very different magnitude, or raise the damping."
        ) from error
    return m - shift, V


def factorize(matrix: Float[Tensor, "n n"], name: str, floor: float = 0.0) -> Factorization:
    """Factorize a symmetric positive definite matrix by Cholesky, or else by eigh.

    M = R Rᵀ

    Args:
        matrix: Symmetric, finite matrix, as ``symmetrize`` returns it.
        name: What the matrix is, for error messages and the report.
        floor: Lower bound on the eigenvalues that is known to hold in exact arithmetic. The
            eigenvalues of numerically singular matrices are clipped to it.

    Raises:
        FactorizationError: If the matrix is numerically singular and there is no positive floor.
    """
    factorization = cholesky(matrix, name, floor)
    if factorization is not None:
        return factorization
    decomposition = eigh(matrix, name, floor)
    check_nonsingular(decomposition)
    return decomposition


def cholesky(
    matrix: Float[Tensor, "n n"], name: str, floor: float = 0.0
) -> CholeskyFactorization | None:
    """Factorize a matrix as ``factorize`` does, but None where Cholesky's algorithm fails."""
    L, good = cholesky_with_flag(matrix, floor)
    if not read(good)[0][0]:
        return None
    return CholeskyFactorization(L, FactorizationReport(name, "cholesky", floor))


def cholesky_with_flag(
    matrix: Float[Tensor, "n n"], floor: float | Tensor
) -> tuple[Float[Tensor, "n n"], Tensor]:
    """Return Cholesky's factor, and whether the algorithm did not fail, without reading that."""
    L, info = torch.linalg.cholesky_ex(matrix)
    pivots = L.diagonal()
    # in exact arithmetic all are at least the root of the smallest eigenvalue
    rounding = sqrt(len(L) * torch.finfo(L.dtype).eps)
    if isinstance(floor, Tensor):
        smallest = torch.where(floor > 0, floor.sqrt(), rounding * pivots.amax())
        return L, (info == 0) & (pivots.amin() >= smallest)
    return L, (info == 0) & (pivots.amin() >= (sqrt(floor) or rounding * pivots.amax()))


def factorize_from(
    matrix: Float[Tensor, "n n"], name: str, damping: float
) -> tuple[CholeskyFactorization, float]:
    """Factorize M + λI with the smallest of λ, 10λ, 100λ, ... for which Cholesky does not fail.

    M + λI = L Lᵀ

    Where λ is near the rounding of M, pivots are no better than that: who solves with this
    factorization refines.

    Args:
        matrix: Symmetric, finite, positive semidefinite matrix, as ``symmetrize`` returns it.
        name: What the matrix is, for error messages and the report.
        damping: λ > 0.

    Returns:
        The factorization, and the damping that was taken.

    Raises:
        FactorizationError: If no damping up to the size of the matrix is enough.
    """
    size = read(torch.linalg.matrix_norm(matrix))[0][0]
    first = damping
    while 0 < damping <= max(first, 10 * size) < inf:
        damped = matrix.clone()
        damped.diagonal().add_(damping)
        L, info = torch.linalg.cholesky_ex(damped)
        if info.item() == 0:
            return CholeskyFactorization(L, FactorizationReport(name, "cholesky", damping)), damping
        damping *= 10
    raise FactorizationError(
        f"{name} must be positive semidefinite, got one that is not with a damping of {first:.1e} "
        f"to {damping:.1e}. Look for a diverged loss, or pass damping > 0."
    )


def is_singular(eigenvalues: Tensor) -> bool:
    """Whether eigenvalues of any shape belong to a numerically singular matrix.

    m_min <= n ε m_max, or an eigenvalue is NaN
    """
    rounding = eigenvalues.numel() * torch.finfo(eigenvalues.dtype).eps
    return not eigenvalues.min().item() > rounding * eigenvalues.max().item()


def check_nonsingular(factorization: EigenFactorization) -> None:
    """Check that a matrix without positive floor is not numerically singular."""
    report, m = factorization.report, factorization.eigenvalues
    if not report.floor > 0 and is_singular(m):
        smallest, largest = m[0].item(), m[-1].item()
        raise FactorizationError(
            f"{report.name} must be nonsingular to be inverted without damping, got "
            f"eigenvalues in [{smallest:.1e}, {largest:.1e}]. Pass damping > 0."
        )
