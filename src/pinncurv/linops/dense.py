"""Operators that are given by their entries: dense, block diagonal, diagonal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops import policy
from pinncurv.linops.blocks import Block
from pinncurv.linops.inverses import (
    BlockFactorizedInverseLinearOperator,
    FactorizedInverseLinearOperator,
)
from pinncurv.linops.layerwise import Joint, LayerwiseLinearOperator
from pinncurv.linops.operator import SymmetricLinearOperator, check_damping
from pinncurv.linops.psd import (
    FACTORIZATION_DTYPE,
    EigenFactorization,
    Factorization,
    FactorizationError,
    cholesky,
    eigh,
    symmetrize,
)
from pinncurv.machine import check_memory

_NAME = "the dense matrix"

# What else to do where it is too large.
_INSTEAD = (
    "Take an inverse by PreconditionedCG(damping), or a curvature with smaller blocks as KFAC()."
)


def _check_fits(matrix: Float[Tensor, "n n"], name: str) -> None:
    """Check that a factorization fits into the memory."""
    n = len(matrix)
    what = f"the factorization of {name} of {n:,} parameters"
    check_memory(what, 2 * n * n, FACTORIZATION_DTYPE, matrix.device, _INSTEAD)


def _damped(
    matrix: Float[Tensor, "n n"],
    name: str,
    damping: float,
    decompose: Callable[[], EigenFactorization],
) -> Factorization:
    """Factorize C + λI, by the eigendecomposition of C unless that takes too long."""
    if damping > 0 and len(matrix) > policy.LARGEST_EIGH:
        _check_fits(matrix, name)
        shifted = symmetrize(matrix, name)
        shifted.diagonal().add_(damping)
        factorization = cholesky(shifted, name, damping)
        if factorization is not None:
            return factorization
    return decompose().damped(damping)


class DenseLinearOperator(SymmetricLinearOperator):
    """A symmetric matrix on the concatenated parameters.

    C ∈ ℝᴰˣᴰ

    Cost: D² numbers and D² per product; the inverse takes O(D³) once for all dampings, D² numbers
    more, and 2 D² per product. Above ``policy.LARGEST_EIGH`` it takes D³ / 3 for each damping and
    D² per product.

    Args:
        matrix: C.
        shapes: Shapes of the parameters.
        precision: The data type that C is known in, by default its own.

    Raises:
        ValueError: If the matrix does not fit the shapes of the parameters.
    """

    def __init__(
        self,
        matrix: Float[Tensor, "D D"],
        shapes: Sequence[Sequence[int]],
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(shapes, matrix.device, matrix.dtype)
        self._precision = precision or matrix.dtype
        if matrix.shape != self.shape:
            raise ValueError(
                f"The matrix must have shape {self.shape} to act on the shapes "
                f"{[tuple(shape) for shape in self._in_shape]}, got {tuple(matrix.shape)}. "
                "Pass the matrix on the concatenation of all parameters."
            )
        self.matrix = matrix

    @property
    def precision(self) -> torch.dtype:
        return self._precision

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        flat = self.matrix @ torch.cat([x.reshape(-1, x.shape[-1]) for x in X])
        return [y.reshape(x.shape) for y, x in zip(flat.split(self._in_shape_flat), X, strict=True)]

    def to_dense(self) -> Float[Tensor, "D D"]:
        return self.matrix.clone()

    def diagonal(self) -> Float[Tensor, " D"]:
        return self.matrix.diagonal().clone()

    @cached_property
    def eigh(self) -> EigenFactorization:
        """The eigendecomposition C = V diag(max(m, 0)) Vᵀ, computed once, in float64."""
        _check_fits(self.matrix, _NAME)
        return eigh(symmetrize(self.matrix, _NAME), _NAME)

    def inverse(self, damping: float) -> FactorizedInverseLinearOperator:
        """Return the damped inverse.

        (C + λ I)⁻¹ = V diag(1 / (max(m, 0) + λ)) Vᵀ

        Of large matrices it is (C + λ I)⁻¹ by a Cholesky factorization, the same for semidefinite
        C, where that succeeds.

        Raises:
            FactorizationError: If the damping is zero and the matrix is numerically singular.
            NotEnoughMemoryError: If a factorization does not fit into the memory.
        """
        damped = _damped(self.matrix, _NAME, check_damping(damping), lambda: self.eigh)
        return FactorizedInverseLinearOperator(damped, self._in_shape, self.dtype)

    def tensors(self) -> list[Tensor]:
        return [self.matrix]

    def tensor_names(self, parameters: Sequence[str]) -> list[str]:
        """Names of ``tensors``, from those of the parameters."""
        return [", ".join(parameters)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> DenseLinearOperator:
        (matrix,) = tensors
        return type(self)(matrix, self._in_shape, self.precision)

    def identity(self) -> DenseLinearOperator:
        return self.with_tensors([torch.eye(len(self.matrix)).to(self.matrix)])


class DenseBlockDiagonalLinearOperator(LayerwiseLinearOperator):
    """Block diagonal over layers, with one dense matrix per layer.

    C = diag(C_1, …, C_L)

    Cost: n² numbers and n² per product; the inverse takes O(n³) once for all dampings, n² numbers
    more, and 2 n² per product. Blocks above ``policy.LARGEST_EIGH`` take n³ / 3 for each damping
    and n² per product.

    Args:
        matrices: One symmetric matrix per layer on the row-major flattened joint matrix.
        precision: The data type that they are known in, by default their own.

    Raises:
        ValueError: If the matrices do not fit the layers.
    """

    def __init__(
        self,
        matrices: Sequence[Float[Tensor, "_ _"]],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(blocks, shapes, matrices[0].device, matrices[0].dtype)
        self._precision = precision or matrices[0].dtype
        self.matrices = tuple(matrices)
        self._eigh: dict[int, EigenFactorization] = {}
        got = [tuple(matrix.shape) for matrix in self.matrices]
        expected = [(block.numel, block.numel) for block in self.blocks]
        if got != expected:
            raise ValueError(
                f"The matrices must have shapes {expected}, got {got}. "
                "Pass one matrix per layer, on its weight and bias together."
            )

    @property
    def precision(self) -> torch.dtype:
        return self._precision

    def _apply(self, layer: int, X: Joint) -> Joint:
        return (X.flatten(start_dim=-2) @ self.matrices[layer].mT).reshape(X.shape)

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        return self.matrices[layer].clone()

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        return self.matrices[layer].diagonal().reshape(self.blocks[layer].shape)

    def _name(self, layer: int) -> str:
        return f"layer {self.blocks[layer].name}, dense block"

    def eigh(self, layer: int) -> EigenFactorization:
        """The eigendecomposition of one layer's block, computed once, in float64."""
        if layer not in self._eigh:
            name = self._name(layer)
            _check_fits(self.matrices[layer], name)
            self._eigh[layer] = eigh(symmetrize(self.matrices[layer], name), name)
        return self._eigh[layer]

    def inverse(self, damping: float) -> BlockFactorizedInverseLinearOperator:
        """Return the damped inverse.

        (C_l + λ I)⁻¹ = V_l diag(1 / (max(m_l, 0) + λ)) V_lᵀ

        Large blocks by Cholesky factorizations of C_l + λ I, the same for semidefinite C_l, where
        these succeed.

        Raises:
            FactorizationError: If the damping is zero and a block is numerically singular.
            NotEnoughMemoryError: If a factorization does not fit into the memory.
        """
        damping = check_damping(damping)
        damped = [
            _damped(matrix, self._name(i), damping, partial(self.eigh, i))
            for i, matrix in enumerate(self.matrices)
        ]
        return BlockFactorizedInverseLinearOperator(damped, self.blocks, self._in_shape, self.dtype)

    def tensors(self) -> list[Tensor]:
        return list(self.matrices)

    def tensor_names(self, parameters: Sequence[str]) -> list[str]:
        """Names of ``tensors``, in their order, from those of the parameters."""
        return [parameters[block.weight] for block in self.blocks]

    def with_tensors(self, tensors: Sequence[Tensor]) -> DenseBlockDiagonalLinearOperator:
        return type(self)(tensors, self.blocks, self._in_shape, self.precision)

    def identity(self) -> DenseBlockDiagonalLinearOperator:
        return self.with_tensors([torch.eye(len(M)).to(M) for M in self.matrices])


