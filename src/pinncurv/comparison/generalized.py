"""How well an inverse preconditions a damped operator: eigenvalues of P⁻¹(C + λI)."""

from dataclasses import dataclass
from math import inf

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pinncurv.comparison.checks import check_same_space, describe
from pinncurv.comparison.estimates import rademacher
from pinncurv.comparison.lanczos import lanczos
from pinncurv.comparison.products import symmetric_blocks
from pinncurv.linops import PyTorchLinearOperator, check_damping, eigh

# Negative eigenvalues, relative to the largest, that rounding doesn't explain.
_INDEFINITE = 1e-6


def generalized_spectrum(
    operator: PyTorchLinearOperator, inverse: PyTorchLinearOperator, damping: float
) -> Float[Tensor, " D"]:
    """Return all eigenvalues of a preconditioned operator.

    P⁻¹(C + λI), from the symmetric form HᵀP⁻¹H with C + λI = H Hᵀ

    All are 1 if P = C + λI. Exact and dense: O(D³) time and a few D² numbers, or those of the
    largest layer if both operators are block diagonal over the same layers.
    """
    check_same_space(operator, inverse)
    damping = check_damping(damping)
    parts = []
    for C, W in symmetric_blocks(operator, inverse):
        factorization = eigh(C, describe(operator))
        H = factorization.eigenvectors * (factorization.eigenvalues + damping).sqrt()
        congruent = H.mT @ W @ H
        parts.append(torch.linalg.eigvalsh((congruent + congruent.mT) / 2))
    values = torch.cat(parts).sort(descending=True).values
    if bool(values[-1] < -_INDEFINITE * values[0].abs()):
        raise ValueError(
            f"The inverse must be positive definite, but {describe(inverse)} leads to generalized "
            f"eigenvalues in [{values[-1].item():.1e}, {values[0].item():.1e}]. "
            "Raise its damping."
        )
    return values


@dataclass(frozen=True)
class ExtremeEigenvalues:
    """The ends of a positive spectrum, from the inside.

    m_min ≤ smallest,  largest ≤ m_max

    Attributes:
        smallest: Smallest Ritz value, an upper bound on the smallest eigenvalue.
        largest: Largest Ritz value, a lower bound on the largest eigenvalue.
        smallest_error: An eigenvalue lies within that distance of ``smallest``.
        largest_error: An eigenvalue lies within that distance of ``largest``.
        products: Number of products with the operator.
    """

    smallest: float
    largest: float
    smallest_error: float
    largest_error: float
    products: int

    @property
    def condition_number(self) -> float:
        """largest / smallest, a lower bound on the condition number; inf if not positive."""
        return self.largest / self.smallest if self.smallest > 0 else inf


def generalized_extremes(
    operator: PyTorchLinearOperator,
    inverse: PyTorchLinearOperator | None,
    damping: float,
    *,
    steps: int,
    generator: Generator,
) -> ExtremeEigenvalues:
    """Estimate the extreme eigenvalues of a preconditioned operator, matrix-free.

    P⁻¹(C + λI), by the Lanczos process that is symmetric in the P inner product

    Each step is a product with C and one with P⁻¹, which is the identity if ``None``.
    """
    start = rademacher(operator.shape[1], 1, generator, operator.device)[:, 0]
    decomposition = lanczos(operator, start, steps, damping=damping, preconditioner=inverse)
    ritz = decomposition.ritz()
    return ExtremeEigenvalues(
        smallest=ritz.values[-1].item(),
        largest=ritz.values[0].item(),
        smallest_error=ritz.errors[-1].item(),
        largest_error=ritz.errors[0].item(),
        products=len(ritz.values),
    )


def condition_number(
    operator: PyTorchLinearOperator,
    inverse: PyTorchLinearOperator,
    damping: float,
    *,
    dense: bool,
    steps: int,
    generator: Generator,
) -> float:
    """Return the condition number if ``dense``, or a lower bound from so many Lanczos steps.

    m_max / m_min of P⁻¹(C + λI), inf if m_min is not positive
    """
    if dense:
        values = generalized_spectrum(operator, inverse, damping)
        return (values[0] / values[-1]).item() if values[-1] > 0 else inf
    return generalized_extremes(
        operator, inverse, damping, steps=steps, generator=generator
    ).condition_number
