"""Inverses by factorized blocks, and the damped inverse as a function of the operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.blocks import Block
from pinncurv.linops.cg_inverse import CGInverseLinearOperator
from pinncurv.linops.layerwise import LayerwiseLinearOperator
from pinncurv.linops.operator import PyTorchLinearOperator, SymmetricLinearOperator, check_damping
from pinncurv.linops.psd import Factorization, FactorizationReport, factorize, symmetrize


@dataclass(frozen=True)
class Damped:
    """The damped inverse as a function of the operator.

    C ↦ (C + λ I)⁻¹

    Not the same as ``FactorDamping``, which adds λ to every Kronecker factor.

    Cost: that of the operator's own inverse.

    Attributes:
        damping: The damping λ, a finite number >= 0.
    """

    damping: float

    def __post_init__(self) -> None:
        """Check the damping."""
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> PyTorchLinearOperator:
        """Return the damped inverse of an operator.

        Args:
            operator: Any symmetric positive semidefinite operator.
        """
        inverse = getattr(type(operator), "inverse", None)
        if inverse is None or inverse is SymmetricLinearOperator.inverse:
            return CGInverseLinearOperator(operator, self.damping)
        return inverse(operator, self.damping)


class FactorizedInverseLinearOperator(SymmetricLinearOperator):
    """The inverse of a factorized matrix.

    M⁻¹ = R⁻ᵀ R⁻¹

    Cost: per product, D² by a Cholesky and 2 D² by an eigendecomposition, which have D² numbers.
    """

    def __init__(
        self, factorization: Factorization, shapes: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> None:
        """Store the factorization.

        Args:
            factorization: The factorization of M on the concatenated parameters.
            shapes: The shapes of all parameters.
            dtype: Data type of the vectors.
        """
        super().__init__(shapes, factorization.device, dtype)
        self.factorization = factorization
        self.reports = (factorization.report,)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in X]).to(self.factorization.dtype)
        pieces = self.factorization.solve(flat).to(self.dtype).split(self._in_shape_flat)
        return [y.reshape(x.shape) for y, x in zip(pieces, X, strict=True)]


class BlockFactorizedInverseLinearOperator(LayerwiseLinearOperator):
    """The inverse of an operator with one factorized matrix per layer.

    diag(M_1⁻¹, …, M_L⁻¹)

    Cost: per product, n² by a Cholesky and 2 n² by an eigendecomposition, which have n² numbers.
    """

    def __init__(
        self,
        factorizations: Sequence[Factorization],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype,
    ) -> None:
        """Store the factorizations.

        Args:
            factorizations: One per layer, on row-major flattened joint matrices.
            blocks: The layers, which cover each parameter exactly once.
            shapes: The shapes of all parameters.
            dtype: Data type of the vectors.
        """
        super().__init__(blocks, shapes, factorizations[0].device, dtype)
        self.factorizations = tuple(factorizations)
        self.reports: tuple[FactorizationReport, ...] = tuple(f.report for f in factorizations)

    def _apply(
        self, layer: int, X: Float[Tensor, "*K d_out d_joint"]
    ) -> Float[Tensor, "*K d_out d_joint"]:
        factorization = self.factorizations[layer]
        columns = X.reshape(-1, self.blocks[layer].numel).to(factorization.dtype).mT
        return factorization.solve(columns).mT.reshape(X.shape)

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        return self.factorizations[layer].inverse()

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        return self.block_to_dense(layer).diagonal().reshape(self.blocks[layer].shape)


def factorize_damped_blocks(
    operator: LayerwiseLinearOperator,
    damping: float,
    dtype: torch.dtype | None = None,
    *,
    checked: bool = False,
) -> BlockFactorizedInverseLinearOperator:
    """Invert each layer's block as a dense matrix, by Cholesky where it is definite enough.

    diag_l (C_l + λ I)⁻¹

    Cost: n³ / 3 and n² numbers in float64 per layer, n = d_out (d_in + 1).

    Args:
        operator: Block diagonal over layers, positive semidefinite.
        damping: λ, a finite number >= 0.
        dtype: Data type of the vectors, by default the operator's.
        checked: Whether the blocks are known to be finite, symmetric and in float64, which saves a
            pass over each of them.

    Raises:
        FactorizationError: If a block is not finite, or numerically singular without damping.
    """
    factorizations = []
    for i, block in enumerate(operator.blocks):
        name = f"layer {block.name}, damped block"
        dense = operator.block_to_dense(i)
        matrix = dense if checked else symmetrize(dense, name)
        matrix.diagonal().add_(check_damping(damping))
        factorizations.append(factorize(matrix, name, damping))
    return BlockFactorizedInverseLinearOperator(
        factorizations, operator.blocks, operator.shapes, operator.dtype if dtype is None else dtype
    )
