"""Sums of Kronecker products whose factors need not be positive semidefinite."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops import policy
from pinncurv.linops.blocks import Block
from pinncurv.linops.dense import DenseBlockDiagonalLinearOperator
from pinncurv.linops.factors import KroneckerFactors, add_dense, add_diagonals
from pinncurv.linops.inverses import BlockFactorizedInverseLinearOperator
from pinncurv.linops.layerwise import Joint, LayerwiseLinearOperator
from pinncurv.linops.operator import check_damping


@dataclass(frozen=True)
class KroneckerRecord:
    """How the products of one layer were found.

    Attributes:
        layer: Name of the layer.
        terms: Names of the terms whose sum is approximated, joined by a plus sign.
        singular_values: σ_i = ‖B_i‖ ‖A_i‖, the largest first. The squared Frobenius error of the
            products is ‖C_l‖² − Σ_i σ_i².
        iterations: Number of iterations, each of which visits all points twice.
        change: Largest change of a singular value in the last iteration, relative to σ_1.
        converged: Whether that is at most the tolerance.
    """

    layer: str
    terms: str
    singular_values: tuple[float, ...]
    iterations: int
    change: float
    converged: bool


class KroneckerExpansionLinearOperator(LayerwiseLinearOperator):
    """Block diagonal over layers, each block a sum of Kronecker products of either sign.

    C_l = Σ_i B_li ⊗ A_li, that is X_l ↦ Σ_i B_li X_l A_liᵀ

    The two matrices of a product are both symmetric or both antisymmetric, so that the product is
    symmetric. Neither the products nor their sum need be positive semidefinite.

    Cost: d_in² + d_out² numbers and d_in d_out (d_in + d_out) per product, times the number of
    Kronecker products; the inverse is that of a dense block.

    Args:
        products: Any positive number of products per layer.
        records: How the products were found.
    """

    def __init__(
        self,
        products: Sequence[Sequence[KroneckerFactors]],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        records: Sequence[KroneckerRecord] = (),
    ) -> None:
        first = products[0][0].A
        super().__init__(blocks, shapes, first.device, first.dtype)
        self.products = tuple(tuple(layer) for layer in products)
        self.records = tuple(records)

    def _apply(self, layer: int, X: Joint) -> Joint:
        return torch.stack([p.B @ X @ p.A.mT for p in self.products[layer]]).sum(0)

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        return add_dense(self.products[layer])

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        return add_diagonals(self.products[layer])

    def inverse(self, damping: float) -> BlockFactorizedInverseLinearOperator:
        """Return the damped inverse of the positive part.

        (max(C, 0) + λ I)⁻¹ = V diag(1 / (max(m, 0) + λ)) Vᵀ

        The exact block is positive semidefinite, so its positive part is the better approximation,
        and the inverse is positive definite. It takes an eigendecomposition of each dense block.

        Raises:
            ValueError: If a block is larger than ``policy.LARGEST_DENSE``.
            FactorizationError: If the damping is zero and a block is numerically singular.
        """
        for block in self.blocks:
            if block.numel > policy.LARGEST_DENSE:
                raise ValueError(
                    "A sum of Kronecker products of either sign is inverted by dense blocks of "
                    f"dimension at most {policy.LARGEST_DENSE}, but layer {block.name} has "
                    f"{block.numel}. Use rank=1, which is inverted in closed form."
                )
        matrices = [self.block_to_dense(i) for i in range(len(self.blocks))]
        dense = DenseBlockDiagonalLinearOperator(matrices, self.blocks, self._in_shape)
        damping = check_damping(damping)
        positive = [dense.eigh(i).damped(damping) for i in range(len(matrices))]
        return BlockFactorizedInverseLinearOperator(
            positive, self.blocks, self._in_shape, self.dtype
        )
