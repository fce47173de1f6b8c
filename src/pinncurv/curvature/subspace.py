"""The exact Gauss-Newton matrix on the span of the residual gradients at a few random points."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pinncurv.curvature.jacobian import JacobianLinearOperator, check_exact
from pinncurv.curvature.kernel import kernel_matrix, rows_of
from pinncurv.curvature.kernel_blocks import Side, add_inner_products_
from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.woodbury import from_data, to_data
from pinncurv.linearization import Chunk, Linearization, run
from pinncurv.linops import (
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    check_damping,
    pivoted_cholesky,
    symmetrize,
)
from pinncurv.linops.tall_svd import tall_svd_
from pinncurv.machine import check_memory, sizes_of


class SubspaceGaussNewtonLinearOperator(SymmetricLinearOperator):
    """The exact Gauss-Newton matrix, compressed to a subspace by an orthogonal projection.

    Ĝ = Q Qᵀ JᵀJ Q Qᵀ = Q diag(σ²) Qᵀ,  Q an orthonormal basis of span {Jᵀe_i : i ∈ sample}

    Where the eigenvalues of JᵀJ decay fast, as they do for PINNs, a sample not much larger than
    the effective dimension tr JᵀJ (JᵀJ + λI)⁻¹ is enough. The basis is never formed: Q = J_mᵀ Y
    with the m sampled rows J_m.

    Cost: for m sampled rows, the R m + m² inner products of rows (see ``KernelLinearOperator``)
    and O(R m²) to build; 2 m S D per product, that is one with JᵀJ at the sampled points; R m + m²
    numbers and Z and G at the sampled points. Inverses cost nothing to build.

    Args:
        linearizations: What J was built from.
        rows: J_m, the sampled rows of the Jacobian.
        basis: Y, with J_mᵀ Y = Q.
        singular_values: σ of J Q, descending.
        images: P, the left singular vectors of J Q = P diag(σ).
    """

    def __init__(
        self,
        linearizations: Sequence[Linearization],
        rows: JacobianLinearOperator,
        basis: Float[Tensor, "m k"],
        singular_values: Float[Tensor, " k"],
        images: Float[Tensor, "R k"],
    ) -> None:
        super().__init__(rows.space.shapes, rows.space.device, rows.space.dtype)
        self.linearizations = linearizations
        self.rows = rows
        self.basis = basis
        self.singular_values = singular_values
        self.images = images

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.spectral(self.singular_values.square(), X)

    def spectral(self, values: Float[Tensor, " k"], X: list[Tensor]) -> list[Tensor]:
        """Return Q diag(values) Qᵀ X."""
        images = to_data(self.rows, X).to(values.dtype)
        return self.combine(values.unsqueeze(-1) * (self.basis.mT @ images))

    def combine(self, coefficients: Float[Tensor, "k K"]) -> list[Tensor]:
        """Return Q c for coefficients c."""
        return from_data(self.rows, (self.basis @ coefficients).to(self.dtype))

    def inverse(self, damping: float) -> SubspaceInverseLinearOperator:
        """Return (Ĝ + λI)⁻¹ for λ > 0, which divides by λ outside of the subspace."""
        return SubspaceInverseLinearOperator(self, damping, 1 / _positive(damping))


class SubspaceInverseLinearOperator(SymmetricLinearOperator):
    """A damped inverse on the subspace, and a multiple of the identity outside of it.

    Q diag(1 / (σ² + λ)) Qᵀ + c (I - Q Qᵀ)

    Cost: that of a product with the compressed matrix, 2 m S D; nothing to build.
    """

    def __init__(
        self, operator: SubspaceGaussNewtonLinearOperator, damping: float, complement: float
    ) -> None:
        super().__init__(operator.shapes, operator.device, operator.dtype)
        self.operator = operator
        self.damping = check_damping(damping)
        self.complement = complement

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        values = 1 / (self.operator.singular_values.square() + self.damping) - self.complement
        inside = self.operator.spectral(values, X)
        if not self.complement:
            return inside
        return [y.add_(x, alpha=self.complement) for y, x in zip(inside, X, strict=True)]


class SubspaceSolverLinearOperator(SubspaceInverseLinearOperator):
    """The damped inverse on the subspace, and zero outside of it.

    Q diag(1 / (σ² + λ)) Qᵀ

    Cost: 2 m S D per product; ``solve_residual`` takes half of that and R m.
    """

    def __init__(self, operator: SubspaceGaussNewtonLinearOperator, damping: float) -> None:
        super().__init__(operator, damping, 0.0)
        self.linearizations = operator.linearizations

    def solve_residual(self, residual: Sequence[Tensor]) -> list[Tensor]:
        """Return argmin of ‖u - J v‖² + λ‖v‖² over the subspace, without forming Jᵀu.

        v = Q diag(σ / (σ² + λ)) Pᵀ u for u of one tensor ``[N_t, V_t]`` per term
        """
        operator = self.operator
        u = torch.cat([part.flatten() for part in residual]).to(operator.images.dtype)
        sigma = operator.singular_values
        coefficients = sigma / (sigma.square() + self.damping) * (operator.images.mT @ u)
        return [part.squeeze(-1) for part in operator.combine(coefficients.unsqueeze(-1))]


def sample_points(numbers: Sequence[int], points: int, seed: int) -> list[Int[Tensor, " m"]]:
    """Draw points without replacement, in proportion to the terms' numbers of points."""
    generator = torch.Generator().manual_seed(seed)
    share = min(1.0, points / sum(numbers))
    return [
        torch.randperm(n, generator=generator)[: max(1, round(share * n))].sort().values
        for n in numbers
    ]


