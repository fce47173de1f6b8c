"""What the damped inverse of an approximation does: its step, and as a preconditioner."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Generator, Tensor

from experiments.comparing.exact import Exact
from experiments.comparing.operators import Entry
from pinncurv.comparison import (
    cg_records,
    compare_steps,
    condition_number,
)
from pinncurv.linops import PyTorchLinearOperator


@dataclass(frozen=True)
class InverseComparison:
    """What can be said about an approximation P for one damping λ.

    Args:
        decrease_fraction: The decrease of the exact quadratic model along the step, with the best
            step length, as a fraction of that of the exact step.
        step_length: The length of that step over that of the exact one.
        step_cosine: The cosine between the step and the exact one.
        condition_number: Of P⁻¹(G + λI), with P⁻¹ the damped inverse; a lower bound where
            ``condition_is_bound``, infinite for a singular P⁻¹, NaN if it is no matrix.
        condition_is_bound: Whether it is from Lanczos.
        cg_iterations: Of conjugate gradients for the exact step, preconditioned by P⁻¹.
        cg_converged: Whether they reached the tolerance.
    """

    decrease_fraction: float = math.nan
    step_length: float = math.nan
    step_cosine: float = math.nan
    condition_number: float = math.nan
    condition_is_bound: bool = False
    cg_iterations: float = math.nan
    cg_converged: bool = False


def compare_inverses(
    step: Tensor,
    inverse: PyTorchLinearOperator,
    entry: Entry,
    damping: float,
    exact: Exact,
    *,
    lanczos_steps: int,
    cg_tolerance: float,
    cg_limit: int,
) -> InverseComparison:
    """Compare the damped inverse of an approximation with that of the exact matrix.

    Args:
        step: −P⁻¹∇L.
        inverse: P⁻¹.
        entry: Whether it is a matrix, and positive definite.
        damping: λ.
        exact: The exact matrix.
        lanczos_steps: Lanczos steps for the condition number above the limit.
        cg_tolerance: Relative residual norm for conjugate gradients.
        cg_limit: Most iterations.
    """
    best = exact.step(damping)
    steps = compare_steps(exact.operator, damping, exact.gradient, step, best)
    compared = InverseComparison(
        decrease_fraction=steps.decrease_fraction,
        step_length=steps.length,
        step_cosine=steps.cosine,
    )
    if not entry.is_matrix:
        return compared
    if not entry.definite:
        return replace(compared, condition_number=math.inf)
    condition = condition_number(
        exact.operator,
        inverse,
        damping,
        dense=exact.is_dense,
        steps=lanczos_steps,
        generator=Generator().manual_seed(0),
    )
    record = cg_records(
        exact.operator,
        damping,
        exact.gradient,
        {"": inverse},
        tolerance=cg_tolerance,
        max_iterations=cg_limit,
    )[""]
    return replace(
        compared,
        condition_number=condition,
        condition_is_bound=not exact.is_dense,
        cg_iterations=record.iterations,
        cg_converged=record.converged,
    )
