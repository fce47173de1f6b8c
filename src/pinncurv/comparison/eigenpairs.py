"""Eigenpairs at either end of the spectrum, matrix-free."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pinncurv.comparison.checks import check_count, check_same_space, check_square, describe
from pinncurv.comparison.products import apply
from pinncurv.linops import Damped, PyTorchLinearOperator, check_damping

# A few vectors more than eigenpairs: what converges is then separated from what is cut off.
_OVERSAMPLING = 5


class EigenpairsNotConverged(UserWarning):
    """A Krylov space reached its largest dimension before the residuals were small."""


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric operator C and how exact they are.

    C V ≈ V diag(m)

    Attributes:
        values: m, from the extreme end inwards ``[k]``.
        vectors: V, orthonormal columns ``[D, k]``.
        residual_norms: ‖C v − m v‖ of each pair ``[k]``, in units of C. Some eigenvalue lies
            within that distance of m.
        products: Number of products with an operator (with its inverse for the small end).
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "D k"]
    residual_norms: Float[Tensor, " k"]
    products: int


def largest_eigenpairs(
    operator: PyTorchLinearOperator,
    k: int,
    *,
    generator: Generator,
    tolerance: float | None = None,
    max_basis: int | None = None,
) -> Eigenpairs:
    """Return the k largest eigenvalues, with multiplicity, and their eigenvectors.

    Rayleigh-Ritz on the block Krylov space span{S, C S, C² S, ...} of a random S with a few more
    columns than k, fully orthogonalized. A block finds the copies of a multiple eigenvalue. The
    ``tolerance``, by default ε^(2/3) of the operator's data type (4e-11 in float64), bounds
    ‖C v − m v‖ relative to the largest |m| that is found. The space has at most ``max_basis``
    dimensions, by default 50 (k + 5), and takes twice as many vectors of memory; where that is not
    enough there is a warning, ``EigenpairsNotConverged``.
    """
    D = check_square(operator)
    check_count("k", k, 1, D)
    block = min(k + _OVERSAMPLING, D)
    limit = 50 * block if max_basis is None else check_count("max_basis", max_basis, block)
    limit = min(D, limit)
    if tolerance is None:
        tolerance = torch.finfo(operator.dtype).eps ** (2 / 3)

    def draw(count: int) -> Tensor:
        numbers = torch.randn(D, count, generator=generator, device=generator.device)
        return numbers.to(operator.device, torch.float64)

    basis = images = torch.empty(D, 0, dtype=torch.float64, device=operator.device)
    new = draw(block)
    while True:
        new = _orthonormal_complement(basis, new, draw)
        basis, images = torch.cat([basis, new], 1), torch.cat([images, apply(operator, new)], 1)
        pairs = _rayleigh_ritz(basis, images, k)
        worst = (pairs.residual_norms.max() / pairs.values.abs().max().clamp(min=1e-300)).item()
        width = min(block, limit - basis.shape[1])
        if worst <= tolerance or width == 0:
            break
        new = images[:, -block:][:, :width]
    if worst > tolerance and limit < D:
        warnings.warn(
            f"The eigenpairs must reach a relative residual of {tolerance:.1e}, reached "
            f"{worst:.1e} on a Krylov space of dimension {limit}. Raise max_basis or tolerance.",
            EigenpairsNotConverged,
            stacklevel=2,
        )
    return pairs


def _rayleigh_ritz(basis: Tensor, images: Tensor, k: int) -> Eigenpairs:
    """The k largest eigenpairs of the operator on the span of an orthonormal basis."""
    projected = basis.mT @ images
    values, S = torch.linalg.eigh((projected + projected.mT) / 2)
    values, S = values.flip(0)[:k], S.flip(1)[:, :k]
    vectors = basis @ S
    residuals = (images @ S - vectors * values).norm(dim=0)
    return Eigenpairs(values, vectors, residuals, basis.shape[1])


def _orthonormal_complement(basis: Tensor, block: Tensor, draw: Callable[[int], Tensor]) -> Tensor:
    """As many orthonormal vectors, orthogonal to a basis; random ones where the block adds none."""
    size = block.norm()
    block = block - basis @ (basis.mT @ block)
    left, singular, _ = torch.linalg.svd(block, full_matrices=False)
    adds = singular > 1e-13 * size
    block = torch.where(adds, left, draw(len(singular)))
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block


def smallest_eigenpairs(
    operator: PyTorchLinearOperator,
    k: int,
    damping: float,
    *,
    generator: Generator,
    inverse: PyTorchLinearOperator | None = None,
    tolerance: float | None = None,
    max_basis: int | None = None,
) -> Eigenpairs:
    """Return the k smallest eigenvalues, with multiplicity, and their eigenvectors.

    m = 1/μ − λ for the largest eigenvalues μ of (C + λI)⁻¹

    Eigenvalues are found to an absolute error of about (m + λ) times the error of the inverse;
    a damping of the size of the eigenvalues that are of interest resolves them best. For tolerance
    and ``max_basis``, which are those of the inverse, see ``largest_eigenpairs``.
    """
    damping = check_damping(damping)
    if inverse is None:
        inverse = Damped(damping)(operator)
    check_same_space(operator, inverse)
    pairs = largest_eigenpairs(
        inverse, k, generator=generator, tolerance=tolerance, max_basis=max_basis
    )
    if not bool((pairs.values > 0).all()):
        raise ValueError(
            f"The inverse must be positive definite, got {describe(inverse)} with an "
            f"eigenvalue {pairs.values.min().item():.1e}. Raise the damping."
        )
    values = 1 / pairs.values - damping
    residuals = (apply(operator, pairs.vectors) - pairs.vectors * values).norm(dim=0)
    return Eigenpairs(values, pairs.vectors, residuals, pairs.products)
