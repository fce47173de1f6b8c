"""KFAC and its relatives."""

from collections.abc import Iterable
from typing import Any

from pinncurv.curvature import EKFAC, KFAC, WeightSharing, expand
from pinncurv.linops import Damped, FactorDamping, same
from pinncurv.linops.factor_damping import Heuristic
from pinncurv.optim import (
    CurvatureOptimizer,
    ExponentialAverage,
    GridLineSearch,
    HeavyBall,
    QuadraticModel,
    Start,
    StepSize,
    from_identity,
)


def kfac(
    params: Iterable[Any],
    damping: float = 1e-8,
    decay: float = 0.95,
    momentum: float = 0.75,
    start: Start = from_identity,
    sharing: WeightSharing = expand,
    heuristic: Heuristic = same,
    single: bool = False,
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
        single: Whether the factors are formed in float32, see ``KFAC``.

    Source: Dangel, Müller, Zeinhofer 2024, section 3.3.
    """
    return CurvatureOptimizer(
        params,
        curvature=KFAC(sharing, single=single),
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
    single: bool = False,
) -> CurvatureOptimizer:
    """Return KFAC*, which takes step size and momentum from the exact quadratic model.

    Arguments as ``kfac``.

    Source: Dangel, Müller, Zeinhofer 2024, section 3.3; Martens and Grosse 2015, section 7.
    """
    return CurvatureOptimizer(
        params,
        curvature=KFAC(sharing, single=single),
        inverse=FactorDamping(damping, heuristic),
        step_size=QuadraticModel(),
        average=ExponentialAverage(decay, start),
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