class DiagonalLinearOperator(SymmetricLinearOperator):
    """A diagonal matrix, given as one tensor per parameter of the parameter's shape.

    C = diag(c)

    Cost: D numbers, D per product and to invert.
    """

    def __init__(self, diagonals: Sequence[Tensor]) -> None:
        first = diagonals[0]
        super().__init__([d.shape for d in diagonals], first.device, first.dtype)
        self.diagonals = tuple(diagonals)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        return [d.unsqueeze(-1) * x for d, x in zip(self.diagonals, X, strict=True)]

    def to_dense(self) -> Float[Tensor, "D D"]:
        return self.diagonal().diag()

    def diagonal(self) -> Float[Tensor, " D"]:
        return torch.cat([d.flatten() for d in self.diagonals])

    def inverse(self, damping: float) -> DiagonalLinearOperator:
        """Return diag(1 / (max(c, 0) + λ)).

        Raises:
            FactorizationError: If an entry is not finite, or zero and the damping is zero.
        """
        damping = check_damping(damping)
        c = self.diagonal()
        if not bool(c.isfinite().all()) or (damping == 0 and not c.min().item() > 0):
            raise FactorizationError(
                "The diagonal must be finite, and positive to be inverted without damping, "
                f"got entries in [{c.min().item():.1e}, {c.max().item():.1e}]. "
                "Pass damping > 0, or look for a diverged loss."
            )
        return DiagonalLinearOperator([1 / (d.clamp(min=0) + damping) for d in self.diagonals])

    def tensors(self) -> list[Tensor]:
        return list(self.diagonals)

    def tensor_names(self, parameters: Sequence[str]) -> list[str]:
        """Names of ``tensors``, in their order, from those of the parameters."""
        return list(parameters)

    def with_tensors(self, tensors: Sequence[Tensor]) -> DiagonalLinearOperator:
        return type(self)(tensors)

    def identity(self) -> DiagonalLinearOperator:
        return self.with_tensors([torch.ones_like(d) for d in self.diagonals])
