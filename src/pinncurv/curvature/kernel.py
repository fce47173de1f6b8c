"""The kernel of the scaled residuals, JJᵀ: matrix-free and dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.single import SingleBlock, check_single
from pinncurv.linearization import (
    DenseRows,
    EntryRows,
    JacobianBlock,
    Linearization,
    LinearLayer,
)
from pinncurv.linops import (
    Factorization,
    FactorizedInverseLinearOperator,
    SymmetricLinearOperator,
    check_damping,
    factorize,
    symmetrize,
)

# The blocks of the Jacobian at some points, in the order of the parameter space.
Blocks = list[JacobianBlock | None]

# Points per block of the kernel: three blocks of this size squared stay in the cache.
_BLOCK_POINTS = 256
# Largest number of Jacobian entries that are held at a time for one block of points.
_ROW_ELEMENTS = 1 << 21
# What an elementwise multiplication costs, in multiplications inside of a matrix product.
_ELEMENTWISE_COST = 16


class KernelLinearOperator(SymmetricLinearOperator):
    """The kernel of the scaled residuals, matrix-free.

    K = JJᵀ = Σ_l J_l J_lᵀ

    It acts on the data, one tensor ``[N_t, V_t]`` per term, as the Jacobian's output.

    Cost: 2 N S V D per column and product. Dense, R² numbers and for each pair of residuals and
    each layer d_in d_out or S² (d_out + d_in / V²), whichever is less, halved by symmetry; the
    inverse takes R³ / 3 and R² numbers more, and R² per product.

    Args:
        jacobian: The Jacobian of the scaled residuals.
        single: Whether the matrix is formed in float32. Products are not.
    """

    def __init__(self, jacobian: JacobianLinearOperator, single: bool = False) -> None:
        self.jacobian = jacobian
        self.single = single
        super().__init__(jacobian._out_shape, jacobian.device, jacobian.dtype)

    @property
    def precision(self) -> torch.dtype:
        return torch.float32 if self.single else self.dtype

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.jacobian._matmat(self.jacobian.adjoint()._matmat(X))

    def to_dense(self) -> Float[Tensor, "R R"]:
        return self.matrix.clone()

    @cached_property
    def matrix(self) -> Float[Tensor, "R R"]:
        """The matrix, which is computed once; not to be written to."""
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for i, side in enumerate(self._sides()):
            for other in chain(islice(self._sides(), i), [side]):
                _fill(matrix, side, other)
        return matrix

    def _sides(self) -> Iterator[_Side]:
        """Yield the blocks of all chunks with the row of the kernel where each starts."""
        row = 0
        for linearization in self.jacobian.linearizations:
            for chunk in linearization:
                n, V = chunk.residual.shape
                blocks = self.jacobian.space.arrange(linearization, chunk)
                yield _Side(row, n, V, blocks, self._small(blocks))
                row += n * V

    def _small(self, blocks: Blocks) -> list[SingleBlock | None]:
        """Round blocks whose rows are to be multiplied."""
        return [
            None if not self.single or b is None or isinstance(b, EntryRows) else SingleBlock.of(b)
            for b in blocks
        ]

    def factorize(self, damping: float) -> Factorization:
        """Factorize K + λI in float64.

        Args:
            damping: λ, a finite number >= 0.

        Raises:
            FactorizationError: If the damping is zero and the kernel is numerically singular, as it
                is with more residuals than parameters.
        """
        damping, name = check_damping(damping), "the kernel of the residuals"
        matrix = symmetrize(self.matrix, name)
        matrix.diagonal().add_(damping)
        return factorize(matrix, name, damping)

    def inverse(self, damping: float) -> FactorizedInverseLinearOperator:
        """Return (JJᵀ + λI)⁻¹ by a dense factorization in float64.

        Args:
            damping: λ, a finite number >= 0.

        Raises:
            FactorizationError: If the damping is zero and the kernel is numerically singular.
        """
        return FactorizedInverseLinearOperator(self.factorize(damping), self.shapes, self.dtype)


@dataclass(frozen=True, eq=False)
class _Side:
    """The blocks of one chunk, with n points and V components, whose rows start at a row."""

    row: int
    n: int
    V: int
    blocks: Blocks
    small: list[SingleBlock | None]


def _fill(matrix: Tensor, left: _Side, right: _Side) -> None:
    """Write the part of two chunks and its transpose, summed over the blocks that both use."""
    V, W = left.V, right.V
    both = zip(left.blocks, right.blocks, left.small, right.small, strict=True)
    pairs = [(a, b, c, d) for a, b, c, d in both if a is not None and b is not None]
    for p in point_ranges(left.n):
        for q in point_ranges(right.n):
            if left is right and q.start > p.start:
                continue
            part = matrix.new_zeros(V, p.stop - p.start, W, q.stop - q.start)
            for a, b, c, d in pairs:
                if c is None or d is None:
                    add_kernel_(part, a.at(p), b.at(q))
                else:
                    rounded = torch.zeros_like(part, dtype=torch.float32)
                    add_kernel_(rounded, c.block.at(p), d.block.at(q))
                    part.addcmul_(rounded.to(part.dtype), c.scale * d.scale)
            values = part.permute(1, 0, 3, 2).flatten(2).flatten(0, 1)
            rows = slice(left.row + V * p.start, left.row + V * p.stop)
            columns = slice(right.row + W * q.start, right.row + W * q.stop)
            matrix[rows, columns] = values
            if rows != columns:
                matrix[columns, rows] = values.t()


def point_ranges(n: int) -> Iterator[slice]:
    """Cut n points into ranges that stay in the cache."""
    for start in range(0, n, _BLOCK_POINTS):
        yield slice(start, min(n, start + _BLOCK_POINTS))


def add_kernel_(part: Float[Tensor, "V n W m"], left: JacobianBlock, right: JacobianBlock) -> None:
    """Add one block's J_l J_lᵀ, by whichever way takes fewer multiplications per pair of points.

    Through rows of the Jacobian that is V W d_out d_in, and through pairs of channels
    S² (V W d_out + d_in) and the elementwise product: few channels or wide layers favour these.
    """
    if isinstance(left, EntryRows):
        part += left.product(_as_vectors(right)).view(part.shape)
        return
    if isinstance(right, EntryRows):
        part += right.product(_as_vectors(left))[0].t().reshape(part.shape)
        return
    if isinstance(left, DenseRows) or isinstance(right, DenseRows):
        rows = [block.joint_rows(slice(None)) for block in (left, right)]
        part.view(len(rows[0]), len(rows[1])).addmm_(rows[0], rows[1].t())
        return
    left, right = left.as_layer(), right.as_layer()
    (V, n, W, m), d_in = part.shape, left.Z.shape[2]
    S, Q = len(left.Z), len(right.Z)
    through_rows = left.d_out * d_in * (V * W + S * V / m + Q * W / n)
    through_channels = S * Q * (V * W * (left.d_out + _ELEMENTWISE_COST) + d_in)
    if through_channels < through_rows:
        _add_through_channels_(part, left, right)
    else:
        _add_through_rows_(part, left, right)


def _as_vectors(block: JacobianBlock) -> list[Tensor]:
    """Return all rows as directions, one tensor ``[V n, *shape]`` per parameter."""
    rows = block.rows(slice(None))
    return [part.reshape(-1, *shape) for part, shape in zip(rows, block.shapes, strict=True)]


def _add_through_channels_(
    block: Float[Tensor, "V n W m"], left: LinearLayer, right: LinearLayer
) -> None:
    """Add Σ_sq (g_vns · g_wmq) (z_ns · z_mq), with one more for the bias on value channels."""
    for s, (z, g) in enumerate(zip(left.Z, left.gradients.unbind(1), strict=True)):
        for q, (y, h) in enumerate(zip(right.Z, right.gradients.unbind(1), strict=True)):
            overlap = z @ y.t()
            if left.bias is not None and s in left.value_channels and q in right.value_channels:
                overlap += 1
            gradients = g.flatten(0, 1) @ h.flatten(0, 1).t()
            block.addcmul_(gradients.view_as(block), overlap.unsqueeze(1))


def _add_through_rows_(
    block: Float[Tensor, "V n W m"], left: LinearLayer, right: LinearLayer
) -> None:
    """Add J_l J_lᵀ, for a few of the layer's outputs at a time."""
    V, n, W, m = block.shape
    step = max(1, _ROW_ELEMENTS // (max(V * n, W * m) * left.Z.shape[2]))
    total = block.view(V * n, W * m)
    for start in range(0, left.d_out, step):
        outputs = slice(start, start + step)
        rows = [
            replace(layer, G=layer.gradients[..., outputs]).joint_rows(slice(None))
            for layer in (left, right)
        ]
        total.addmm_(rows[0], rows[1].t())


@dataclass(frozen=True)
class Kernel:
    """Recipe: the kernel of the scaled residuals, matrix-free.

    JJᵀ

    Cost: see ``KernelLinearOperator``.

    Args:
        single: Whether its matrix is formed in float32, see ``MatrixFreeGaussNewton``.
    """

    single: bool = False

    def __post_init__(self) -> None:
        check_single(self.single)

    def __call__(self, linearizations: Sequence[Linearization]) -> KernelLinearOperator:
        """Build the operator."""
        return KernelLinearOperator(JacobianLinearOperator(linearizations), self.single)
