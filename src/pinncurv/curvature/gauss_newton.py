"""The exact Gauss-Newton matrix: matrix-free, dense, per layer, and its diagonal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.block_rows import layers_of
from pinncurv.curvature.jacobian import JacobianLinearOperator, check_exact, fill_jacobian_rows
from pinncurv.curvature.kernel import KernelLinearOperator
from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.products import joint_jacobian_rows, output_gradients
from pinncurv.curvature.second_moments import squared_rows
from pinncurv.curvature.woodbury import KernelInverseLinearOperator
from pinncurv.linearization import Linearization
from pinncurv.linops import (
    CGInverseLinearOperator,
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    SymmetricLinearOperator,
    from_joint,
)

# Largest number of Jacobian entries that are held at a time while a dense matrix is summed up.
_ROW_ELEMENTS = 1 << 22


class GaussNewtonLinearOperator(SymmetricLinearOperator):
    """The exact Gauss-Newton matrix of a loss, matrix-free.

    JᵀJ = Σ_t J_tᵀJ_t

    Cost: 2 N S V D per column and product, and no differentiation; nothing is held but Z and G.

    Args:
        jacobian: The Jacobian of the scaled residuals.
    """

    def __init__(self, jacobian: JacobianLinearOperator) -> None:
        self.jacobian = jacobian
        space = jacobian.space
        super().__init__(space.shapes, space.device, space.dtype)

    @classmethod
    def from_linearizations(
        cls, linearizations: Sequence[Linearization]
    ) -> GaussNewtonLinearOperator:
        """Build the operator.

        Args:
            linearizations: One per term.
        """
        return cls(JacobianLinearOperator.from_linearizations(linearizations))

    def term(self, term: int | str) -> GaussNewtonLinearOperator:
        """Return the Gauss-Newton matrix of one term alone, on all parameters.

        J_tᵀJ_t

        Args:
            term: Position or name of the term.

        Raises:
            KeyError: If there is no such term.
        """
        linearizations = self.jacobian.linearizations
        names = tuple(linearization.term.name for linearization in linearizations)
        if term not in names and term not in range(len(names)):
            raise KeyError(f"term must be one of {names} or a position, received {term!r}.")
        position = names.index(term) if isinstance(term, str) else term
        return type(self)(JacobianLinearOperator([linearizations[position]], self.jacobian.space))

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return self.jacobian.adjoint()._matmat(self.jacobian._matmat(X))

    def to_dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix, summed over blocks of points."""
        space = self.jacobian.space
        D = space.dimension
        matrix = torch.zeros(D, D, dtype=self.dtype, device=self.device)
        for linearization in self.jacobian.linearizations:
            for chunk in linearization:
                n, V = chunk.residual.shape
                for points in _point_blocks(n, V * D):
                    rows = matrix.new_empty((points.stop - points.start) * V, D)
                    fill_jacobian_rows(rows, chunk.layers, space, points)
                    matrix.addmm_(rows.t(), rows)
        return matrix

    def diagonal(self) -> Float[Tensor, " D"]:
        """Return the diagonal, summed over blocks of points."""
        return gauss_newton_diagonal(self.jacobian.linearizations, self.jacobian.space).diagonal()

    @cached_property
    def kernel(self) -> KernelLinearOperator:
        """The kernel JJᵀ, whose matrix is computed once."""
        return KernelLinearOperator(self.jacobian)

    def inverse(self, damping: float, dense_limit: int = 2048) -> PyTorchLinearOperator:
        """Return (JᵀJ + λI)⁻¹ for R residuals in D parameters.

        With min(R, D) up to ``dense_limit`` by a dense factorization on the smaller side: of the
        kernel JJᵀ if R < D, which needs a damping, else of JᵀJ. With more than that by conjugate
        gradients to a relative residual of 1e-10, preconditioned by the inverse of the damped
        diagonal.

        Args:
            damping: λ, a finite number >= 0.
            dense_limit: Largest min(R, D) that is inverted as a dense matrix.
        """
        R, D = self.jacobian.shape
        if R < D and dense_limit >= R:
            return KernelInverseLinearOperator.from_kernel(self.kernel, damping)
        if dense_limit >= D:
            return DenseLinearOperator(self.to_dense(), self.shapes).inverse(damping)
        diagonal = gauss_newton_diagonal(self.jacobian.linearizations, self.jacobian.space)
        return CGInverseLinearOperator(
            self, damping=damping, preconditioner=diagonal.inverse(damping)
        )


