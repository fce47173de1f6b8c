"""Sums, differences and multiples of operators, which are operators of this package again."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from pinncurv.linops import policy
from pinncurv.linops.cg_inverse import CGInverseLinearOperator
from pinncurv.linops.inverses import (
    Damped,
    FactorizedInverseLinearOperator,
    factorize_damped,
    factorize_damped_blocks,
)
from pinncurv.linops.layerwise import Joint, LayerwiseLinearOperator
from pinncurv.linops.operator import (
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    check_damping,
)

Part = tuple[float, SymmetricLinearOperator]
_Kind = TypeVar("_Kind", bound=SymmetricLinearOperator)


class LinearCombination(SymmetricLinearOperator):
    """A linear combination of operators.

    Σ_i c_i C_i

    Cost: the sum of those of the C_i; for the inverse see there.

    Args:
        parts: The pairs (c_i, C_i), on the same space.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        first = parts[0][1]
        super().__init__(first.shapes, first.device, first.dtype)
        self.parts = tuple(parts)

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        products = [[c * y for y in C._matmat(X)] for c, C in self.parts]
        return [sum(ys[1:], ys[0]) for ys in zip(*products, strict=True)]

    def to_dense(self) -> Float[Tensor, "D D"]:
        return _sum(self.parts, lambda C: C.to_dense())

    def diagonal(self) -> Float[Tensor, " D"]:
        return _sum(self.parts, lambda C: C.diagonal())

    def trace(self) -> Float[Tensor, ""]:
        return _sum(self.parts, lambda C: C.trace())

    def inverse(self, damping: float) -> PyTorchLinearOperator:
        """Return (Σ_i c_i C_i + λI)⁻¹, or (C + λ/c I)⁻¹ / c for a multiple c > 0 of one C.

        By a factorization of the matrix up to ``policy.LARGEST_DENSE`` parameters, else by
        conjugate gradients. The C_i are taken to be positive semidefinite; if a c_i is negative,
        the matrix must be positive definite with the damping.

        Raises:
            FactorizationError: If the damped matrix is not positive definite.
        """
        damping = check_damping(damping)
        if (inverse := _inverse_of_multiple(self.parts, damping)) is not None:
            return inverse
        if self.shape[0] > policy.LARGEST_DENSE:
            return CGInverseLinearOperator(self, damping)
        factorization = factorize_damped(
            self.to_dense(), "the sum of operators", damping, _is_sum(self.parts)
        )
        return FactorizedInverseLinearOperator(factorization, self.shapes, self.dtype)


class LayerwiseCombination(LayerwiseLinearOperator):
    """A linear combination of operators that are block diagonal over the same layers.

    Σ_i c_i C_i = diag_l(Σ_i c_i C_il)

    Args:
        parts: The pairs (c_i, C_i).
    """

    def __init__(self, parts: Sequence[tuple[float, LayerwiseLinearOperator]]) -> None:
        first = parts[0][1]
        super().__init__(first.blocks, first.shapes, first.device, first.dtype)
        self.parts = tuple(parts)

    def _apply(self, layer: int, X: Joint) -> Joint:
        return _sum(self.parts, lambda C: C._apply(layer, X))

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        return _sum(self.parts, lambda C: C.block_to_dense(layer))

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        return _sum(self.parts, lambda C: C._block_diagonal(layer))

    def trace(self) -> Float[Tensor, ""]:
        return _sum(self.parts, lambda C: C.trace())

    def inverse(self, damping: float) -> PyTorchLinearOperator:
        """Return diag_l(Σ_i c_i C_il + λI)⁻¹, see ``LinearCombination``, layer by layer."""
        damping = check_damping(damping)
        if (inverse := _inverse_of_multiple(self.parts, damping)) is not None:
            return inverse
        if max(block.numel for block in self.blocks) > policy.LARGEST_DENSE:
            return CGInverseLinearOperator(self, damping)
        return factorize_damped_blocks(self, damping, semidefinite=_is_sum(self.parts))


def combine(parts: Sequence[Part]) -> LinearCombination | LayerwiseCombination:
    """Return Σ_i c_i C_i, layer by layer if all C_i are block diagonal over the same layers.

    Raises:
        ValueError: If two operators differ in shapes, device or data type.
    """
    flat = [(c * k, C) for c, given in parts for k, C in getattr(given, "parts", [(1.0, given)])]
    spaces = [(list(map(tuple, C.shapes)), C.device, C.dtype) for _, C in flat]
    for space in spaces:
        if space != spaces[0]:
            raise ValueError(
                "Operators must act on the same (shapes, device, dtype) to be added, got "
                f"{spaces[0]} and {space}."
            )
    layerwise = [(c, C) for c, C in flat if isinstance(C, LayerwiseLinearOperator)]
    if len(layerwise) == len(flat) and len({C.blocks for _, C in layerwise}) == 1:
        return LayerwiseCombination(layerwise)
    return LinearCombination(flat)


def _sum(parts: Sequence[tuple[float, _Kind]], function: Callable[[_Kind], Tensor]) -> Tensor:
    """Return Σ_i c_i f(C_i)."""
    (c, C), *others = parts
    total = c * function(C)
    for c, C in others:
        total = total + c * function(C)
    return total


def _is_sum(parts: Sequence[tuple[float, SymmetricLinearOperator]]) -> bool:
    """Whether the combination is positive semidefinite because the operators are."""
    return all(c >= 0 for c, _ in parts)


def _inverse_of_multiple(
    parts: Sequence[tuple[float, SymmetricLinearOperator]], damping: float
) -> PyTorchLinearOperator | None:
    """Return (c C + λI)⁻¹ by the inverse of C; None for other combinations."""
    ((c, C), *others) = parts
    return None if others or c <= 0 else (1 / c) * Damped(damping / c)(C)
