"""All eigenvalues of an operator, and the effective dimension that follows from them."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pinncurv.comparison.checks import check_count, check_finite, check_same_space, check_square
from pinncurv.comparison.estimates import Estimate, rademacher
from pinncurv.comparison.products import apply, symmetric_blocks
from pinncurv.linops import Damped, PyTorchLinearOperator, check_damping


def spectrum(operator: PyTorchLinearOperator) -> Float[Tensor, " D"]:
    """Return all eigenvalues.

    C V = V diag(m)

    Exact and dense: O(D³) time and D² numbers, or those of the largest layer if the operator is
    block diagonal over layers. Eigenvalues of semidefinite operators come as computed, rounding
    below zero included.
    """
    check_square(operator)
    parts = [torch.linalg.eigvalsh(block) for (block,) in symmetric_blocks(operator)]
    return torch.cat(parts).sort(descending=True).values


def effective_dimension(
    eigenvalues: Float[Tensor, " D"], dampings: Sequence[float] | Float[Tensor, " K"]
) -> Float[Tensor, " K"]:
    """Return how many eigenvalues exceed each of several dampings, smoothly counted.

    d(λ) = tr(C (C + λI)⁻¹) = Σ_i m_i / (m_i + λ)
    """
    values = [check_damping(float(damping)) for damping in dampings]
    m = check_finite(eigenvalues.double(), "eigenvalues").clamp(min=0)
    m = m[m > 0]
    return torch.stack([(m / (m + damping)).sum() for damping in values])


def estimate_effective_dimension(
    operator: PyTorchLinearOperator,
    damping: float,
    *,
    vectors: int,
    generator: Generator,
    inverse: PyTorchLinearOperator | None = None,
) -> Estimate:
    """Estimate the effective dimension from products with the damped inverse.

    tr(C (C + λI)⁻¹) = E [zᵀz − λ zᵀ(C + λI)⁻¹z] for random signs z
    """
    damping = check_damping(damping)
    check_count("vectors", vectors, 2)
    if inverse is None:
        inverse = Damped(damping)(operator)
    D = check_same_space(operator, inverse)
    Z = rademacher(D, vectors, generator, operator.device)
    return Estimate.from_samples((Z * (Z - damping * apply(inverse, Z))).sum(0))
