"""The damped inverse of the exact Gauss-Newton matrix through the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.kernel import KernelLinearOperator
from pinncurv.linearization import Linearization
from pinncurv.linops import (
    EigenFactorization,
    Factorization,
    FactorizationError,
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    check_damping,
    resolved_damping,
    warn_below_resolution,
)


class KernelInverseLinearOperator(SymmetricLinearOperator):
    """The damped inverse of the Gauss-Newton matrix by a factorization of the kernel (Woodbury).

    (JᵀJ + λI)⁻¹ v = (v - Jᵀ y) / λ,  (K + λI) y = J v,  K = JJᵀ

    K holds no singular value of J below √(ε ‖K‖), and the factorization alone would lose
    ε ‖K‖ / λ of the result. One step of iterative refinement, whose residual is formed by products
    with J and not with K, brings that down to ε √(‖K‖ / λ), to which rounding of v adds ε ‖v‖ / λ:
    that is what a QR factorization of J would do, and less than a dense inverse of JᵀJ loses.

    Where λ is below ε tr K, rounding of v may still make vᵀ (JᵀJ + λI)⁻¹ v negative. That is a
    ``DampingBelowResolution`` warning, and an error in a product in which it happens.

    Cost: the dense kernel and R³ / 3 to build, R² numbers besides the kernel's; a product takes 2
    R² and four products with J or its transpose, without refinement half of that.

    Args:
        jacobian: The Jacobian of the scaled residuals.
        factorization: The factorization of K + λI.
        damping: λ > 0.
        refine: Whether to refine. It costs two more products with J and none with K.
        precision: The data type that K is known in, by default that of J.
    """

    def __init__(
        self,
        jacobian: JacobianLinearOperator,
        factorization: Factorization,
        damping: float,
        refine: bool = True,
        precision: torch.dtype | None = None,
    ) -> None:
        self._precision = precision or jacobian.dtype
        self.damping = check_positive(damping, jacobian)
        self.jacobian = jacobian
        self.factorization = factorization
        self.refine = refine
        self.reports = (factorization.report,)
        super().__init__(jacobian.space.shapes, jacobian.device, jacobian.dtype)

    @classmethod
    def from_kernel(
        cls, kernel: KernelLinearOperator, damping: float, refine: bool = True
    ) -> KernelInverseLinearOperator:
        """Factorize a kernel.

        Args:
            kernel: K.
            damping: λ > 0.
            refine: Whether to refine.

        Raises:
            FactorizationError: If the damping is zero, or an entry of the kernel is not finite.
        """
        check_positive(damping, kernel.jacobian)
        factorization = kernel.factorize(damping)
        trace = _trace(factorization, damping)
        warn_below_resolution(damping, trace, kernel.precision, kernel.dtype)
        return cls(kernel.jacobian, factorization, damping, refine, kernel.precision)

    @property
    def precision(self) -> torch.dtype:
        return self._precision

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        y = self._solve(to_data(self.jacobian, X))
        rest = self._subtract(X, y)
        if self.refine:
            error = to_data(self.jacobian, rest) - self.damping * y
            rest = self._subtract(X, refined(y, self._solve(error)))
        result = [part.div_(self.damping) for part in rest]
        self._check_positive(X, result)
        return result

    def _check_positive(self, X: list[Tensor], Y: list[Tensor]) -> None:
        """Check that vᵀ (JᵀJ + λI)⁻¹ v is positive for every column v other than zero."""
        pairs = [[t.reshape(-1, t.shape[-1]) for t in pair] for pair in zip(X, Y, strict=True)]
        forms = torch.stack([(x * y).sum(0) for x, y in pairs]).sum(0)
        present = torch.stack([x.any(0) for x, _ in pairs]).any(0)
        if bool((present & ~(forms > 0)).any()):
            bound = resolved_damping(_trace(self.factorization, self.damping), self.precision)
            raise FactorizationError(
                "The inverse of JᵀJ + λI must be positive definite, but vᵀ (JᵀJ + λI)⁻¹ v is not "
                f"positive for a v, with λ = {self.damping:.1e} below what {self.precision} "
                f"resolves. Pass damping >= {bound:.0e}, which does, or a higher precision."
            )

    @property
    def linearizations(self) -> Sequence[Linearization]:
        """What the Jacobian was built from."""
        return self.jacobian.linearizations

    def solve_residual(self, residual: Sequence[Tensor]) -> list[Tensor]:
        """Return (JᵀJ + λI)⁻¹ Jᵀ u = Jᵀ (K + λI)⁻¹ u.

        The product with Jᵀu is the same in exact arithmetic, but there rounding in Jᵀu is
        magnified by 1 / λ, here rounding in u by 1 / √λ.

        Args:
            residual: u, one tensor ``[N_t, V_t]`` per term.
        """
        u = torch.cat([part.flatten() for part in residual]).unsqueeze(-1)
        y = self._solve(u)
        x = from_data(self.jacobian, y)
        if self.refine:
            error = u - to_data(self.jacobian, x) - self.damping * y
            x = from_data(self.jacobian, refined(y, self._solve(error)))
        return [part.squeeze(-1) for part in x]

    def _subtract(self, X: list[Tensor], y: Tensor) -> list[Tensor]:
        """Return X - Jᵀ y."""
        return [x - part for x, part in zip(X, from_data(self.jacobian, y), strict=True)]

    def _solve(self, y: Float[Tensor, "R k"]) -> Float[Tensor, "R k"]:
        return self.factorization.solve(y.to(self.factorization.dtype)).to(self.dtype)


def refined(y: Float[Tensor, "n k"], correction: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Return y + correction, column by column, where that is a small one as it should be.

    It is not if λ is so far below rounding that a factorization is no approximation.
    """
    norms = torch.linalg.vector_norm(torch.stack([correction, y]), dim=1)
    return torch.where(norms[0] <= 0.5 * norms[1], y + correction, y)


