"""Methods that invert the exact Gauss-Newton matrix, or a part of it."""

from collections.abc import Iterable
from typing import Any

from pinncurv.curvature import (
    BlockDiagonalGaussNewton,
    CheaperSide,
    Choice,
    DiagonalGaussNewton,
    GaussNewton,
    InSubspace,
    MatrixFreeGaussNewton,
    SubspaceGaussNewton,
    uniform_points,
)
from pinncurv.linops import Damped, PseudoInverse
from pinncurv.optim import (
    Curvature,
    CurvatureOptimizer,
    DampingRule,
    ExponentialAverage,
    GridLineSearch,
    LevenbergMarquardt,
    QuadraticModel,
    ShortStepDamping,
    Start,
    StepSize,
    from_zero,
)
from pinncurv.presets.precision import adapting, default_damping, groups_of


def _engd(
    params: Iterable[Any],
    curvature: Curvature,
    damping: float | None,
    decay: float,
    start: Start,
    step_size: StepSize | None,
    damping_rule: DampingRule | None,
) -> CurvatureOptimizer:
    """Compose energy natural gradient descent with one form of the Gauss-Newton matrix."""
    groups = groups_of(params)
    number, rule = adapting(damping, default_damping(groups, 1e-10), damping_rule)
    return CurvatureOptimizer(
        groups,
        curvature=curvature,
        inverse=Damped(number) if number or (rule and rule.adapts) else PseudoInverse(),
        step_size=step_size or GridLineSearch(),
        average=ExponentialAverage(decay, start) if decay else None,
        damping_rule=rule,
    )


def engd(
    params: Iterable[Any],
    damping: float | None = None,
    decay: float = 0.0,
    start: Start = from_zero,
    step_size: StepSize | None = None,
    damping_rule: DampingRule | None = None,
) -> CurvatureOptimizer:
    """Return energy natural gradient descent with the full Gauss-Newton matrix.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹, constant; by default it starts at 1e-10 in float64, else 1e-4.
            Zero takes the pseudo-inverse, see ``PseudoInverse``.
        decay: β of the matrix's moving average; 0 for none.
        start: What the moving average starts from.
        step_size: The step size; the grid line search by default.
        damping_rule: How λ adapts. By default it is constant, as published, if it is given, else
            raised while steps have to be shortened.

    Source: Müller and Zeinhofer 2023.
    """
    return _engd(params, GaussNewton(), damping, decay, start, step_size, damping_rule)


def engd_per_layer(
    params: Iterable[Any],
    damping: float | None = None,
    decay: float = 0.0,
    start: Start = from_zero,
    step_size: StepSize | None = None,
    damping_rule: DampingRule | None = None,
) -> CurvatureOptimizer:
    """Return the same with the per-layer diagonal blocks. Arguments as ``engd``."""
    curvature = BlockDiagonalGaussNewton()
    return _engd(params, curvature, damping, decay, start, step_size, damping_rule)


def engd_diagonal(
    params: Iterable[Any],
    damping: float = 1e-6,
    decay: float = 0.0,
    start: Start = from_zero,
    step_size: StepSize | None = None,
    damping_rule: DampingRule | None = None,
) -> CurvatureOptimizer:
    """Return the same with the diagonal. Arguments as ``engd``, with a damping of 1e-6."""
    return _engd(params, DiagonalGaussNewton(), damping, decay, start, step_size, damping_rule)


def gauss_newton(
    params: Iterable[Any],
    damping: float | None = None,
    use_momentum: bool = True,
    damping_rule: DampingRule | None = None,
    curvature: Curvature | None = None,
) -> CurvatureOptimizer:
    """Return the exact Gauss-Newton method with the quadratic model.

    The default damping starts as little more than what keeps the matrix invertible: an update is
    halved until the loss decreases, and the damping raised where that takes many halvings. A
    damping that is given is constant. ``auto`` follows the curve instead of its tangent.

    Args:
        params: Parameters or parameter groups.
        damping: λ, constant without a rule; by default it starts at 1e-12 in float64, else 1e-4.
        use_momentum: Whether the quadratic model may take part of the previous update.
        damping_rule: How λ adapts. By default it is constant, as published, if it is given, else
            raised while steps have to be shortened.
        curvature: The form of the exact matrix. By default it is formed and factorized on the
            cheaper side, of parameters or residuals, see ``CheaperSide``.

    Source: Martens and Grosse 2015, section 7, with the exact matrix.
    """
    groups = groups_of(params)
    number, rule = adapting(damping, default_damping(groups, 1e-12), damping_rule)
    return CurvatureOptimizer(
        groups,
        curvature=MatrixFreeGaussNewton() if curvature is None else curvature,
        inverse=CheaperSide(number) if curvature is None else Damped(number),
        step_size=QuadraticModel(use_momentum),
        damping_rule=rule,
    )


def levenberg_marquardt(
    params: Iterable[Any],
    damping: float = 1e-3,
    use_momentum: bool = True,
    curvature: Curvature | None = None,
) -> CurvatureOptimizer:
    """Return the exact Gauss-Newton method with a damping that adapts to the quadratic model.

    Steadier than ``gauss_newton`` where that has to shorten its steps a lot, slower elsewhere.

    Args:
        params: Parameters or parameter groups.
        damping: λ of the first step.
        use_momentum: Whether the quadratic model may take part of the previous update.
        curvature: The form of the exact matrix, as in ``gauss_newton``.

    Source: Nocedal and Wright 2006, section 10.3; Martens and Grosse 2015, sections 6.5 and 7.
    """
    return gauss_newton(params, damping, use_momentum, LevenbergMarquardt(), curvature)


def subspace_gauss_newton(
    params: Iterable[Any],
    points: int = 200,
    damping: float | None = None,
    seed: int = 0,
    damping_rule: DampingRule | None = None,
    choice: Choice = uniform_points,
) -> CurvatureOptimizer:
    """Return the exact Gauss-Newton method on the gradients at a few random points.

    Its steps cost about those of KFAC, and are nearly those of ``gauss_newton`` as long as the
    points are more than the effective dimension of the exact matrix (about 100 for PDEs in two
    dimensions; more than 1000 late in the training in four dimensions and more).

    Args:
        params: Parameters or parameter groups.
        points: How many points are drawn in every step.
        damping: λ of the first step; by default 1e-8 in float64, else 1e-4.
        seed: Which points are drawn.
        damping_rule: How λ adapts; by default it is raised while steps have to be shortened.
        choice: How they are drawn: ``uniform_points`` or ``pivoted_points``.
    """
    groups = groups_of(params)
    return CurvatureOptimizer(
        groups,
        curvature=SubspaceGaussNewton(points, seed, choice),
        inverse=InSubspace(default_damping(groups, 1e-8) if damping is None else damping),
        step_size=QuadraticModel(),
        damping_rule=damping_rule or ShortStepDamping(short=2.0**-4, long=0.5, minimum=1e-10),
    )
