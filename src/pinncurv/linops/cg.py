"""Preconditioned conjugate gradients on any linear operator."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.operator import SymmetricLinearOperator, check_damping


class CGNotConverged(UserWarning):
    """Conjugate gradients stopped before the residual was as small as asked for."""


@dataclass(frozen=True)
class CGRecord:
    """What one run of conjugate gradients did.

    Attributes:
        iterations: Number of products with the operator, the final check of the residual excluded.
        residual_norms: Relative residual norms ‖b − C x_k‖ / ‖b‖ as the recursion sees them.
        residual_norm: The true relative residual norm of the solution.
        converged: Whether the true residual norm is at most the tolerance.
    """

    iterations: int
    residual_norms: tuple[float, ...]
    residual_norm: float
    converged: bool


@dataclass(frozen=True)
class CGResult:
    """A solution and how it was found.

    Attributes:
        solution: The solution ``[D]``.
        record: What was done.
    """

    solution: Float[Tensor, " D"]
    record: CGRecord


def conjugate_gradients(
    operator: PyTorchLinearOperator,
    b: Float[Tensor, " D"],
    *,
    damping: float = 0.0,
    preconditioner: PyTorchLinearOperator | None = None,
    tolerance: float = 1e-10,
    max_iterations: int | None = None,
) -> CGResult:
    """Solve a symmetric positive definite linear system.

    (C + λ I) x = b  to  ‖b − (C + λ I) x‖ ≤ tolerance ‖b‖

    The residual that the recursion carries drifts away from the true one in badly conditioned
    systems. When it meets the tolerance the true residual is computed, and the iteration restarts
    from there as long as the true residual decreases.

    Args:
        operator: The symmetric positive semidefinite operator C.
        b: The right-hand side.
        damping: The damping λ.
        preconditioner: A symmetric positive definite approximation of (C + λ I)⁻¹.
        tolerance: Relative norm of the residual to reach.
        max_iterations: Most iterations, by default ``10 D``.

    Returns:
        The solution and the record. The record says whether the tolerance was reached.
    """
    limit = 10 * len(b) if max_iterations is None else max_iterations
    scale = torch.linalg.vector_norm(b).item()
    x = torch.zeros_like(b)
    if scale == 0:
        return CGResult(x, CGRecord(0, (0.0,), 0.0, True))

    norms, r, true_norm = [1.0], b, 1.0
    while true_norm > tolerance and len(norms) <= limit:
        step = _Recursion(operator, damping, preconditioner, r)
        while norms[-1] > tolerance and len(norms) <= limit and step.advance():
            norms.append(torch.linalg.vector_norm(step.r).item() / scale)
        x_new = x + step.x
        r = b - (operator @ x_new + damping * x_new)
        new_norm = torch.linalg.vector_norm(r).item() / scale
        if not new_norm < true_norm:
            break
        stagnated = new_norm > 0.5 * true_norm
        x, true_norm, norms[-1] = x_new, new_norm, new_norm
        if stagnated:
            break
    return CGResult(x, CGRecord(len(norms) - 1, tuple(norms), true_norm, true_norm <= tolerance))


class _Recursion:
    """The recursion of conjugate gradients for (C + λ I) x = r from x = 0."""

    def __init__(
        self,
        operator: PyTorchLinearOperator,
        damping: float,
        preconditioner: PyTorchLinearOperator | None,
        r: Tensor,
    ) -> None:
        self.operator, self.damping, self.preconditioner = operator, damping, preconditioner
        self.x, self.r = torch.zeros_like(r), r
        self.p = self._precondition(r)
        self.rz = torch.dot(r, self.p)

    def _precondition(self, r: Tensor) -> Tensor:
        return r if self.preconditioner is None else self.preconditioner @ r

    def advance(self) -> bool:
        """Do one iteration, or return False where the curvature along p is not positive."""
        Cp = self.operator @ self.p + self.damping * self.p
        pCp = torch.dot(self.p, Cp)
        if not (pCp > 0).item():
            return False
        alpha = self.rz / pCp
        self.x = self.x + alpha * self.p
        self.r = self.r - alpha * Cp
        z = self._precondition(self.r)
        rz = torch.dot(self.r, z)
        self.p = z + (rz / self.rz) * self.p
        self.rz = rz
        return True


class CGInverseLinearOperator(SymmetricLinearOperator):
    """The damped inverse of a symmetric positive semidefinite operator by conjugate gradients.

    (C + λ I)⁻¹ to a relative residual

    Each column is solved on its own. ``last_records`` holds the records of the last product; a
    column that misses the tolerance is a ``CGNotConverged`` warning.
    """

    def __init__(
        self,
        operator: PyTorchLinearOperator,
        damping: float = 0.0,
        preconditioner: PyTorchLinearOperator | None = None,
        tolerance: float = 1e-10,
        max_iterations: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Store the operator and how to solve.

        Args:
            operator: The symmetric positive semidefinite operator C.
            damping: The damping λ, a finite number >= 0.
            preconditioner: A symmetric positive definite approximation of (C + λ I)⁻¹.
            tolerance: Relative norm of the residual to reach.
            max_iterations: Most iterations per column, by default ``10 D``.
            dtype: Data type of the vectors, by default that of the operator, in which the
                iteration is done in any case.
        """
        super().__init__(operator._in_shape, operator.device, dtype or operator.dtype)
        self.operator = operator
        self.damping = check_damping(damping)
        self.preconditioner = preconditioner
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.last_records: tuple[CGRecord, ...] = ()

    def solve(self, b: Float[Tensor, " D"]) -> CGResult:
        """Solve for one right-hand side.

        (C + λ I) x = b

        Args:
            b: The right-hand side.

        Returns:
            The solution and the record.
        """
        return conjugate_gradients(
            self.operator,
            b,
            damping=self.damping,
            preconditioner=self.preconditioner,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([x.flatten(end_dim=-2) for x in X]).to(self.operator.dtype)
        results = [self.solve(column) for column in flat.unbind(-1)]
        self.last_records = tuple(result.record for result in results)
        self._warn()
        Y = torch.empty(flat.shape, dtype=self.dtype, device=self.device)
        for column, result in zip(Y.unbind(-1), results, strict=True):
            column.copy_(result.solution)
        pieces = Y.split(self._in_shape_flat)
        return [y.reshape(x.shape) for y, x in zip(pieces, X, strict=True)]

    def _warn(self) -> None:
        failed = [record for record in self.last_records if not record.converged]
        if failed:
            worst = max(record.residual_norm for record in failed)
            warnings.warn(
                f"Conjugate gradients must reach a relative residual of {self.tolerance:.1e}, "
                f"reached {worst:.1e} in {max(r.iterations for r in failed)} iterations "
                f"({len(failed)} of {len(self.last_records)} columns failed). "
                "Raise the damping, the tolerance or max_iterations.",
                CGNotConverged,
                stacklevel=4,
            )
