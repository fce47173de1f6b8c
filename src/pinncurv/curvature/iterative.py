"""The exact Gauss-Newton step by conjugate gradients, preconditioned by any other curvature."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from pinncurv.curvature.gauss_newton import GaussNewtonLinearOperator
from pinncurv.curvature.kfac import KFAC
from pinncurv.linearization import Linearization
from pinncurv.linops import (
    CGInverseLinearOperator,
    FactorDamping,
    PyTorchLinearOperator,
    RelativeProgress,
    StoppingRule,
    check_damping,
    trace_norm,
)

Recipe = Callable[[Sequence[Linearization]], PyTorchLinearOperator]


@runtime_checkable
class InverseRecipe(Protocol):
    """A damped inverse as a function of the operator: a frozen dataclass such as ``Damped``."""

    @property
    def damping(self) -> float:
        """λ."""

    def __call__(self, operator: Any) -> PyTorchLinearOperator:
        """Return the inverse of an operator."""


@dataclass(frozen=True)
class PreconditionedCG:
    """Inverse recipe: truncated conjugate gradients on the exact Gauss-Newton matrix.

    C ↦ x ≈ (JᵀJ + λI)⁻¹ b,  preconditioned by  P = inverse(λ_P)(K),  λ_P = max(λ, inverse.damping)

    K is any curvature of the same linearizations, built by ``curvature``: it decides how fast the
    quadratic model falls, not where it ends. P follows λ upwards, since K no longer matters where λ
    is large, but not below the damping of ``inverse``: with less, the inverse of KFAC's singular
    factors takes over, and the solve slows down tenfold. EKFAC goes with ``Damped``,
    ``SubspaceGaussNewton(200, choice=pivoted_points)`` with ``Deflated``: it takes longest to build
    and saves most of the iterations.

    The first iterations make most of the progress, so the solve is stopped by the progress of the
    quadratic model, long before the residual is small, which CG does not even lower monotonically.
    That and reaching ``max_iterations`` are normal; ``last_records`` says how far the solve came.

    Cost: that of K and P to build; per iteration one product with JᵀJ, 2 N S V D, and one with P;
    some vectors of D numbers, and those that ``spacing`` keeps.

    Attributes:
        damping: λ, a finite number >= 0.
        curvature: Builds K; None for no preconditioner.
        inverse: Builds P from K; a dataclass with the field ``damping``.
        tolerance: Relative norm of the residual at which the solve is done.
        max_iterations: Most products with JᵀJ; None for ``10 D``.
        stop: A rule that may end the solve earlier, or None.
        spacing: Which iterates to keep, see ``conjugate_gradients``.
    """

    damping: float = 1e-8
    curvature: Recipe | None = field(default_factory=KFAC)
    inverse: InverseRecipe = field(default_factory=lambda: FactorDamping(1e-8, trace_norm))
    tolerance: float = 1e-6
    max_iterations: int | None = 50
    stop: StoppingRule | None = field(default_factory=lambda: RelativeProgress(1e-2))
    spacing: float | None = None

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> CGInverseLinearOperator:
        """Return the inverse of a ``GaussNewtonLinearOperator``; without preconditioner, of any.

        Raises:
            TypeError: If a preconditioner is asked for and the operator is another one.
        """
        return CGInverseLinearOperator(
            operator,
            self.damping,
            self.preconditioner(operator),
            self.tolerance,
            self.max_iterations,
            stop=self.stop,
            spacing=self.spacing,
            truncated=True,
        )

    def preconditioner(self, operator: PyTorchLinearOperator) -> PyTorchLinearOperator | None:
        """Return P, or None."""
        if self.curvature is None:
            return None
        if not isinstance(operator, GaussNewtonLinearOperator):
            raise TypeError(
                "PreconditionedCG builds its preconditioner from the linearizations of a "
                f"GaussNewtonLinearOperator, got {type(operator).__name__}. Let the optimizer's "
                "curvature be MatrixFreeGaussNewton(), or precondition "
                "nothing with PreconditionedCG(curvature=None)."
            )
        K = self.curvature(operator.jacobian.linearizations)
        damping = max(self.damping, self.inverse.damping)
        return replace(self.inverse, damping=damping)(K)  # type: ignore[type-var]
