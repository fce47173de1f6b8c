"""The exact Gauss-Newton matrix: matrix-free, dense, per block, and its diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.jacobian import (
    JacobianLinearOperator,
    ScaledJacobianLinearOperator,
    check_exact,
    chunk_rows,
)
from pinncurv.curvature.kernel import KernelLinearOperator
from pinncurv.curvature.parameters import ParameterSpace, visit_blocks
from pinncurv.curvature.single import Scaled, add_gram_, check_single
from pinncurv.curvature.woodbury import KernelInverseLinearOperator
from pinncurv.linearization import Chunk, JacobianBlock, Linearization, run
from pinncurv.linearization.blocks import row_ranges
from pinncurv.linops import (
    CGInverseLinearOperator,
    Damped,
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    from_joint,
    policy,
    term_position,
)
from pinncurv.machine import add_lower_product_, check_memory, mirror_

# What else to do where the matrix is too large.
INSTEAD = (
    "Take MatrixFreeGaussNewton() with PreconditionedCG(damping), or Woodbury(damping) where there "
    "are fewer residuals than parameters, or KFAC()."
)
# Smallest diagonal entry that a scaling by it knows, as a part of their mean.
_LEAST_OF_MEAN = 0.1


class GaussNewtonLinearOperator(SymmetricLinearOperator):
    """The exact Gauss-Newton matrix of a loss, matrix-free.

    JᵀJ = Σ_t J_tᵀJ_t

    Cost: 2 N S V D per column and product, and no differentiation; nothing is held but Z and G.
    With a chunk size, one pass over the points per product.

    Args:
        jacobian: The Jacobian of the scaled residuals.
        single: Whether the matrix and the kernel are formed in float32 where they are wanted
            (``to_dense``, ``dense``, ``kernel``). Products are not.
    """

    def __init__(self, jacobian: JacobianLinearOperator, single: bool = False) -> None:
        self.jacobian = jacobian
        self.single = single
        space = jacobian.space
        super().__init__(space.shapes, space.device, space.dtype)

    @property
    def precision(self) -> torch.dtype:
        return torch.float32 if self.single else self.dtype

    def term(self, term: int | str) -> GaussNewtonLinearOperator:
        """Return the Gauss-Newton matrix of one term alone, on all parameters.

        J_tᵀJ_t

        Raises:
            KeyError: If there is no term of that position or name.
        """
        linearizations = self.jacobian.linearizations
        position = term_position([lin.term.name for lin in linearizations], term)
        jacobian = JacobianLinearOperator([linearizations[position]], self.jacobian.space)
        return type(self)(jacobian, self.single)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        J = self.jacobian
        directions, totals = [x.movedim(-1, 0) for x in X], J.zeros(X[0].shape[-1])

        def visit(t: int, chunk: Chunk) -> None:
            blocks = J.space.arrange(J.linearizations[t], chunk)
            J.add_adjoint_product_(totals, blocks, J.product(blocks, directions, chunk))

        run(J.linearizations, visit)
        return [total.movedim(0, -1) for total in totals]

    def to_dense(self) -> Float[Tensor, "D D"]:
        J = self.jacobian
        D = J.space.dimension
        check_memory(f"JᵀJ of {D:,} parameters", D * D, J.dtype, J.device, INSTEAD)
        matrix = J.space.zeros(D, D)

        def visit(t: int, chunk: Chunk) -> None:
            if J.linearizations[t].structure.entrywise:  # its rows would take D³
                alone = gauss_newton_diagonal([J.linearizations[t]], J.space)
                matrix.diagonal().add_(alone.diagonal())
                return
            n, V = chunk.residual.shape
            for points in row_ranges(n, V * D, J.device):
                rows = chunk_rows(J.space, J.linearizations[t], chunk, points)
                if self.single:
                    matrix.add_(Scaled.of(rows).gram())
                else:
                    add_lower_product_(matrix, rows)

        run(J.linearizations, visit)
        return mirror_(matrix)

    def diagonal(self) -> Float[Tensor, " D"]:
        return gauss_newton_diagonal(self.jacobian.linearizations, self.jacobian.space).diagonal()

    @cached_property
    def dense(self) -> Float[Tensor, "D D"]:
        """The matrix, which is computed once; not to be written to."""
        return self.to_dense()

    @cached_property
    def kernel(self) -> KernelLinearOperator:
        """The kernel JJᵀ, whose matrix is computed once."""
        return KernelLinearOperator(self.jacobian, self.single)

    @cached_property
    def jacobi(self) -> ScaledJacobianLinearOperator:
        """The Jacobian in units of the parameters in which they matter alike.

        J D^(-½),  D_i = max(d_i, d̄ / 10) / c,  d = diag(JᵀJ),  mean(D) = 1
        """
        d = self.diagonal()
        floored = d.clamp(min=_LEAST_OF_MEAN * float(d.mean()) or 1.0)
        parts = (floored / floored.mean()).rsqrt().split(self._in_shape_flat)
        scale = [part.view(shape) for part, shape in zip(parts, self._in_shape, strict=True)]
        return ScaledJacobianLinearOperator(self.jacobian, scale, self.single)

    def inverse(
        self, damping: float, dense_limit: int = policy.LARGEST_DENSE
    ) -> PyTorchLinearOperator:
        """Return (JᵀJ + λI)⁻¹ for R residuals in D parameters.

        With min(R, D) up to ``dense_limit`` by a dense factorization on the smaller side: of the
        kernel JJᵀ if R < D, which needs a damping, else of JᵀJ. With more than that by conjugate
        gradients to a relative residual of 1e-10, preconditioned by the inverse of the damped
        diagonal.
        """
        R, D = self.jacobian.shape
        if R < D and dense_limit >= R:
            return KernelInverseLinearOperator.from_kernel(self.kernel, damping)
        if dense_limit >= D:
            dense = DenseLinearOperator(self.to_dense(), self.shapes, self.precision)
            return Damped(damping)(dense)
        diagonal = gauss_newton_diagonal(self.jacobian.linearizations, self.jacobian.space)
        return CGInverseLinearOperator(
            self, damping=damping, preconditioner=diagonal.inverse(damping)
        )


def gauss_newton_diagonal(
    linearizations: Sequence[Linearization], space: ParameterSpace | None = None
) -> DiagonalLinearOperator:
    """Return the diagonal of the exact Gauss-Newton matrix as an operator.

    Raises:
        ValueError: If a linearization has other output gradients than the exact ones.
    """
    check_exact(linearizations)
    space = ParameterSpace.of(linearizations) if space is None else space
    joints = [space.zeros(*block.shape) for block in space.blocks]

    def visit(t: int, i: int, block: JacobianBlock) -> None:
        joints[i].add_(block.squared_rows())

    visit_blocks(linearizations, space, visit)
    diagonals = from_joint(joints, space.blocks)
    return DiagonalLinearOperator([diagonal.contiguous() for diagonal in diagonals])


@dataclass(frozen=True)
class MatrixFreeGaussNewton:
    """Recipe: the exact Gauss-Newton matrix by products with the Jacobian.

    JᵀJ

    Args:
        single: Whether inverses (``Woodbury``, ``CheaperSide``, ...) that form it or its kernel do
            so in float32, with an error of some 1e-7 of the largest eigenvalue, below which no
            damping should be. Factorizations, and products with it, are as without it.
    """

    single: bool = False

    def __post_init__(self) -> None:
        check_single(self.single)

    def __call__(self, linearizations: Sequence[Linearization]) -> GaussNewtonLinearOperator:
        return GaussNewtonLinearOperator(JacobianLinearOperator(linearizations), self.single)


@dataclass(frozen=True)
class GaussNewton:
    """Recipe: the exact Gauss-Newton matrix as a dense matrix (ENGD's curvature).

    JᵀJ

    Cost: N S V D + R D² / 2 to build and D² numbers; O(D³) once to invert and D² more; D² per
    product.

    Args:
        single: Whether it is formed in float32, see ``MatrixFreeGaussNewton``.
    """

    single: bool = False

    def __post_init__(self) -> None:
        check_single(self.single)

    def __call__(self, linearizations: Sequence[Linearization]) -> DenseLinearOperator:
        operator = MatrixFreeGaussNewton(self.single)(linearizations)
        return DenseLinearOperator(operator.to_dense(), operator.shapes, operator.precision)


@dataclass(frozen=True)
class BlockDiagonalGaussNewton:
    """Recipe: the exact Gauss-Newton matrix restricted to its diagonal blocks.

    diag_l(J_lᵀJ_l)

    Cost: with n = d_in d_out, N S V n + R n² / 2 to build and n² numbers per layer; O(n³) once to
    invert and n² more; n² per product.

    Args:
        single: Whether the blocks are formed in float32, see ``MatrixFreeGaussNewton``.
    """

    single: bool = False

    def __post_init__(self) -> None:
        check_single(self.single)

    def __call__(self, linearizations: Sequence[Linearization]) -> DenseBlockDiagonalLinearOperator:
        check_exact(linearizations)
        space = ParameterSpace.of(linearizations)
        numbers = sum(block.numel**2 for block in space.blocks)
        what = f"the blocks of JᵀJ of {len(space.blocks)} layers"
        check_memory(what, numbers, space.dtype, space.device, INSTEAD)
        matrices = [space.zeros(block.numel, block.numel) for block in space.blocks]

        def visit(t: int, i: int, block: JacobianBlock) -> None:
            add_gram_(matrices[i], block, self.single)

        visit_blocks(linearizations, space, visit)
        precision = torch.float32 if self.single else space.dtype
        return DenseBlockDiagonalLinearOperator(matrices, space.blocks, space.shapes, precision)


@dataclass(frozen=True)
class DiagonalGaussNewton:
    """Recipe: the diagonal of the exact Gauss-Newton matrix.

    diag(JᵀJ)

    Cost: N S V D to build, D to invert and per product; D numbers.
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> DiagonalLinearOperator:
        return gauss_newton_diagonal(linearizations)
