"""The Hessian of the loss, matrix-free, and what it has beyond the Gauss-Newton matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.linearization import Linearization, check_differentiable
from pinncurv.linops import (
    Block,
    EigenFactorization,
    FactorizationError,
    FactorizedInverseLinearOperator,
    SymmetricLinearOperator,
    check_damping,
    eigh,
    policy,
    symmetrize,
    term_position,
)
from pinncurv.linops.psd import is_singular
from pinncurv.linops.restriction import Selection, restrict


class SecondDerivativeLinearOperator(SymmetricLinearOperator, ABC):
    """The derivative of J(θ)ᵀ u in the parameters, for some u per residual, matrix-free.

    v ↦ ∂/∂θ (vᵀ J(θ)ᵀ u)

    Cost: a product takes one forward pass, one backward pass that is recorded, and for each column
    one backward pass through both; the graph of one block of points is held. The inverse is dense,
    D products, O(D³) and 2 D² numbers.

    The operator is symmetric but in general indefinite. It recomputes the passes, so it is usable
    as long as the parameters do not change.

    Args:
        linearizations: One per term. Only their terms, points and chunk sizes matter.
        space: The parameters to differentiate in.
    """

    def __init__(
        self, linearizations: Sequence[Linearization], space: ParameterSpace | None = None
    ) -> None:
        self.linearizations = linearizations
        self.space = space = ParameterSpace.of(linearizations) if space is None else space
        super().__init__(space.shapes, space.device, space.dtype)

    def term(self, term: int | str) -> SecondDerivativeLinearOperator:
        """Return the operator of one term alone, on all parameters.

        Raises:
            KeyError: If there is no term of that position or name.
        """
        names = tuple(linearization.term.name for linearization in self.linearizations)
        position = term_position(names, term)
        return type(self)([self.linearizations[position]], self.space)

    @abstractmethod
    def _cotangent(self, u: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        """Return u as it is to be differentiated; it is the scaled residual r̃ of some points."""

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        totals = [torch.zeros_like(x) for x in X]
        for linearization in self.linearizations:
            for y, u in _slopes(linearization):
                self._add_products_(totals, y, u, X)
        return totals

    def _add_products_(self, totals: list[Tensor], y: Tensor, u: Tensor, X: list[Tensor]) -> None:
        """Add the products of some points."""
        parameters = list(self.space.parameters.values())
        if not y.requires_grad:
            return
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                y, parameters, self._cotangent(u), create_graph=True, allow_unused=True
            )
        # what is linear in the parameters has a gradient without a graph, or none
        pairs = [(g, x) for g, x in zip(pulled, X, strict=True) if g is not None]
        pairs = [(g, x) for g, x in pairs if g.requires_grad]
        for k in range(X[0].shape[-1] if pairs else 0):
            columns = torch.autograd.grad(
                [g for g, _ in pairs],
                parameters,
                [x[..., k] for _, x in pairs],
                retain_graph=k + 1 < X[0].shape[-1],
                allow_unused=True,
            )
            for total, column in zip(totals, columns, strict=True):
                if column is not None:
                    total[..., k] += column

    @cached_property
    def eigh(self) -> EigenFactorization:
        """The eigendecomposition V diag(h) Vᵀ of the dense matrix, computed once, in float64."""
        name = f"the matrix of {type(self).__name__}"
        return eigh(symmetrize(self.to_dense(), name), name, floor=-inf)

    def inverse(
        self, damping: float, dense_limit: int = policy.LARGEST_DENSE
    ) -> FactorizedInverseLinearOperator:
        """Return the damped inverse.

        (C + λ I)⁻¹ = V diag(1 / (h + λ)) Vᵀ

        Eigenvalues keep their sign: where h < -λ the inverse is negative, and the Newton step that
        it gives ascends along these eigenvectors.

        Raises:
            NotImplementedError: If there are more than ``dense_limit`` parameters.
            FactorizationError: If C + λ I is numerically singular.
        """
        damping = check_damping(damping)
        if self.shape[0] > dense_limit:
            raise NotImplementedError(
                f"{type(self).__name__} is indefinite and inverted as a dense matrix of at most "
                f"{dense_limit} parameters, got {self.shape[0]}. Raise dense_limit; or solve "
                "one system by scipy.sparse.linalg.minres(operator.to_scipy(), b, "
                f"shift={-damping!r}); or, if the damping makes it positive definite, use "
                "pinncurv.linops.CGInverseLinearOperator."
            )
        h, V, report = self.eigh.eigenvalues, self.eigh.eigenvectors, self.eigh.report
        if is_singular((h + damping).abs()):
            raise FactorizationError(
                f"{report.name} plus damping must be nonsingular, got eigenvalues in "
                f"[{h[0].item():.1e}, {h[-1].item():.1e}] and one at the negative of the damping "
                f"{damping:.1e} up to rounding. Pass another damping."
            )
        # the inverse only solves, which no sign of an eigenvalue forbids
        factorization = EigenFactorization(h + damping, V, report)
        return FactorizedInverseLinearOperator(factorization, self.shapes, self.dtype)


def _slopes(
    linearization: Linearization,
) -> Iterator[tuple[Float[Tensor, "n V"], Float[Tensor, "n V"]]]:
    """Yield r̃ twice, or what takes its place, with a graph, a block of points at a time."""
    check_differentiable(linearization.term.name)
    for part in linearization.parts():
        with torch.enable_grad():
            slopes = part.slopes(linearization.model)
        yield slopes


class HessianLinearOperator(SecondDerivativeLinearOperator):
    """The Hessian of the loss, matrix-free.

    ∇²L = JᵀJ + Σ_nv r̃_nv ∇² r̃_nv

    The first part is ``GaussNewtonLinearOperator``, the second ``ResidualHessianLinearOperator``.
    """

    def _cotangent(self, u: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        return u  # with its graph: ∇L = Jᵀ r̃ is differentiated in both factors


class ResidualHessianLinearOperator(SecondDerivativeLinearOperator):
    """What the Hessian of the loss has beyond the Gauss-Newton matrix, matrix-free.

    ∇²L - JᵀJ = Σ_nv r̃_nv ∇² r̃_nv

    It is differentiated directly, with r̃ frozen, not computed as a difference: small residuals
    cost no digits. It vanishes where the residual does, and where it is linear in the parameters.
    """

    def _cotangent(self, u: Float[Tensor, "n V"]) -> Float[Tensor, "n V"]:
        return u.detach()


@restrict.register
def _(
    operator: SecondDerivativeLinearOperator, blocks: Sequence[Block]
) -> SecondDerivativeLinearOperator:
    selection = Selection.of(blocks, operator.shapes)
    names = [operator.space.names[position] for position in selection.positions]
    parameters = {name: operator.space.parameters[name] for name in names}
    return type(operator)(operator.linearizations, ParameterSpace(parameters, selection.blocks))


@dataclass(frozen=True)
class Hessian:
    """Recipe: the Hessian of the loss, matrix-free.

    ∇²L

    It is indefinite, so an optimizer that inverts it is Newton's method: it is attracted by saddle
    points, too. With enough damping it descends. Cost: see ``SecondDerivativeLinearOperator``.
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> SecondDerivativeLinearOperator:
        return HessianLinearOperator(linearizations)


@dataclass(frozen=True)
class ResidualHessian:
    """Recipe: what the Hessian has beyond the Gauss-Newton matrix, matrix-free.

    ∇²L - JᵀJ
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> SecondDerivativeLinearOperator:
        return ResidualHessianLinearOperator(linearizations)
