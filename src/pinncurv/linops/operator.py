"""The base of all structured operators: symmetric, on a list of parameter-shaped tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from jaxtyping import Float
from torch import Size, Tensor

from pinncurv.machine import check_memory

if TYPE_CHECKING:
    from pinncurv.linops.psd import FactorizationReport

__all__ = ["PyTorchLinearOperator", "SymmetricLinearOperator", "check_damping"]


def check_damping(damping: float) -> float:
    """Return the damping as a float after checking that it is one.

    λ ∈ [0, ∞)

    Raises:
        ValueError: If the damping is negative, infinite, NaN or not a real number.
    """
    if not isinstance(damping, Real) or not isfinite(damping) or damping < 0:
        raise ValueError(
            f"damping must be a finite number >= 0, got {damping!r}. "
            "Pass a Python float such as 1e-8."
        )
    return float(damping)


def check_dense(operator: PyTorchLinearOperator) -> None:
    """Check that an operator fits into the memory as a matrix.

    Raises:
        NotEnoughMemoryError: If it does not.
    """
    rows, columns = operator.shape
    what = f"the matrix of {type(operator).__name__}, {rows:,} x {columns:,},"
    instead = "Use products with the operator, or parts of it."
    check_memory(what, rows * columns, operator.dtype, operator.device, instead)


class SymmetricLinearOperator(PyTorchLinearOperator):
    """A symmetric linear operator on a list of tensors, immutable after construction.

    C = Cᵀ ∈ ℝᴰˣᴰ

    Subclasses implement ``_matmat`` (see ``PyTorchLinearOperator``) and, where they have one,
    ``inverse``; they override ``to_dense``, ``diagonal`` and ``trace`` where structure makes
    these cheaper than the products with the identity that are used here. C₁ + C₂, C₁ − C₂, 2 C and
    −C are operators of this kind, too, see ``LinearCombination``.

    Args:
        shapes: Shapes of the tensors whose concatenation is ℝᴰ.
        device: Device of the operator.
        dtype: Data type of the vectors that the operator takes and returns.

    Attributes:
        tensors: Returns the tensors that define the operator, None if there are none to keep.
            Averages over steps are averages of these. For operators that are linear in them
            (dense, diagonal) that is the average of the matrices, for Kronecker products it is the
            average of the factors, as is usual for KFAC.
        with_tensors: Returns the operator of the same structure that other tensors define.
        identity: Returns the operator that an average may start from.
        jacobian: J of an operator that sees the network through it alone.
        linearizations: What a matrix-free operator is built from.
        solve_residual: Returns (C + λI)⁻¹Jᵀ r for r in the image of J, of some inverses.
        reports: What was done to factorize what the operator is made of.
    """

    SELF_ADJOINT = True

    # what subclasses may offer, as methods or attributes of any type
    tensors: Any = None
    with_tensors: Any = None
    identity: Any = None
    jacobian: Any = None
    linearizations: Any = ()
    solve_residual: Any = None
    reports: tuple[FactorizationReport, ...] = ()

    def __init__(
        self, shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
    ) -> None:
        sizes = [Size(shape) for shape in shapes]
        super().__init__(sizes, sizes)
        self._device = device
        self._dtype = dtype

    @property
    def shapes(self) -> list[Size]:
        """The shapes of the tensors that the operator acts on."""
        return list(self._in_shape)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def precision(self) -> torch.dtype:
        """The data type that the entries are known in; that of vectors may have more digits."""
        return self.dtype

    def _adjoint(self) -> SymmetricLinearOperator:
        return self

    def __rmatmul__(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Multiply a vector or matrix ``[K, D]``, or lists ``[*shape]``, ``[K, *shape]``, by C.

        x C = (C xᵀ)ᵀ
        """
        if isinstance(x, Tensor):
            return (self @ x.mT).mT if x.ndim == 2 else self @ x
        if all(xi.shape == shape for xi, shape in zip(x, self._in_shape, strict=False)):
            return self @ x
        return [y.movedim(-1, 0) for y in self @ [xi.movedim(0, -1) for xi in x]]

    def __add__(self, other: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return self._combine(other, 1.0)

    def __sub__(self, other: PyTorchLinearOperator) -> PyTorchLinearOperator:
        return self._combine(other, -1.0)

    def __neg__(self) -> SymmetricLinearOperator:
        return self * -1.0

    def __mul__(self, scalar: float) -> SymmetricLinearOperator:
        if not isinstance(scalar, Real):
            return NotImplemented
        return _combined([(float(scalar), self)])

    __rmul__ = __mul__

    def _combine(self, other: PyTorchLinearOperator, sign: float) -> PyTorchLinearOperator:
        if not isinstance(other, SymmetricLinearOperator):
            return super().__add__(other if sign == 1 else sign * other)
        return _combined([(1.0, self), (sign, other)])

    def to_dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix C I."""
        check_dense(self)
        return self @ torch.eye(self.shape[1], device=self.device, dtype=self.dtype)

    def diagonal(self) -> Float[Tensor, " D"]:
        """Return the diagonal C_ii."""
        return self.to_dense().diagonal().clone()

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace Σ_i C_ii."""
        return self.diagonal().sum()

    def inverse(self, damping: float) -> PyTorchLinearOperator:
        """Return (C + λ I)⁻¹, exact or to a tolerance that the inverse states and reports.

        Raises:
            NotImplementedError: If the operator has no inverse of its own.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no structured inverse. "
            f"Use pinncurv.linops.CGInverseLinearOperator(operator, damping={damping!r})."
        )


def _combined(parts: Sequence[tuple[float, SymmetricLinearOperator]]) -> SymmetricLinearOperator:
    from pinncurv.linops.combination import combine  # noqa: PLC0415, it builds on the class above

    return combine(parts)
