"""Methods that solve with the exact Gauss-Newton matrix by conjugate gradients."""

from collections.abc import Iterable
from typing import Any

from pinncurv.curvature import (
    KFAC,
    InverseRecipe,
    MatrixFreeGaussNewton,
    PreconditionedCG,
    Recipe,
)
from pinncurv.linops import FactorDamping, RelativeProgress, trace_norm
from pinncurv.optim import (
    CGBacktracking,
    CurvatureOptimizer,
    DampingRule,
    LevenbergMarquardt,
    QuadraticModel,
    StepSize,
    WarmStart,
)
from pinncurv.presets.precision import default_damping, groups_of

_KFAC = KFAC()


def gauss_newton_cg(
    params: Iterable[Any],
    damping: float | None = None,
    curvature: Recipe | None = _KFAC,
    inverse: InverseRecipe | None = None,
    max_iterations: int = 50,
    damping_rule: DampingRule | None = None,
) -> CurvatureOptimizer:
    """Return the exact Gauss-Newton method by conjugate gradients, preconditioned by KFAC.

    Where there are too many parameters for ``gauss_newton``: no matrix is formed, and each
    iteration of a solve costs about as much as the quadratic model of ``kfac_star``. Any curvature
    can precondition, also one that is no good on its own.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹; by default 1e-8 in float64, else 1e-4.
        curvature: What preconditions, KFAC by default; None for nothing.
        inverse: Its inverse; by default factor damping ``trace_norm`` with the default damping.
        max_iterations: Most products with JᵀJ per step.
        damping_rule: How λ adapts; constant by default.
    """
    groups = groups_of(params)
    default = default_damping(groups, 1e-8)
    return CurvatureOptimizer(
        groups,
        curvature=MatrixFreeGaussNewton(),
        inverse=PreconditionedCG(
            default if damping is None else damping,
            curvature,
            FactorDamping(default, trace_norm) if inverse is None else inverse,
            max_iterations=max_iterations,
        ),
        step_size=QuadraticModel(),
        damping_rule=damping_rule,
    )


def hessian_free(
    params: Iterable[Any],
    damping: float = 1e-3,
    decay: float = 0.95,
    max_iterations: int = 250,
    curvature: Recipe | None = None,
    inverse: InverseRecipe | None = None,
    step_size: StepSize | None = None,
) -> CurvatureOptimizer:
    """Return the Hessian-free method with Gauss-Newton products.

    Conjugate gradients start from the last solution, stop when the quadratic model falls by less
    than 0.05 % per iteration, and are gone back over while the loss falls, unless another step size
    is chosen. Rejected steps are solved again with more damping instead of shortened.

    Args:
        params: Parameters or parameter groups.
        damping: λ of the first step.
        decay: ζ, which part of the last solution a solve starts from.
        max_iterations: Most products with JᵀJ per solve.
        curvature: What preconditions; None for nothing.
        inverse: Its inverse; by default factor damping ``trace_norm``, for KFAC.
        step_size: How far to go along the last iterate, in place of going back over them:
            ``ArmijoLineSearch()``, for instance, as the published runs of arXiv 2405.15603 did.

    Source: Martens 2010.
    """
    step_size = CGBacktracking() if step_size is None else step_size
    return CurvatureOptimizer(
        params,
        curvature=MatrixFreeGaussNewton(),
        inverse=PreconditionedCG(
            damping,
            curvature,
            FactorDamping(1e-8, trace_norm) if inverse is None else inverse,
            tolerance=1e-10,
            max_iterations=max_iterations,
            stop=RelativeProgress(5e-4),
            spacing=1.3 if isinstance(step_size, CGBacktracking) else None,
        ),
        step_size=step_size,
        momentum=WarmStart(decay),
        damping_rule=LevenbergMarquardt(shrink=1.5, grow=1.5, reject=1.5, minimum=1e-12),
    )
