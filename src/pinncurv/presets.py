"""The known methods: a few lines each, as a user would compose them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pinncurv.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    GaussNewtonLinearOperator,
    InSubspace,
    InverseRecipe,
    PreconditionedCG,
    Recipe,
    SubspaceGaussNewton,
    WeightSharing,
    Woodbury,
    expand,
)
from pinncurv.linops import Damped, FactorDamping, RelativeProgress
from pinncurv.linops.factor_damping import Heuristic, same, trace_norm
from pinncurv.optim import (
    CGBacktracking,
    Curvature,
    CurvatureOptimizer,
    DampingRule,
    ExponentialAverage,
    GridLineSearch,
    HeavyBall,
    LevenbergMarquardt,
    NormConstrained,
    QuadraticModel,
    ShortStepDamping,
    Spring,
    StepSize,
    WarmStart,
    from_identity,
    from_zero,
)
from pinncurv.optim.averaging import Start


def kfac(
    params: Iterable[Any],
    damping: float = 1e-8,
    decay: float = 0.95,
    momentum: float = 0.75,
    start: Start = from_identity,
    sharing: WeightSharing = expand,
    heuristic: Heuristic = same,
) -> CurvatureOptimizer:
    """Return KFAC with a line search and momentum.

    Args:
        params: Parameters or parameter groups.
        damping: λ, added to every Kronecker factor.
        decay: β of the factors' moving average.
        momentum: μ on the preconditioned gradient.
        start: What the moving average starts from.
        sharing: ``expand`` or ``reduce``.
        heuristic: How λ is distributed, ``same`` or ``trace_norm``.

    Source: Dangel, Müller, Zeinhofer 2024, section 3.3.
    """
    return CurvatureOptimizer(
        params,
        curvature=KFAC(sharing),
        inverse=FactorDamping(damping, heuristic),
        step_size=GridLineSearch(),
        average=ExponentialAverage(decay, start),
        momentum=HeavyBall(momentum) if momentum else None,
    )


def kfac_star(
    params: Iterable[Any],
    damping: float = 1e-8,
    decay: float = 0.95,
    start: Start = from_identity,
    sharing: WeightSharing = expand,
    heuristic: Heuristic = same,
) -> CurvatureOptimizer:
    """Return KFAC*, which takes step size and momentum from the exact quadratic model.

    Args:
        params: Parameters or parameter groups.
        damping: λ, added to every Kronecker factor.
        decay: β of the factors' moving average.
        start: What the moving average starts from.
        sharing: ``expand`` or ``reduce``.
        heuristic: How λ is distributed, ``same`` or ``trace_norm``.

    Source: Dangel, Müller, Zeinhofer 2024, section 3.3; Martens and Grosse 2015, section 7.
    """
    return CurvatureOptimizer(
        params,
        curvature=KFAC(sharing),
        inverse=FactorDamping(damping, heuristic),
        step_size=QuadraticModel(),
        average=ExponentialAverage(decay, start),
    )


def _engd(
    params: Iterable[Any],
    curvature: Curvature,
    damping: float,
    decay: float,
    start: Start,
    step_size: StepSize | None,
) -> CurvatureOptimizer:
    """Compose energy natural gradient descent with one form of the Gauss-Newton matrix."""
    return CurvatureOptimizer(
        params,
        curvature=curvature,
        inverse=Damped(damping),
        step_size=GridLineSearch() if step_size is None else step_size,
        average=ExponentialAverage(decay, start) if decay else None,
    )


def engd(
    params: Iterable[Any],
    damping: float = 1e-10,
    decay: float = 0.0,
    start: Start = from_zero,
    step_size: StepSize | None = None,
) -> CurvatureOptimizer:
    """Return energy natural gradient descent with the full Gauss-Newton matrix.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹.
        decay: β of the matrix's moving average; 0 for none.
        start: What the moving average starts from.
        step_size: The step size; the grid line search by default.

    Source: Müller and Zeinhofer 2023.
    """
    return _engd(params, GaussNewton(), damping, decay, start, step_size)


def engd_per_layer(
    params: Iterable[Any],
    damping: float = 1e-10,
    decay: float = 0.0,
    start: Start = from_zero,
    step_size: StepSize | None = None,
) -> CurvatureOptimizer:
    """Return the same with the per-layer diagonal blocks. Arguments as ``engd``."""
    return _engd(params, BlockDiagonalGaussNewton(), damping, decay, start, step_size)


def engd_diagonal(
    params: Iterable[Any],
    damping: float = 1e-6,
    decay: float = 0.0,
    start: Start = from_zero,
    step_size: StepSize | None = None,
) -> CurvatureOptimizer:
    """Return the same with the diagonal. Arguments as ``engd``."""
    return _engd(params, DiagonalGaussNewton(), damping, decay, start, step_size)


def gauss_newton(
    params: Iterable[Any],
    damping: float | None = None,
    use_momentum: bool = True,
    rule: DampingRule | None = None,
    curvature: Curvature | None = None,
) -> CurvatureOptimizer:
    """Return the exact Gauss-Newton method with the quadratic model.

    The default damping does little more than keep the matrix invertible; what keeps the steps
    short is that an update is halved until the loss decreases. On small networks that converges
    much faster than damping adapted by ``LevenbergMarquardt``, which ``rule`` selects. Where the
    records say that steps are shortened by many powers of two, it is the other way round: take
    more damping, or the rule from ``damping=1e-3`` on.

    Args:
        params: Parameters or parameter groups.
        damping: λ, of the first step if it adapts; by default 1e-12 in float64, else 1e-6.
        use_momentum: Whether the quadratic model may take part of the previous update.
        rule: How λ adapts; constant by default.
        curvature: The form of the exact matrix: dense by default. For networks with more parameters
            than residuals, ``GaussNewtonLinearOperator.from_linearizations`` inverts by the kernel.

    Source: Martens and Grosse 2015, section 7, with the exact matrix.
    """
    groups = _kept(params)
    if damping is None:
        damping = _by_dtype(groups, 1e-12, 1e-6)
    return CurvatureOptimizer(
        groups,
        curvature=GaussNewton() if curvature is None else curvature,
        inverse=Damped(damping),
        step_size=QuadraticModel(use_momentum),
        damping=rule,
    )


def _kept(params: Iterable[Any]) -> list[Any]:
    """Return parameters or groups that can be looked at before the optimizer gets them."""
    return [
        {**group, "params": list(group["params"])}
        if isinstance(group, dict) and not isinstance(group["params"], Tensor)
        else group
        for group in params
    ]


def _by_dtype(groups: list[Any], double: float, other: float) -> float:
    """Return the default that suits the dtype of the first parameter."""
    first = groups[0]["params"] if groups and isinstance(groups[0], dict) else groups
    while not isinstance(first, Tensor):
        if isinstance(first, str) or not first:
            return double
        first = first[-1] if isinstance(first, tuple) else first[0]
    return double if first.dtype == torch.float64 else other


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


def gauss_newton_cg(
    params: Iterable[Any],
    damping: float | None = None,
    curvature: Recipe | None = None,
    inverse: InverseRecipe | None = None,
    max_iterations: int = 50,
    rule: DampingRule | None = None,
) -> CurvatureOptimizer:
    """Return the exact Gauss-Newton method by conjugate gradients, preconditioned by KFAC.

    Where there are too many parameters for ``gauss_newton``: no matrix is formed, and each
    iteration of a solve costs about as much as the quadratic model of ``kfac_star``. Any curvature
    can precondition, also one that is no good on its own.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹; by default 1e-8 in float64, else 1e-4.
        curvature: What preconditions; KFAC by default.
        inverse: Its inverse; by default factor damping ``trace_norm`` with the default damping.
        max_iterations: Most products with JᵀJ per step.
        rule: How λ adapts; constant by default.
    """
    groups = _kept(params)
    default = _by_dtype(groups, 1e-8, 1e-4)
    return CurvatureOptimizer(
        groups,
        curvature=GaussNewtonLinearOperator.from_linearizations,
        inverse=PreconditionedCG(
            default if damping is None else damping,
            KFAC() if curvature is None else curvature,
            FactorDamping(default, trace_norm) if inverse is None else inverse,
            max_iterations=max_iterations,
        ),
        step_size=QuadraticModel(),
        damping=rule,
    )


def hessian_free(
    params: Iterable[Any],
    damping: float = 1e-3,
    decay: float = 0.95,
    max_iterations: int = 250,
    curvature: Recipe | None = None,
    inverse: InverseRecipe | None = None,
) -> CurvatureOptimizer:
    """Return the Hessian-free method with Gauss-Newton products.

    Conjugate gradients start from the last solution, stop when the quadratic model falls by less
    than 0.05 % per iteration, and are gone back over while the loss falls. Rejected steps are
    solved again with more damping instead of shortened.

    Args:
        params: Parameters or parameter groups.
        damping: λ of the first step.
        decay: ζ, which part of the last solution a solve starts from.
        max_iterations: Most products with JᵀJ per solve.
        curvature: What preconditions; None for nothing.
        inverse: Its inverse; by default factor damping ``trace_norm``, for KFAC.

    Source: Martens 2010.
    """
    return CurvatureOptimizer(
        params,
        curvature=GaussNewtonLinearOperator.from_linearizations,
        inverse=PreconditionedCG(
            damping,
            curvature,
            FactorDamping(1e-8, trace_norm) if inverse is None else inverse,
            tolerance=1e-10,
            max_iterations=max_iterations,
            stop=RelativeProgress(5e-4),
            spacing=1.3,
        ),
        step_size=CGBacktracking(),
        momentum=WarmStart(decay),
        damping=LevenbergMarquardt(shrink=1.5, grow=1.5, minimum=1e-12),
    )


def engd_w(
    params: Iterable[Any], damping: float | None = None, step_size: StepSize | None = None
) -> CurvatureOptimizer:
    """Return energy natural gradient descent through the kernel, for many parameters.

    The steps are those of ``engd``. They cost the third power of the number of residuals instead
    of that of the number of parameters, so take ``engd`` where there are fewer parameters.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹, positive; by default 1e-10 in float64, else 1e-4.
        step_size: The step size; the grid line search by default.

    Source: Guzman-Cordero et al. 2025 (ENGD-W).
    """
    groups = _kept(params)
    return CurvatureOptimizer(
        groups,
        curvature=GaussNewtonLinearOperator.from_linearizations,
        inverse=Woodbury(_by_dtype(groups, 1e-10, 1e-4) if damping is None else damping),
        step_size=GridLineSearch() if step_size is None else step_size,
    )


def spring(
    params: Iterable[Any],
    damping: float | None = None,
    momentum: float = 0.9,
    step_size: StepSize | None = None,
) -> CurvatureOptimizer:
    """Return SPRING: the steps of ``engd_w`` with momentum through the solve.

    The variant for PINNs also divides the k-th step by √(1 - μ^(2k)), which is not done here.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹, positive; by default 1e-8 in float64, else 1e-4.
        momentum: μ, the part of the last direction that a step starts from.
        step_size: The step size; by default full steps of at most length one.

    Source: Goldshlager, Abrahamsen, Lin 2024 (SPRING); Guzman-Cordero et al. 2025 for PINNs.
    """
    groups = _kept(params)
    return CurvatureOptimizer(
        groups,
        curvature=GaussNewtonLinearOperator.from_linearizations,
        inverse=Woodbury(_by_dtype(groups, 1e-8, 1e-4) if damping is None else damping),
        step_size=NormConstrained(1.0, norm=1.0) if step_size is None else step_size,
        momentum=Spring(momentum) if momentum else None,
    )


def ekfac(
    params: Iterable[Any], damping: float = 1e-6, step_size: StepSize | None = None
) -> CurvatureOptimizer:
    """Return EKFAC, KFAC's eigenbasis with the exact second moments in it.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (C + λI)⁻¹.
        step_size: The step size; the quadratic model by default.

    Source: George et al. 2018.
    """
    return CurvatureOptimizer(
        params,
        curvature=EKFAC(),
        inverse=Damped(damping),
        step_size=QuadraticModel() if step_size is None else step_size,
    )


def subspace_gauss_newton(
    params: Iterable[Any],
    points: int = 200,
    damping: float | None = None,
    seed: int = 0,
    rule: DampingRule | None = None,
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
        rule: How λ adapts; by default it is raised while steps have to be shortened.
    """
    groups = _kept(params)
    return CurvatureOptimizer(
        groups,
        curvature=SubspaceGaussNewton(points, seed),
        inverse=InSubspace(_by_dtype(groups, 1e-8, 1e-4) if damping is None else damping),
        step_size=QuadraticModel(),
        damping=ShortStepDamping(short=2.0**-4, long=0.5, minimum=1e-10) if rule is None else rule,
    )
