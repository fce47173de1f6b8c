"""The kernel of the scaled residuals, JJᵀ: matrix-free and dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.jacobian import JacobianLinearOperator
from pinncurv.curvature.kernel_blocks import Side, add_inner_products_
from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.single import check_single
from pinncurv.linearization import Linearization
from pinncurv.linops import (
    Factorization,
    FactorizedInverseLinearOperator,
    SymmetricLinearOperator,
    check_damping,
    factorize,
)
from pinncurv.linops.psd import FACTORIZATION_DTYPE, check_entries
from pinncurv.machine import check_memory, mirror_

# What else to do where a kernel is too large.
INSTEAD = (
    "Take fewer points, an inverse by Nystroem(damping, rank) or PreconditionedCG(damping), the "
    "curvature SubspaceGaussNewton() or KFAC(), or with few parameters GaussNewton()."
)


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
        J = self.jacobian
        return kernel_matrix(J.linearizations, J.space, self.dtype, self.single)

    def factorize(self, damping: float) -> Factorization:
        """Factorize K + λI in float64.

        Args:
            damping: λ, a finite number >= 0.

        Raises:
            FactorizationError: If the damping is zero and the kernel is numerically singular, as it
                is with more residuals than parameters.
        """
        damping, name = check_damping(damping), "the kernel of the residuals"
        R = self.shape[0]
        what = f"the kernel of {R:,} residuals with its factorization"
        known = "matrix" in vars(self)
        check_memory(what, (2 if known else 3) * R * R, FACTORIZATION_DTYPE, self.device, INSTEAD)
        matrix = check_entries(self.matrix, name).to(FACTORIZATION_DTYPE, copy=True)
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


def kernel_matrix(
    linearizations: Sequence[Linearization],
    space: ParameterSpace,
    dtype: torch.dtype,
    single: bool = False,
) -> Float[Tensor, "R R"]:
    """Return JJᵀ in a data type, exactly symmetric.

    Args:
        linearizations: One per term, with the exact output gradients.
        space: The parameters.
        dtype: In which it is computed.
        single: Whether products are formed in float32.

    Raises:
        NotEnoughMemoryError: If it does not fit into the memory.
    """
    R = rows_of(linearizations)
    check_memory(f"the kernel of {R:,} residuals", R * R, dtype, space.device, INSTEAD)
    matrix = torch.zeros(R, R, dtype=dtype, device=space.device)
    for i, sides in enumerate(_sides(linearizations, space, dtype, single)):
        for others in islice(_sides(linearizations, space, dtype, single), i):
            add_inner_products_(matrix, [_lower(a, b) for a in sides for b in others])
        pairs = [(a, b) for j, a in enumerate(sides) for b in sides[: j + 1]]
        add_inner_products_(matrix, pairs)
    return mirror_(matrix)


def rows_of(linearizations: Sequence[Linearization]) -> int:
    """Return R, the number of residuals."""
    return sum(len(lin.x) * lin.num_components for lin in linearizations)


def _sides(
    linearizations: Sequence[Linearization], space: ParameterSpace, dtype: torch.dtype, single: bool
) -> Iterator[list[Side]]:
    """Yield the chunks that are recomputed one by one, and those that are kept together."""
    kept, row = [], 0
    for linearization in linearizations:
        for chunk in linearization:
            blocks = space.arrange(linearization, chunk)
            side = Side.of(row, chunk.residual, blocks, dtype, single)
            row += chunk.residual.numel()
            if linearization.chunk_size is None:
                kept.append(side)
            else:
                del chunk  # or it would live on while the next one is computed
                yield [side]
                del side
    if kept:
        yield kept


def _lower(a: Side, b: Side) -> tuple[Side, Side]:
    """Order two sides such that their block is below of the diagonal."""
    return (a, b) if a.row > b.row else (b, a)


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
