"""The known methods: a few lines each, as a user would compose them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    WeightSharing,
    expand,
)
from pinncurv.linops import Damped, FactorDamping
from pinncurv.linops.factor_damping import Heuristic, same
from pinncurv.optim import (
    Curvature,
    CurvatureOptimizer,
    DampingRule,
    ExponentialAverage,
    GridLineSearch,
    HeavyBall,
    QuadraticModel,
    StepSize,
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

    Source: Martens and Grosse 2015, section 7, with the exact matrix.
    """
    groups = list(params)
    if damping is None:
        first = groups[0]["params"] if isinstance(groups[0], dict) else groups[0]
        dtype = (first if isinstance(first, Tensor) else next(iter(first))).dtype
        damping = 1e-12 if dtype == torch.float64 else 1e-6
    return CurvatureOptimizer(
        groups,
        curvature=GaussNewton(),
        inverse=Damped(damping),
        step_size=QuadraticModel(use_momentum),
        damping=rule,
    )