def _trace(factorization: Factorization, damping: float) -> float:
    """Return tr K from the factorization of K + λI."""
    if isinstance(factorization, EigenFactorization):
        total = float(factorization.eigenvalues.sum())
    else:
        total = float(torch.linalg.vector_norm(factorization.root)) ** 2
    return max(total - damping * len(factorization.root), 0.0)


def check_positive(damping: float, jacobian: JacobianLinearOperator) -> float:
    """Return the damping after checking that it is positive.

    Raises:
        FactorizationError: If it is zero.
        ValueError: If it is no finite number >= 0.
    """
    if check_damping(damping) == 0:
        R, D = jacobian.shape
        raise FactorizationError(
            f"The damping must be positive to invert JᵀJ, with {D} parameters, through the kernel "
            f"of its {R} residuals, got 0. Pass damping > 0, or with at least as many "
            "residuals as parameters invert GaussNewton(), which is dense."
        )
    return float(damping)


def to_data(jacobian: JacobianLinearOperator, X: list[Tensor]) -> Float[Tensor, "R k"]:
    """Return J X, from one tensor ``[*shape, k]`` per parameter, in one matrix."""
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in jacobian._matmat(X)])


def from_data(jacobian: JacobianLinearOperator, y: Float[Tensor, "R k"]) -> list[Tensor]:
    """Return Jᵀ y, one tensor ``[*shape, k]`` per parameter."""
    pieces = zip(y.split(jacobian._out_shape_flat), jacobian._out_shape, strict=True)
    parts = [piece.reshape(*shape, y.shape[1]) for piece, shape in pieces]
    return jacobian.adjoint()._matmat(parts)


def kernel_of(operator: PyTorchLinearOperator, inverse: Any) -> KernelLinearOperator:
    """Return the kernel of an operator.

    Raises:
        TypeError: If it has none.
    """
    kernel = getattr(operator, "kernel", None)
    if not isinstance(kernel, KernelLinearOperator):
        raise TypeError(
            f"{type(inverse).__name__} needs an operator that knows its Jacobian, a "
            f"GaussNewtonLinearOperator, got {type(operator).__name__}. Pass "
            "curvature=MatrixFreeGaussNewton(), or inverse="
            f"Damped({inverse.damping:g}) for this operator."
        )
    return kernel


@dataclass(frozen=True)
class Woodbury:
    """Inverse recipe: the exact Gauss-Newton inverse through the kernel, whatever its size.

    JᵀJ ↦ (I - Jᵀ (JJᵀ + λI)⁻¹ J) / λ

    Cost: the dense kernel, R³ / 3 and 2 R² numbers, see ``KernelInverseLinearOperator``; nothing
    that grows as D² or R D is held. With more residuals than parameters, the dense inverse is
    cheaper.

    Args:
        damping: λ, a finite number > 0 when it is applied.
        refine: Whether products are refined, see ``KernelInverseLinearOperator``.

    Source: Guzman-Cordero et al. 2025 (ENGD-W).
    """

    damping: float
    refine: bool = True

    def __post_init__(self) -> None:
        """Check the damping."""
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> KernelInverseLinearOperator:
        """Return the inverse of a ``GaussNewtonLinearOperator``.

        Raises:
            TypeError: If the operator is another one.
            FactorizationError: If the damping is zero.
        """
        kernel = kernel_of(operator, self)
        return KernelInverseLinearOperator.from_kernel(kernel, self.damping, self.refine)