def _whitening(K: Float[Tensor, "m m"], eps: float) -> Float[Tensor, "m k"]:
    """Return T with TᵀKT = I, on the part of K that products in this precision resolve."""
    values, vectors = torch.linalg.eigh(symmetrize(K, "the kernel of the sampled points"))
    kept = values > len(K) * eps * values[-1]
    return vectors[:, kept] / values[kept].sqrt()


def _times_(C: Float[Tensor, "R m"], T: Float[Tensor, "m k"]) -> Float[Tensor, "R k"]:
    """Return C T, which is written over C."""
    k = T.shape[1]
    for rows in C.split(max(1, sizes_of(C.device).held // max(1, len(T)))):
        rows[:, :k] = rows @ T
    return C[:, :k]


def _positive(damping: float) -> float:
    if not check_damping(damping) > 0:
        raise ValueError(
            "The damping of a matrix of low rank must be positive, got 0. Pass damping > 0."
        )
    return damping


def cross_kernel(
    linearizations: Sequence[Linearization],
    samples: Sequence[Linearization],
    space: ParameterSpace,
) -> Float[Tensor, "R m"]:
    """Return J J_mᵀ in float64.

    Raises:
        NotEnoughMemoryError: If it does not fit into the memory.
    """
    right, column = [], 0
    for sample in samples:
        for chunk in sample:
            blocks = space.arrange(sample, chunk)
            right.append(Side.of(column, chunk.residual, blocks, torch.float64))
            column += chunk.residual.numel()
    R = rows_of(linearizations)
    what = f"the inner products of {R:,} residuals with {column:,} sampled ones"
    check_memory(what, R * column, torch.float64, space.device, "Sample fewer points.")
    matrix = torch.zeros(R, column, dtype=torch.float64, device=space.device)
    row = 0

    def visit(t: int, chunk: Chunk) -> None:
        nonlocal row
        blocks = space.arrange(linearizations[t], chunk)
        left = Side.of(row, chunk.residual, blocks, torch.float64)
        row += chunk.residual.numel()
        add_inner_products_(matrix, [(left, other) for other in right])

    run(linearizations, visit)
    return matrix


# Among how many points one is chosen by what the others leave of its gradient.
_CANDIDATES = 5

# A choice of points: at most so many of all terms, by a seed, linearized anew.
Choice = Callable[[Sequence[Linearization], int, int], list[Linearization]]


def uniform_points(
    linearizations: Sequence[Linearization], points: int, seed: int
) -> list[Linearization]:
    """Choose all points alike, of each term in proportion."""
    chosen = sample_points([len(lin.x) for lin in linearizations], points, seed)
    pairs = zip(linearizations, chosen, strict=True)
    return [lin.at(indices.to(lin.x.device)) for lin, indices in pairs]


def pivoted_points(
    linearizations: Sequence[Linearization], points: int, seed: int
) -> list[Linearization]:
    """Choose the points of pivots of the kernel, of five times as many that are drawn alike.

    P(i) ∝ ‖(I - Q Qᵀ) Jᵀe_i‖²,  Q spans the gradients of the pivots before

    That takes as many pivots as points are asked for. Residuals may share a point, and a term that
    matters little may have none.

    Cost: the kernel of five times the points.

    Source: Chen, Epperly, Tropp, Webber 2022 (randomly pivoted Cholesky).
    """
    candidates = uniform_points(linearizations, _CANDIDATES * points, seed)
    K = kernel_matrix(candidates, ParameterSpace.of(linearizations), torch.float64)
    generator = torch.Generator().manual_seed(seed)
    pivots = pivoted_cholesky(K, points, generator).pivots
    chosen, first = [], 0
    for candidate in candidates:
        last = first + len(candidate.x) * candidate.num_components
        mine = pivots[(pivots >= first) & (pivots < last)] - first
        if len(mine):
            chosen.append(candidate.at((mine // candidate.num_components).unique()))
        first = last
    return chosen or candidates  # J = 0 has no pivots


@dataclass(frozen=True)
class SubspaceGaussNewton:
    """Recipe: the exact Gauss-Newton matrix on the gradients of a few random points.

    Q Qᵀ JᵀJ Q Qᵀ

    An optimizer draws other points in every step. Cost: see ``SubspaceGaussNewtonLinearOperator``.

    Args:
        points: How many points to sample.
        seed: Which points.
        choice: How to choose them: ``uniform_points`` or ``pivoted_points``.
    """

    points: int = 100
    seed: int = 0
    choice: Choice = uniform_points

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"The number of sampled points must be at least 1, got {self.points}.")

    def at_step(self, step: int) -> SubspaceGaussNewton:
        """Return the recipe that draws the points of one step."""
        return replace(self, seed=self.seed + step)

    def __call__(
        self, linearizations: Sequence[Linearization], space: ParameterSpace | None = None
    ) -> SubspaceGaussNewtonLinearOperator:
        """Build the operator.

        Args:
            linearizations: One per term, with the exact output gradients.
            space: The parameters; by default those of the terms.

        Raises:
            ValueError: If a linearization has other output gradients than the exact ones.
        """
        check_exact(linearizations)
        space = ParameterSpace.of(linearizations) if space is None else space
        samples = self.choice(linearizations, self.points, self.seed)
        K = kernel_matrix(samples, space, torch.float64)
        T = _whitening(K, torch.finfo(space.dtype).eps)
        images = _times_(cross_kernel(linearizations, samples, space), T)
        P, sigma, Wt = tall_svd_(images)
        return SubspaceGaussNewtonLinearOperator(
            linearizations, JacobianLinearOperator(samples, space), T @ Wt.mT, sigma, P
        )


@dataclass(frozen=True)
class InSubspace:
    """The damped inverse on the subspace, and zero outside of it.

    Q diag(1 / (σ² + λ)) Qᵀ

    Its step is the exact minimizer of the damped quadratic model in the subspace. Cost: see
    ``SubspaceSolverLinearOperator``.

    Args:
        damping: λ, a finite number > 0 when it is applied.
    """

    damping: float

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> SubspaceSolverLinearOperator:
        """Return the inverse.

        Raises:
            TypeError: If the operator is no ``SubspaceGaussNewtonLinearOperator``.
        """
        return SubspaceSolverLinearOperator(_checked(operator, self), _positive(self.damping))


@dataclass(frozen=True)
class Deflated:
    """The damped inverse on the subspace, and outside of it that of its smallest eigenvalue.

    Q diag(1 / (σ² + λ)) Qᵀ + (I - Q Qᵀ) / (σ_min² + λ)

    A preconditioner of JᵀJ + λI, which is better known to be small outside than to be zero. Cost:
    see ``SubspaceInverseLinearOperator``.

    Args:
        damping: λ, a finite number > 0 when it is applied.

    Source: Frangella, Tropp, Udell 2023, section 5.
    """

    damping: float

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> SubspaceInverseLinearOperator:
        """Return the preconditioner.

        Raises:
            TypeError: If the operator is no ``SubspaceGaussNewtonLinearOperator``.
        """
        subspace, damping = _checked(operator, self), _positive(self.damping)
        sigma = subspace.singular_values
        smallest = float(sigma[-1]) ** 2 if len(sigma) else 0.0
        return SubspaceInverseLinearOperator(subspace, damping, 1 / (smallest + damping))


def _checked(
    operator: PyTorchLinearOperator, inverse: InSubspace | Deflated
) -> SubspaceGaussNewtonLinearOperator:
    if not isinstance(operator, SubspaceGaussNewtonLinearOperator):
        raise TypeError(
            f"{type(inverse).__name__} must be given a SubspaceGaussNewtonLinearOperator, got "
            f"{type(operator).__name__}. Use Damped(damping), or curvature=SubspaceGaussNewton()."
        )
    return operator