def _point_blocks(n: int, row_elements: int) -> Iterator[slice]:
    """Cut n points such that the rows of a block stay small."""
    step = max(1, _ROW_ELEMENTS // max(1, row_elements))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def gauss_newton_diagonal(
    linearizations: Sequence[Linearization], space: ParameterSpace
) -> DiagonalLinearOperator:
    """Return the diagonal of the exact Gauss-Newton matrix as an operator.

    Raises:
        ValueError: If a linearization has other output gradients than the exact ones.
    """
    check_exact(linearizations)
    options: dict[str, Any] = {"dtype": space.dtype, "device": space.device}
    joints = [torch.zeros(block.shape, **options) for block in space.blocks]
    for linearization in linearizations:
        for i, layer in layers_of(linearization, space):
            joints[i] += squared_rows(layer)
    diagonals = from_joint(joints, space.blocks)
    return DiagonalLinearOperator([diagonal.contiguous() for diagonal in diagonals])


def gauss_newton_blocks(
    linearizations: Sequence[Linearization], space: ParameterSpace
) -> DenseBlockDiagonalLinearOperator:
    """Return the per-layer diagonal blocks of the exact Gauss-Newton matrix.

    Raises:
        ValueError: If a linearization has other output gradients than the exact ones.
    """
    check_exact(linearizations)
    options: dict[str, Any] = {"dtype": space.dtype, "device": space.device}
    matrices = [torch.zeros(block.numel, block.numel, **options) for block in space.blocks]
    for linearization in linearizations:
        for i, layer in layers_of(linearization, space):
            V, _, n, _ = output_gradients(layer).shape
            for points in _point_blocks(n, V * space.blocks[i].numel):
                rows = joint_jacobian_rows(layer, points)
                matrices[i].addmm_(rows.t(), rows)
    return DenseBlockDiagonalLinearOperator(matrices, space.blocks, space.shapes)


@dataclass(frozen=True)
class GaussNewton:
    """Recipe: the exact Gauss-Newton matrix as a dense matrix (ENGD's curvature).

    JᵀJ

    Cost: N S V D + R D² to build and D² numbers; O(D³) once to invert and D² more; D² per product.
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> DenseLinearOperator:
        """Build the operator."""
        operator = GaussNewtonLinearOperator.from_linearizations(linearizations)
        return DenseLinearOperator(operator.to_dense(), operator.shapes)


@dataclass(frozen=True)
class BlockDiagonalGaussNewton:
    """Recipe: the exact Gauss-Newton matrix restricted to its per-layer diagonal blocks.

    diag_l(J_lᵀJ_l)

    Cost: with n = d_in d_out, N S V n + R n² to build and n² numbers per layer; O(n³) once to
    invert and n² more; n² per product.
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> DenseBlockDiagonalLinearOperator:
        """Build the operator."""
        space = ParameterSpace.from_linearizations(linearizations)
        return gauss_newton_blocks(linearizations, space)


@dataclass(frozen=True)
class DiagonalGaussNewton:
    """Recipe: the diagonal of the exact Gauss-Newton matrix.

    diag(JᵀJ)

    Cost: N S V D to build, D to invert and per product; D numbers.
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> DiagonalLinearOperator:
        """Build the operator."""
        space = ParameterSpace.from_linearizations(linearizations)
        return gauss_newton_diagonal(linearizations, space)
