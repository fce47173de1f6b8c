"""Methods that go through the kernel JJᵀ, for many parameters."""

from collections.abc import Iterable
from typing import Any

from pinncurv.curvature import MatrixFreeGaussNewton, Woodbury
from pinncurv.optim import (
    CurvatureOptimizer,
    DampingRule,
    GridLineSearch,
    NormConstrained,
    Spring,
    StepSize,
)
from pinncurv.presets.precision import adapting, default_damping, groups_of


def engd_w(
    params: Iterable[Any],
    damping: float | None = None,
    step_size: StepSize | None = None,
    damping_rule: DampingRule | None = None,
    single: bool = False,
) -> CurvatureOptimizer:
    """Return energy natural gradient descent through the kernel, for many parameters.

    The steps are those of ``engd``. They cost the third power of the number of residuals instead
    of that of the number of parameters, so take ``engd`` where there are fewer parameters.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹, positive and constant; by default it starts at 1e-10 in float64,
            else 1e-4, as with ``single``.
        step_size: The step size; the grid line search by default.
        damping_rule: How λ adapts. By default it is constant, as published, if it is given, else
            raised while steps have to be shortened.
        single: Whether the kernel is formed in float32, see ``MatrixFreeGaussNewton``.

    Source: Guzman-Cordero et al. 2025 (ENGD-W).
    """
    groups = groups_of(params)
    number, rule = adapting(damping, default_damping(groups, 1e-10, single), damping_rule)
    return CurvatureOptimizer(
        groups,
        curvature=MatrixFreeGaussNewton(single),
        inverse=Woodbury(number),
        step_size=GridLineSearch() if step_size is None else step_size,
        damping_rule=rule,
    )


def spring(
    params: Iterable[Any],
    damping: float | None = None,
    momentum: float = 0.9,
    step_size: StepSize | None = None,
    damping_rule: DampingRule | None = None,
    single: bool = False,
) -> CurvatureOptimizer:
    """Return SPRING: the steps of ``engd_w`` with momentum through the solve.

    The variant for PINNs also divides the k-th step by √(1 - μ^(2k)), which is not done here.

    Args:
        params: Parameters or parameter groups.
        damping: λ of (JᵀJ + λI)⁻¹, positive and constant; by default it starts at 1e-8 in float64,
            else 1e-4, as with ``single``.
        momentum: μ, the part of the last direction that a step starts from.
        step_size: The step size; by default full steps of at most length one.
        damping_rule: How λ adapts. By default it is constant, as published, if it is given, else
            raised while steps have to be shortened.
        single: Whether the kernel is formed in float32, see ``MatrixFreeGaussNewton``.

    Source: Goldshlager, Abrahamsen, Lin 2024 (SPRING); Guzman-Cordero et al. 2025 for PINNs.
    """
    groups = groups_of(params)
    number, rule = adapting(damping, default_damping(groups, 1e-8, single), damping_rule)
    return CurvatureOptimizer(
        groups,
        curvature=MatrixFreeGaussNewton(single),
        inverse=Woodbury(number),
        step_size=NormConstrained(1.0, norm=1.0) if step_size is None else step_size,
        momentum=Spring(momentum) if momentum else None,
        damping_rule=rule,
    )
