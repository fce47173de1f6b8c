"""Inverses by factorized blocks, and the damped inverse as a function of the operator."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.blocks import Block
from pinncurv.linops.cg_inverse import CGInverseLinearOperator
from pinncurv.linops.layerwise import Joint, LayerwiseLinearOperator
from pinncurv.linops.operator import (
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    check_damping,
)
from pinncurv.linops.psd import Factorization, FactorizationError, cholesky, factorize, symmetrize
from pinncurv.linops.resolution import warn_below_resolution


@dataclass(frozen=True)
class Damped:
    """The damped inverse as a function of any symmetric positive semidefinite operator.

    C ↦ (C + λ I)⁻¹

    Not the same as ``FactorDamping``, which adds λ to every Kronecker factor. It is the operator's
    own ``inverse``, at its cost, or conjugate gradients where there is none. Where λ is below what
    rounding makes of a dense C or block of it, it warns with the damping that is not. With λ = 0 a
    numerically singular C is refused, see ``PseudoInverse``.

    Attributes:
        damping: The damping λ, a finite number >= 0.
    """

    damping: float

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Return the damped inverse of an operator."""
        if self.damping > 0 and (matrices := _matrices(operator)):
            trace = float(torch.stack([matrix.trace() for matrix in matrices]).max())
            dtype = matrices[0].dtype
            precision = getattr(operator, "precision", dtype)
            warn_below_resolution(self.damping, trace, precision, dtype)
        inverse = getattr(type(operator), "inverse", None)
        if inverse is None or inverse is SymmetricLinearOperator.inverse:
            return CGInverseLinearOperator(operator, self.damping)
        return inverse(operator, self.damping)


def _matrices(operator: PyTorchLinearOperator) -> list[Tensor]:
    """Return the dense matrices that an operator is made of, if it is made of any."""
    found = getattr(operator, "matrices", [getattr(operator, "matrix", None)])
    return [matrix for matrix in found if isinstance(matrix, Tensor)]


class FactorizedInverseLinearOperator(SymmetricLinearOperator):
    """The inverse of a factorized matrix on the concatenated parameters.

    M⁻¹ = R⁻ᵀ R⁻¹

    Cost: per product, D² by a Cholesky and 2 D² by an eigendecomposition, which have D² numbers.
    """

    def __init__(
        self, factorization: Factorization, shapes: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> None:
        super().__init__(shapes, factorization.device, dtype)
        self.factorization = factorization
        self.reports = (factorization.report,)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in X]).to(self.factorization.dtype)
        pieces = self.factorization.solve(flat).to(self.dtype).split(self._in_shape_flat)
        return [y.reshape(x.shape) for y, x in zip(pieces, X, strict=True)]


class BlockFactorizedInverseLinearOperator(LayerwiseLinearOperator):
    """The inverse of an operator with one factorized matrix per layer.

    diag(M_1⁻¹, …, M_L⁻¹), each on row-major flattened joint matrices

    Cost: per product, n² by a Cholesky and 2 n² by an eigendecomposition, which have n² numbers.
    """

    def __init__(
        self,
        factorizations: Sequence[Factorization],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> None:
        super().__init__(blocks, shapes, factorizations[0].device, dtype)
        self.factorizations = tuple(factorizations)
        self.reports = tuple(f.report for f in factorizations)

    def _apply(self, layer: int, X: Joint) -> Joint:
        factorization = self.factorizations[layer]
        columns = X.reshape(-1, self.blocks[layer].numel).to(factorization.dtype).mT
        return factorization.solve(columns).mT.reshape(X.shape)

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        return self.factorizations[layer].inverse()


def factorize_damped(
    matrix: Float[Tensor, "n n"],
    name: str,
    damping: float,
    semidefinite: bool = True,
    *,
    checked: bool = False,
) -> Factorization:
    """Factorize C + λI, by Cholesky where it is definite enough.

    Args:
        matrix: C, symmetric.
        name: What C is, for error messages and the report.
        damping: λ, a finite number >= 0.
        semidefinite: Whether C is positive semidefinite, up to rounding.
        checked: Whether C is known to be finite, symmetric, in float64 and free to be written to,
            which saves a pass over it.

    Raises:
        FactorizationError: If C is not finite, or C + λI not positive definite.
    """
    damped = matrix if checked else symmetrize(matrix, name)
    damped.diagonal().add_(check_damping(damping))
    if semidefinite:
        return factorize(damped, name, damping)
    factorization = cholesky(damped, name)
    if factorization is None:
        raise FactorizationError(
            f"{name} may be indefinite and must be positive definite with the damping, got one "
            f"that is not with {damping:.1e}. Pass more damping."
        )
    return factorization


def factorize_damped_blocks(
    operator: LayerwiseLinearOperator,
    damping: float,
    dtype: torch.dtype | None = None,
    *,
    semidefinite: bool = True,
    checked: bool = False,
) -> BlockFactorizedInverseLinearOperator:
    """Invert each layer's block as a dense matrix, see ``factorize_damped``.

    diag_l (C_l + λ I)⁻¹, for vectors of a data type, by default the operator's

    Cost: n³ / 3 and n² numbers in float64 per layer, n = d_out (d_in + 1).

    Raises:
        FactorizationError: If a block is not finite, or numerically singular without damping.
    """
    factorizations = [
        factorize_damped(
            operator.block_to_dense(i),
            f"layer {block.name}, damped block",
            damping,
            semidefinite,
            checked=checked,
        )
        for i, block in enumerate(operator.blocks)
    ]
    return BlockFactorizedInverseLinearOperator(
        factorizations, operator.blocks, operator.shapes, operator.dtype if dtype is None else dtype
    )
