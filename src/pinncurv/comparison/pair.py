"""What is usually asked of one approximation of one operator, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from pinncurv.comparison.checks import check_same_space
from pinncurv.comparison.estimates import Estimate
from pinncurv.comparison.frobenius import frobenius
from pinncurv.comparison.frobenius_estimates import estimate_frobenius
from pinncurv.comparison.generalized import condition_number
from pinncurv.comparison.products import apply, flat_vector, to_dense
from pinncurv.comparison.steps import StepComparison, cg_records, compare_steps
from pinncurv.linops import (
    CGInverseLinearOperator,
    CGRecord,
    Damped,
    DenseLinearOperator,
    PyTorchLinearOperator,
)


@dataclass(frozen=True)
class Comparison:
    """How an approximation P compares with an operator C, as a matrix and as a preconditioner.

    Attributes:
        cosine: ⟨P, C⟩ / (‖P‖ ‖C‖), with a standard error of 0 where it is exact.
        relative_error: ‖P − C‖ / ‖C‖, likewise.
        step: The step of (P + λI)⁻¹ against that of (C + λI)⁻¹.
        condition_number: Of (P + λI)⁻¹(C + λI).
        condition_is_bound: Whether that is a lower bound, from Lanczos.
        cg: Conjugate gradients for the step of C, preconditioned by (P + λI)⁻¹.
    """

    cosine: Estimate
    relative_error: Estimate
    step: StepComparison
    condition_number: float
    condition_is_bound: bool
    cg: CGRecord


def compare(
    approximation: PyTorchLinearOperator,
    operator: PyTorchLinearOperator,
    gradient: Tensor | Sequence[Tensor],
    damping: float,
    *,
    inverse: PyTorchLinearOperator | None = None,
    dense_limit: int = 1024,
    probes: int = 32,
    lanczos_steps: int = 60,
    cg_tolerance: float = 1e-3,
    cg_limit: int = 500,
    generator: Generator | None = None,
) -> Comparison:
    """Compare any two operators, exactly if they are small, else by random probes.

    Args:
        approximation: P, symmetric positive semidefinite.
        operator: C, symmetric positive semidefinite.
        gradient: g ``[D]``, or a list of tensors in parameter order.
        damping: λ, a finite number >= 0, positive if an operator is singular.
        inverse: Another positive definite P⁻¹ than (P + λI)⁻¹, such as one by factor damping.
        dense_limit: Largest D for which D x D matrices are formed, at a cost of D³.
        probes: Random probes above that, and half as many vectors in a sketch.
        lanczos_steps: Lanczos steps for the condition number above that.
        cg_tolerance: Relative norm of the residual that conjugate gradients must reach.
        cg_limit: Most iterations of conjugate gradients.
        generator: Source of randomness above the limit; by default a new one with seed 0.
    """
    is_dense = check_same_space(approximation, operator) <= dense_limit
    random = Generator().manual_seed(0) if generator is None else generator
    inverse = _inverse(approximation, damping, is_dense) if inverse is None else inverse
    g = flat_vector(gradient, operator, "gradient")
    if not bool(g.any()):
        raise ValueError("The gradient must not be zero, there is nothing to decrease.")
    step, best = apply(inverse, -g), apply(_inverse(operator, damping, is_dense), -g)
    if is_dense:
        exact = frobenius(approximation, operator)
        zero = torch.zeros_like(exact.cosine)
        cosine, error = Estimate(exact.cosine, zero), Estimate(exact.relative_error, zero)
    else:
        estimate = estimate_frobenius(
            approximation, operator, vectors=probes, sketch=probes // 2, generator=random
        )
        cosine, error = estimate.cosine, estimate.relative_error
    condition = condition_number(
        operator, inverse, damping, dense=is_dense, steps=lanczos_steps, generator=random
    )
    solves = cg_records(
        operator, damping, g, {"": inverse}, tolerance=cg_tolerance, max_iterations=cg_limit
    )
    return Comparison(
        cosine=cosine,
        relative_error=error,
        step=compare_steps(operator, damping, g, step, best),
        condition_number=condition,
        condition_is_bound=not is_dense,
        cg=solves[""],
    )


def _inverse(
    operator: PyTorchLinearOperator, damping: float, is_dense: bool
) -> PyTorchLinearOperator:
    """Return (C + λI)⁻¹, from the matrix where CG would be what else there is."""
    inverse = Damped(damping)(operator)
    if is_dense and isinstance(inverse, CGInverseLinearOperator):
        matrix = DenseLinearOperator(to_dense(operator), operator._in_shape)
        return matrix.inverse(damping)
    return inverse
