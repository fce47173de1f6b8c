"""The Moore-Penrose inverse of dense operators, for singular ones without damping."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from pinncurv.linops.dense import (
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
)
from pinncurv.linops.inverses import (
    BlockFactorizedInverseLinearOperator,
    FactorizedInverseLinearOperator,
)
from pinncurv.linops.operator import PyTorchLinearOperator
from pinncurv.linops.psd import EigenFactorization, FactorizationError


@dataclass(frozen=True)
class PseudoInverse:
    """The Moore-Penrose inverse of a dense symmetric positive semidefinite operator.

    C = Σ_i m_i v_i v_iᵀ ↦ C⁺ = Σ_i v_i v_iᵀ / m_i, over all m_i >= τ max_j m_j, m_i > 0

    Of a system C x = b it gives the solution of least squares and least norm, where ``Damped(0)``
    refuses a numerically singular C. What is dropped does not move: eigenvalues just above τ are
    still noise, so that a small damping is the better choice where there is one.

    Takes dense matrices, those with dense blocks, each of which has its own max m, and diagonals.

    Attributes:
        tolerance: τ in [0, 1); by default n ε for n eigenvalues, at most 1e-3, with ε of the data
            type that C is known in, and 0 for a diagonal, whose entries have no rounding of others.

    Raises:
        ValueError: If τ is out of range.
    """

    damping: ClassVar[float] = 0.0
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be in [0, 1), got {self.tolerance}.")

    def __call__(self, operator: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Return the inverse.

        Cost: O(n³) and 2 n² numbers in float64, n the size of the matrix or of a block.

        Raises:
            TypeError: If the operator is not dense.
            FactorizationError: If an entry is not finite.
            NotEnoughMemoryError: If an eigendecomposition does not fit into the memory.
        """
        if isinstance(operator, DenseLinearOperator):
            whole = self._truncated(operator.eigh, operator)
            return FactorizedInverseLinearOperator(whole, operator.shapes, operator.dtype)
        if isinstance(operator, DenseBlockDiagonalLinearOperator):
            layers = range(len(operator.blocks))
            parts = [self._truncated(operator.eigh(i), operator) for i in layers]
            return BlockFactorizedInverseLinearOperator(
                parts, operator.blocks, operator.shapes, operator.dtype
            )
        if isinstance(operator, DiagonalLinearOperator):
            return self._of_diagonal(operator)
        raise TypeError(
            "PseudoInverse must be given an operator of dense matrices, of GaussNewton(), "
            f"BlockDiagonalGaussNewton() or DiagonalGaussNewton(), got {type(operator).__name__}. "
            "Take Damped(damping) instead."
        )

    def _cutoff(self, tolerance: float, largest: float, dtype: torch.dtype) -> float:
        """Return below what eigenvalues are dropped, positive."""
        chosen = tolerance if self.tolerance is None else self.tolerance
        return max(chosen * largest, torch.finfo(dtype).tiny)

    def _truncated(
        self, whole: EigenFactorization, operator: PyTorchLinearOperator
    ) -> EigenFactorization:
        """Return the factorization that solves with C⁺."""
        m = whole.eigenvalues
        if not math.isfinite(largest := m[-1].item()):
            raise FactorizationError(
                f"{whole.report.name} must have finite eigenvalues to be inverted, got {largest}. "
                "Scale the loss down."
            )
        rounding = min(1e-3, len(m) * torch.finfo(operator.precision).eps)
        cutoff = self._cutoff(rounding, largest, operator.dtype)
        report = replace(whole.report, method="pseudo-inverse by eigh", floor=cutoff)
        return replace(whole, eigenvalues=m.masked_fill(m < cutoff, math.inf), report=report)

    def _of_diagonal(self, operator: DiagonalLinearOperator) -> DiagonalLinearOperator:
        c = operator.diagonal()
        if not bool(c.isfinite().all()):
            raise FactorizationError(
                "The diagonal must be finite to be inverted. Look for a diverged loss."
            )
        cutoff = self._cutoff(0.0, c.max().item(), c.dtype)
        inverses = [d.reciprocal().masked_fill(d < cutoff, 0.0) for d in operator.diagonals]
        return DiagonalLinearOperator(inverses)
