"""The base of all structured operators: symmetric, on a list of parameter-shaped tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from numbers import Real
from typing import Protocol, runtime_checkable

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from jaxtyping import Float
from torch import Size, Tensor

__all__ = ["PyTorchLinearOperator", "SymmetricLinearOperator", "check_damping"]


def check_damping(damping: float) -> float:
    """Return the damping as a float after checking that it is one.

    λ ∈ [0, ∞)

    Args:
        damping: The damping λ.

    Raises:
        ValueError: If the damping is negative, infinite, NaN or not a real number.
    """
    if not isinstance(damping, Real) or not isfinite(damping) or damping < 0:
        raise ValueError(
            f"damping must be a finite number >= 0, got {damping!r}. "
            "Pass a Python float such as 1e-8."
        )
    return float(damping)


class SymmetricLinearOperator(PyTorchLinearOperator):
    """A symmetric linear operator on a list of tensors, immutable after construction.

    C = Cᵀ ∈ ℝᴰˣᴰ

    Subclasses implement ``_matmat`` (see ``PyTorchLinearOperator``) and, where they have one,
    ``inverse``; they override ``to_dense``, ``diagonal`` and ``trace`` where structure makes
    these cheaper than the products with the identity that are used here.
    """

    SELF_ADJOINT = True

    def __init__(
        self, shapes: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Store the space that the operator acts on.

        Args:
            shapes: Shapes of the tensors whose concatenation is ℝᴰ.
            device: Device of the operator.
            dtype: Data type of the vectors that the operator takes and returns.
        """
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
        """The device of the operator."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the operator."""
        return self._dtype

    def _adjoint(self) -> SymmetricLinearOperator:
        return self

    def __rmatmul__(self, x: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Multiply from the left.

        x C = (C xᵀ)ᵀ

        Args:
            x: A vector ``[D]``, a matrix ``[K, D]``, or a list of tensors ``[*shape]`` (vector)
                or ``[K, *shape]`` (matrix).
        """
        if isinstance(x, Tensor):
            return (self @ x.mT).mT if x.ndim == 2 else self @ x
        if all(xi.shape == shape for xi, shape in zip(x, self._in_shape, strict=False)):
            return self @ x
        return [y.movedim(-1, 0) for y in self @ [xi.movedim(0, -1) for xi in x]]

    def to_dense(self) -> Float[Tensor, "D D"]:
        """Return the operator as a matrix.

        C I
        """
        return self @ torch.eye(self.shape[1], device=self.device, dtype=self.dtype)

    def diagonal(self) -> Float[Tensor, " D"]:
        """Return the diagonal.

        C_ii
        """
        return self.to_dense().diagonal().clone()

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace.

        Σ_i C_ii
        """
        return self.diagonal().sum()

    def inverse(self, damping: float) -> PyTorchLinearOperator:
        """Return the damped inverse.

        (C + λ I)⁻¹

        Args:
            damping: The damping λ, a finite number >= 0.

        Raises:
            NotImplementedError: If the operator has no inverse of its own.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has no structured inverse. "
            f"Use pinncurv.linops.CGInverseLinearOperator(operator, damping={damping!r})."
        )


@runtime_checkable
class Averageable(Protocol):
    """An operator that is defined by tensors which can be averaged over steps.

    C = C(T₁, T₂, …)

    An exponential moving average of such operators averages the tensors. For operators that are
    linear in their tensors (dense, diagonal) that is the average of the matrices, for Kronecker
    products it is the average of the factors, as is usual for KFAC.
    """

    def tensors(self) -> list[Tensor]:
        """The tensors that define the operator."""
        ...

    def with_tensors(self, tensors: list[Tensor]) -> Averageable:
        """The operator of the same structure that other tensors define."""
        ...

    def identity(self) -> Averageable:
        """The operator of the same structure that represents the start value of an average."""
        ...
