"""The damped inverse of any operator by preconditioned conjugate gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops import policy
from pinncurv.linops.cg import CGRecord, CGResult, StoppingRule, conjugate_gradients
from pinncurv.linops.operator import PyTorchLinearOperator, SymmetricLinearOperator, check_damping


class CGNotConverged(UserWarning):
    """Conjugate gradients stopped before the residual was as small as asked for."""


class CGInverseLinearOperator(SymmetricLinearOperator):
    """The damped inverse of a symmetric positive semidefinite operator by conjugate gradients.

    (C + λ I)⁻¹ to a relative residual

    Each column is solved on its own. ``last_results`` holds the results of the last product, and
    ``last_records`` their records; a column that misses the tolerance is a ``CGNotConverged``
    warning, unless that is intended.

    Cost: nothing to build; per column and iteration one product with C, one with the
    preconditioner and some vectors of D numbers.

    Args:
        operator: The symmetric positive semidefinite operator C.
        damping: The damping λ, a finite number >= 0.
        preconditioner: A symmetric positive definite approximation of (C + λ I)⁻¹.
        tolerance: Relative norm of the residual to reach.
        max_iterations: Most iterations per column, by default ``10 D``.
        dtype: Data type of the vectors, by default that of the operator, in which the
            iteration is done in any case.
        stop: A rule that may end the iteration before the tolerance is met.
        spacing: Which iterates to keep, see ``conjugate_gradients``.
        truncated: Whether it is no warning that the tolerance was missed, only a record. The
            product is then a nonlinear function of the right-hand side.
    """

    def __init__(
        self,
        operator: PyTorchLinearOperator,
        damping: float = 0.0,
        preconditioner: PyTorchLinearOperator | None = None,
        tolerance: float = policy.TOLERANCE,
        max_iterations: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        stop: StoppingRule | None = None,
        spacing: float | None = None,
        truncated: bool = False,
    ) -> None:
        super().__init__(operator._in_shape, operator.device, dtype or operator.dtype)
        self.operator = operator
        self.damping = check_damping(damping)
        self.preconditioner = preconditioner
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.stop = stop
        self.spacing = spacing
        self.truncated = truncated
        self.last_results: tuple[CGResult, ...] = ()

    @property
    def last_records(self) -> tuple[CGRecord, ...]:
        """The records of the last product, one per column."""
        return tuple(result.record for result in self.last_results)

    def solve(self, b: Float[Tensor, " D"], start: Float[Tensor, " D"] | None = None) -> CGResult:
        """Solve (C + λ I) x = b for one right-hand side, from zero unless a start is given."""
        return conjugate_gradients(
            self.operator,
            b,
            damping=self.damping,
            preconditioner=self.preconditioner,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            stop=self.stop,
            start=start,
            spacing=self.spacing,
        )

    def solve_from(self, b: Sequence[Tensor], start: Sequence[Tensor]) -> list[Tensor]:
        """Solve for one right-hand side from a start, as a product does from zero.

        Both have one tensor per parameter.
        """
        columns = [torch.cat([part.flatten() for part in parts])[:, None] for parts in (b, start)]
        (solution,) = self._solve_columns(*columns).unbind(-1)
        pieces = solution.split(self._in_shape_flat)
        return [piece.reshape(shape) for piece, shape in zip(pieces, self._in_shape, strict=True)]

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        Y = self._solve_columns(torch.cat([x.reshape(-1, x.shape[-1]) for x in X]))
        pieces = Y.split(self._in_shape_flat)
        return [y.reshape(x.shape) for y, x in zip(pieces, X, strict=True)]

    def _solve_columns(
        self, B: Float[Tensor, "D K"], starts: Float[Tensor, "D K"] | None = None
    ) -> Float[Tensor, "D K"]:
        dtype = self.operator.dtype
        columns = B.to(dtype).unbind(-1)
        begins = [None] * len(columns) if starts is None else starts.to(dtype).unbind(-1)
        self.last_results = tuple(map(self.solve, columns, begins))
        self._warn()
        Y = torch.empty(B.shape, dtype=self.dtype, device=self.device)
        for column, result in zip(Y.unbind(-1), self.last_results, strict=True):
            column.copy_(result.solution)
        return Y

    def _warn(self) -> None:
        failed = [record for record in self.last_records if not record.converged]
        if failed and not self.truncated:
            worst = max(record.residual_norm for record in failed)
            warnings.warn(
                f"Conjugate gradients must reach a relative residual of {self.tolerance:.1e}, "
                f"reached {worst:.1e} in {max(r.iterations for r in failed)} iterations "
                f"({len(failed)} of {len(self.last_records)} columns failed). "
                "Raise the damping, the tolerance or max_iterations.",
                CGNotConverged,
                stacklevel=5,
            )
