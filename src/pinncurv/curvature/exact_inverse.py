"""The damped inverse of the exact Gauss-Newton matrix on the cheaper side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.gauss_newton import GaussNewtonLinearOperator
from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.subspace import Deflated, SubspaceGaussNewton, pivoted_points
from pinncurv.curvature.woodbury import (
    KernelInverseLinearOperator,
    check_positive,
    from_data,
    kernel_of,
    refined,
    to_data,
)
from pinncurv.linearization import Linearization
from pinncurv.linops import (
    CGInverseLinearOperator,
    DiagonalLinearOperator,
    Factorization,
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    check_damping,
    factorize_from,
    policy,
)
from pinncurv.linops.psd import FACTORIZATION_DTYPE, check_entries

# Points of the subspace that preconditions where both sides are larger.
_COARSE_POINTS = 200


class ParameterInverseLinearOperator(SymmetricLinearOperator):
    """The damped inverse of the Gauss-Newton matrix by a factorization of it, refined.

    (JᵀJ + λI)⁻¹ = S + S (I - (JᵀJ + λI) S),  S what the factorization applies

    JᵀJ holds no singular value of J below √(ε ‖JᵀJ‖). One step of iterative refinement, whose
    residual is formed by products with J, brings the error of the factorization down, as for
    ``KernelInverseLinearOperator``.

    Cost: a product takes 4 D² and two products with J or its transpose.

    Args:
        jacobian: The Jacobian of the scaled residuals.
        factorization: The factorization of JᵀJ + λI.
        damping: λ > 0.
    """

    def __init__(
        self, jacobian: JacobianLinearOperator, factorization: Factorization, damping: float
    ) -> None:
        self.jacobian = jacobian
        self.factorization = factorization
        self.damping = check_positive(damping, jacobian)
        self.reports = (factorization.report,)
        super().__init__(jacobian.space.shapes, jacobian.device, jacobian.dtype)

    @property
    def linearizations(self) -> Sequence[Linearization]:
        """What the Jacobian was built from."""
        return self.jacobian.linearizations

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        right = _joined(X)
        y = self._solve(right)
        product = _joined(from_data(self.jacobian, to_data(self.jacobian, self._parts(y))))
        return self._parts(refined(y, self._solve(right - product - self.damping * y)))

    def solve_residual(self, residual: Sequence[Tensor]) -> list[Tensor]:
        """Return (JᵀJ + λI)⁻¹ Jᵀ u, refined by Jᵀ(u - J y) - λy, which loses fewer digits.

        Args:
            residual: u, one tensor ``[N_t, V_t]`` per term.
        """
        u = torch.cat([part.flatten() for part in residual]).unsqueeze(-1)
        y = self._solve(_joined(from_data(self.jacobian, u)))
        rest = u - to_data(self.jacobian, self._parts(y))
        error = _joined(from_data(self.jacobian, rest)) - self.damping * y
        return [part.squeeze(-1) for part in self._parts(refined(y, self._solve(error)))]

    def _solve(self, y: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        return self.factorization.solve(y.to(self.factorization.dtype)).to(self.dtype)

    def _parts(self, flat: Float[Tensor, "D k"]) -> list[Tensor]:
        pieces = zip(flat.split(self._in_shape_flat), self._in_shape, strict=True)
        return [piece.reshape(*shape, flat.shape[1]) for piece, shape in pieces]


def _joined(X: Sequence[Tensor]) -> Float[Tensor, "D k"]:
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in X])


class JacobiInverseLinearOperator(SymmetricLinearOperator):
    """A damped inverse in other units of the parameters, in which it is that of J S.

    (JᵀJ + λ S⁻²)⁻¹ = S ((J S)ᵀ J S + λI)⁻¹ S

    Cost: that of the inverse that is given.

    Args:
        scaled: ((J S)ᵀ J S + λI)⁻¹.
        scale: The diagonal of S, one tensor per parameter.
    """

    def __init__(
        self,
        scaled: KernelInverseLinearOperator | ParameterInverseLinearOperator,
        scale: Sequence[Tensor],
    ) -> None:
        super().__init__(scaled.shapes, scaled.device, scaled.dtype)
        self.scaled, self.scale = scaled, scale
        self.damping, self.reports = scaled.damping, scaled.reports
        self.linearizations = scaled.linearizations

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        right = [s[..., None] * x for s, x in zip(self.scale, X, strict=True)]
        solution = self.scaled._matmat(right)
        return [y.mul_(s[..., None]) for s, y in zip(self.scale, solution, strict=True)]

    def solve_residual(self, residual: Sequence[Tensor]) -> list[Tensor]:
        """Return (JᵀJ + λ S⁻²)⁻¹ Jᵀ u."""
        solution = self.scaled.solve_residual(residual)
        return [s * y for s, y in zip(self.scale, solution, strict=True)]


@dataclass(frozen=True)
class CheaperSide:
    """Inverse recipe: the exact Gauss-Newton inverse on the smaller side, as far as it is resolved.

    JᵀJ ↦ (JᵀJ + max(λ, floor ε tr D⁻¹JᵀJ) D)⁻¹,  D = I, or that of ``jacobi``

    For R residuals in D parameters, the matrix JᵀJ is factorized if D ≤ R, else the kernel JJᵀ
    (Woodbury). It is formed once for all dampings. A factorization takes a third of the third power
    of its size, a fraction of what forming the matrix does; where it fails, λ is raised by factors
    of ten. ``damping`` of the inverse is what was taken.

    With more than ``largest`` of both it is conjugate gradients, preconditioned by the subspace of
    200 points (``pivoted_points``, ``Deflated``), or by the D of ``jacobi``.

    Args:
        damping: λ, a finite number >= 0.
        floor: Smallest damping in units of ε tr D⁻¹JᵀJ, what rounding makes of the matrix; > 0.
        largest: Largest side that is factorized.
        jacobi: Whether parameters are damped by how much they matter, in place of alike: D is the
            diagonal of JᵀJ, at least a tenth of its mean, over the mean of that, see
            ``GaussNewtonLinearOperator.jacobi``. A kernel then takes R² D, and R D numbers while it
            is formed.
    """

    damping: float
    floor: float = 1.0
    largest: int = policy.LARGEST_SIDE
    jacobi: bool = False

    def __post_init__(self) -> None:
        check_damping(self.damping)
        if not 0 < self.floor < math.inf:
            raise ValueError(
                f"The floor must be positive, got {self.floor}. 1 is what is resolved."
            )
        if not self.largest >= 1:
            raise ValueError(f"largest must be at least 1, got {self.largest}. Leave it out.")

    def __call__(self, operator: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Return the inverse of a ``GaussNewtonLinearOperator``.

        Raises:
            TypeError: If the operator is another one.
            FactorizationError: If an entry of the matrix is not finite.
        """
        kernel = kernel_of(operator, self)
        assert isinstance(operator, GaussNewtonLinearOperator)
        R, D = operator.jacobian.shape
        if min(R, D) > self.largest:
            return self._by_cg(operator)
        if not self.jacobi:
            matrix = kernel.matrix if R < D else operator.dense
            return self._factorized(operator.jacobian, matrix, operator.precision)
        J = operator.jacobi
        s = J.flat_scale
        matrix = J.kernel if R < D else s[:, None] * operator.dense * s
        return JacobiInverseLinearOperator(self._factorized(J, matrix, operator.precision), J.scale)

    def _factorized(
        self, J: JacobianLinearOperator, matrix: Tensor, precision: torch.dtype
    ) -> KernelInverseLinearOperator | ParameterInverseLinearOperator:
        """Return the inverse by the smaller of JᵀJ and JJᵀ."""
        R, D = J.shape
        name = "the kernel of the residuals" if R < D else "the Gauss-Newton matrix"
        matrix = check_entries(matrix, name).to(FACTORIZATION_DTYPE)
        smallest = self.floor * torch.finfo(precision).eps * float(matrix.trace())
        least = max(self.damping, smallest) or 1.0  # a matrix of zeros has no scale
        factorization, damping = factorize_from(matrix, name, least)
        if R < D:
            return KernelInverseLinearOperator(J, factorization, damping, precision=precision)
        return ParameterInverseLinearOperator(J, factorization, damping)

    def _by_cg(self, operator: GaussNewtonLinearOperator) -> CGInverseLinearOperator:
        """Return the inverse by preconditioned conjugate gradients."""
        damping = max(self.damping, torch.finfo(operator.dtype).eps)
        if self.jacobi:  # JᵀJ + λ(D - I) + λI, so that the damping of the inverse is λ
            rest = DiagonalLinearOperator([s**-2 - 1 for s in operator.jacobi.scale])
            P = DiagonalLinearOperator([s**2 for s in operator.jacobi.scale])
            return CGInverseLinearOperator(operator + damping * rest, damping, P)
        coarse = SubspaceGaussNewton(min(_COARSE_POINTS, self.largest), choice=pivoted_points)
        J = operator.jacobian
        P = Deflated(damping)(coarse(J.linearizations, J.space))
        return CGInverseLinearOperator(operator, damping, P)
