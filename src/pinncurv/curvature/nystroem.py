"""The kernel sketched by a randomized Nyström approximation, and the Gauss-Newton inverse by it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.woodbury import check_positive, from_data, kernel_of, to_data
from pinncurv.linops import (
    FactorizationReport,
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    check_damping,
    factorize,
    symmetrize,
)
from pinncurv.linops.psd import FACTORIZATION_DTYPE
from pinncurv.machine import check_memory, sizes_of


@dataclass(frozen=True, eq=False)
class NystroemSketch:
    """A low-rank approximation K̂ of a positive semidefinite matrix K, in float64.

    K̂ = KΩ (ΩᵀKΩ)⁺ ΩᵀK = U diag(Λ) Uᵀ,  0 ≤ K̂ ≤ K

    Args:
        U: Orthonormal columns ``[R, m]``.
        eigenvalues: Λ, descending.
        E: Combinations of the columns of Ω with EᵀKE = I up to the shift ν, so that K E = U Λ^½.
        report: How ΩᵀKΩ was factorized.
    """

    U: Float[Tensor, "R m"]
    eigenvalues: Float[Tensor, " m"]
    E: Float[Tensor, "R m"]
    report: FactorizationReport


def nystroem_sketch(operator: PyTorchLinearOperator, rank: int, seed: int) -> NystroemSketch:
    """Approximate a positive semidefinite operator from its products with random vectors.

    Y = KΩ + νΩ,  ΩᵀY = CᵀC,  Y C⁻¹ = U Σ Vᵀ,  Λ = max(Σ² - ν, 0),  E = Ω C⁻¹ V

    The shift ν is the rounding error of the products. Ω is drawn on the CPU from a generator of its
    own: it depends on the seed, the size and the rank alone.

    K has R rows, and ``rank`` m is the number of products; R if that is less.

    Raises:
        ValueError: If the rank is less than one.
        FactorizationError: If a product is not finite.

    Source: Frangella, Tropp, Udell 2023, algorithm 2.1.
    """
    R, device = operator.shape[0], operator.device
    m = min(_check_rank(rank), R)
    instead = "Take a smaller rank, fewer points, or PreconditionedCG(damping)."
    check_memory(f"a sketch of rank {m:,}", 3 * R * m, FACTORIZATION_DTYPE, device, instead)
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn(R, m, generator=generator, dtype=torch.float64)
    omega = torch.linalg.qr(omega).Q.to(device, FACTORIZATION_DTYPE)
    Y = _products(operator, omega)
    nu = float(torch.finfo(operator.dtype).eps * torch.linalg.matrix_norm(Y))
    Y = Y.add_(omega, alpha=nu)
    name = "the sketched kernel"
    factorization = factorize(symmetrize(omega.mT @ Y, name), name, nu)
    U, singular, Vh = torch.linalg.svd(factorization.whiten(Y.mT).mT, full_matrices=False)
    E = omega @ factorization.whiten_adjoint(Vh.mT)
    return NystroemSketch(U, (singular.square() - nu).clamp(min=0), E, factorization.report)


def _products(operator: PyTorchLinearOperator, omega: Tensor) -> Tensor:
    """Return K Ω in float64, a few columns at a time."""
    jacobian = getattr(operator, "jacobian", None) or operator
    step = max(1, sizes_of(operator.device).held // max(jacobian.shape))
    columns = omega.to(operator.dtype).split(step, 1)
    return torch.cat([operator @ block for block in columns], 1).to(omega.dtype)


def _check_rank(rank: int) -> int:
    if rank < 1:
        raise ValueError(f"The rank of a sketch must be at least 1, got {rank}.")
    return rank


class SketchedInverseLinearOperator(SymmetricLinearOperator):
    """The damped inverse of the Gauss-Newton matrix of a sketched Jacobian, by Woodbury.

    (ĴᵀĴ + λI)⁻¹,  Ĵ = J P = U Λ^½ Qᵀ,  P = Q Qᵀ projects on the range of JᵀΩ,  ĴĴᵀ = K̂

    Putting the sketched K̂ beside the exact J in Woodbury's formula would give an indefinite
    matrix; with Ĵ in both places the formula is exact, and the inverse positive definite. Q = JᵀE
    is never held.

    Cost: two products with J and its transpose per product, one in ``solve_residual``, and 2 R m
    for the sketch of rank m, whose 2 R m numbers are held.

    Args:
        jacobian: The Jacobian of the scaled residuals.
        sketch: The sketch of its kernel.
        damping: λ > 0.
        complement: Whether ``solve_residual``, and it alone, keeps what K̂ does not see.
    """

    def __init__(
        self,
        jacobian: JacobianLinearOperator,
        sketch: NystroemSketch,
        damping: float,
        complement: bool = False,
    ) -> None:
        self.damping = check_positive(damping, jacobian)
        self.jacobian, self.linearizations = jacobian, jacobian.linearizations
        self.sketch = sketch
        self.complement = complement
        self.reports = (sketch.report,)
        super().__init__(jacobian.space.shapes, jacobian.device, jacobian.dtype)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        E, eigenvalues = self.sketch.E, self.sketch.eigenvalues.unsqueeze(-1)
        filtered = eigenvalues / (eigenvalues + self.damping)
        y = E @ (filtered * (E.mT @ to_data(self.jacobian, X).to(E.dtype)))
        taken = from_data(self.jacobian, y.to(self.dtype))
        return [(x - part) / self.damping for x, part in zip(X, taken, strict=True)]

    def solve_residual(self, residual: Sequence[Tensor]) -> list[Tensor]:
        """Return the minimizer of ‖u - Ĵ x‖² + λ‖x‖², or the published approximation of it.

        (ĴᵀĴ + λI)⁻¹ Ĵᵀ u,  with the complement  Jᵀ (K̂ + λI)⁻¹ u

        What K̂ does not see of u, the second divides by λ, which is better or much worse than to
        leave it out, depending on whether λ is above or below what K̂ misses of K.
        """
        U, E, eigenvalues = self.sketch.U, self.sketch.E, self.sketch.eigenvalues
        u = torch.cat([part.flatten() for part in residual]).to(U.dtype)
        seen = U.mT @ u
        if self.complement:
            y = U @ (seen / (eigenvalues + self.damping)) + (u - U @ seen) / self.damping
        else:
            y = E @ (seen * eigenvalues.sqrt() / (eigenvalues + self.damping))
        x = from_data(self.jacobian, y.to(self.dtype).unsqueeze(-1))
        return [part.squeeze(-1) for part in x]


@dataclass(frozen=True)
class Nystroem:
    """Inverse recipe: the Gauss-Newton inverse through a sketch of the kernel.

    JᵀJ ↦ (ĴᵀĴ + λI)⁻¹,  Ĵ = J P of the given rank

    Cost: m products with the kernel, 2 m N S V D, and O(R m²); 2 R m numbers. That is less than
    ``Woodbury`` where R is a hundred times m. The sketch needs no state: every step draws the same
    Ω from the seed. Use it without an average and with intervals of one, such that the optimizer
    steps by ``solve_residual``.

    Args:
        damping: λ, a finite number > 0 when it is applied.
        rank: m, the rank of the sketch.
        seed: Of the random vectors.
        complement: Whether steps keep what the sketch does not see, as published.

    Source: Guzman-Cordero et al. 2025; Frangella, Tropp, Udell 2023.
    """

    damping: float
    rank: int
    seed: int = 0
    complement: bool = False

    def __post_init__(self) -> None:
        check_damping(self.damping)
        _check_rank(self.rank)

    def __call__(self, operator: PyTorchLinearOperator) -> SketchedInverseLinearOperator:
        """Return the inverse of a ``GaussNewtonLinearOperator``.

        Raises:
            TypeError: If the operator is another one.
            FactorizationError: If the damping is zero.
        """
        kernel = kernel_of(operator, self)
        check_positive(self.damping, kernel.jacobian)
        sketch = nystroem_sketch(kernel, self.rank, self.seed)
        return SketchedInverseLinearOperator(kernel.jacobian, sketch, self.damping, self.complement)
