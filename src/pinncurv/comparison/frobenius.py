"""Similarity in the Frobenius inner product: of two operators, per layer, per pair of layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.comparison.checks import check_finite, check_same_space, describe
from pinncurv.comparison.products import COLUMNS, columns, share_layers
from pinncurv.linops import (
    Block,
    LayerwiseLinearOperator,
    PyTorchLinearOperator,
    check_blocks,
    flat_positions,
)


@dataclass(frozen=True)
class FrobeniusComparison:
    """Inner products of two operators, or of many pairs of their blocks at once.

    ⟨A, B⟩ = tr(AᵀB) = Σ_ij A_ij B_ij

    Attributes:
        inner: ⟨A, B⟩ ``[]``, ``[L]`` over layers, or ``[L, L]`` over pairs of layers.
        squared_norm: ‖A‖² of the same shape.
        squared_reference_norm: ‖B‖² of the same shape.
        squared_error: ‖A − B‖² of the same shape, summed up from differences.
    """

    inner: Float[Tensor, "*layers"]
    squared_norm: Float[Tensor, "*layers"]
    squared_reference_norm: Float[Tensor, "*layers"]
    squared_error: Float[Tensor, "*layers"]

    @property
    def cosine(self) -> Float[Tensor, "*layers"]:
        """⟨A, B⟩ / (‖A‖ ‖B‖) in [-1, 1]; 0 if one of the two is zero, 1 if both are."""
        norms = self.squared_norm.sqrt() * self.squared_reference_norm.sqrt()
        both_zero = (self.squared_norm == 0) & (self.squared_reference_norm == 0)
        cosine = torch.where(norms > 0, self.inner / norms, both_zero.double())
        return cosine.clamp(-1, 1)

    @property
    def relative_error(self) -> Float[Tensor, "*layers"]:
        """‖A − B‖ / ‖B‖; if B is zero 0 for A = 0 and inf otherwise."""
        ratio = (self.squared_error / self.squared_reference_norm).sqrt()
        return torch.where(self.squared_error > 0, ratio, torch.zeros_like(ratio))

    def total(self) -> FrobeniusComparison:
        """Return the comparison of the matrices that consist of all of these blocks."""
        return self._map(lambda part: part.sum())

    def diagonal(self) -> FrobeniusComparison:
        """Return the comparison of the diagonal blocks, ``[L, L]`` to ``[L]``."""
        return self._map(lambda part: part.diagonal())

    def _map(self, function: Callable[[Tensor], Tensor]) -> FrobeniusComparison:
        return FrobeniusComparison(*map(function, vars(self).values()))


def entrywise_products(X: Float[Tensor, "*s"], Y: Float[Tensor, "*s"]) -> Float[Tensor, " 4 *s"]:
    """Return what sums up to the four inner products of a comparison, in that order."""
    return torch.stack([X * Y, X.square(), Y.square(), (X - Y).square()])


def frobenius(A: PyTorchLinearOperator, B: PyTorchLinearOperator) -> FrobeniusComparison:
    """Compare two operators exactly.

    cos = ⟨A, B⟩ / (‖A‖ ‖B‖),  error = ‖A − B‖ / ‖B‖

    The second operator is the reference of the error.

    Layer by layer if both are block diagonal over the same layers, otherwise from the columns,
    of which a few are held at a time: D products with each operator. A dense operator's columns
    cost nothing, so that a matrix-free one that is compared several times is best made dense.
    """
    D = check_same_space(A, B)
    if share_layers(A, B):
        return frobenius_by_layer(A, B).total()
    return _compare_columns(A, B, [torch.arange(D, device=A.device)]).total()


def frobenius_by_layer(
    A: PyTorchLinearOperator,
    B: PyTorchLinearOperator,
    blocks: Sequence[Block] | None = None,
) -> FrobeniusComparison:
    """Compare the diagonal blocks of two operators exactly.

    ⟨A_ll, B_ll⟩, l = 1, …, L
    """
    return frobenius_by_layer_pair(A, B, blocks).diagonal()


def frobenius_by_layer_pair(
    A: PyTorchLinearOperator,
    B: PyTorchLinearOperator,
    blocks: Sequence[Block] | None = None,
) -> FrobeniusComparison:
    """Compare all blocks of two operators exactly.

    ⟨A_kl, B_kl⟩, k, l = 1, …, L

    Where one operator has no off-diagonal blocks their cosine is 0.
    """
    check_same_space(A, B)
    layers = layers_of(A, B, blocks=blocks)
    if share_layers(A, B) and isinstance(A, LayerwiseLinearOperator) and A.blocks == layers:
        return _compare_blocks(A, B)
    return _compare_columns(A, B, layer_positions(A, layers))


def layers_of(
    *operators: PyTorchLinearOperator, blocks: Sequence[Block] | None
) -> tuple[Block, ...]:
    """Return the layers that were given, or else those of the first operator that has some."""
    if blocks is None:
        known = [op.blocks for op in operators if isinstance(op, LayerwiseLinearOperator)]
        if not known:
            names = " and ".join(describe(operator) for operator in operators)
            raise ValueError(
                f"The layers must be known to compare layers, but {names} have none. "
                "Pass blocks=ParameterSpace.of(...).blocks."
            )
        blocks = known[0]
    check_blocks(blocks, operators[0]._in_shape)
    return tuple(blocks)


def layer_positions(operator: PyTorchLinearOperator, blocks: Sequence[Block]) -> list[Tensor]:
    """Return the indices of each layer's parameters, on the operator's device."""
    return [p.to(operator.device) for p in flat_positions(blocks, operator._in_shape)]


def _compare_blocks(A: LayerwiseLinearOperator, B: PyTorchLinearOperator) -> FrobeniusComparison:
    """Both operators are zero outside of the diagonal blocks."""
    assert isinstance(B, LayerwiseLinearOperator)
    sums = []
    for i, block in enumerate(A.blocks):
        X, Y = (
            check_finite(op.block_to_dense(i).double(), f"{describe(op)}, layer {block.name}")
            for op in (A, B)
        )
        sums.append(entrywise_products(X, Y).sum((1, 2)))
    return FrobeniusComparison(*torch.stack(sums, 1).diag_embed())


def _compare_columns(
    A: PyTorchLinearOperator, B: PyTorchLinearOperator, positions: Sequence[Tensor]
) -> FrobeniusComparison:
    """Sum over the entries of each block, a few columns at a time."""
    L = len(positions)
    sums = torch.zeros(4, L, L, dtype=torch.float64, device=A.device)
    for column, position in enumerate(positions):
        for chunk in position.split(COLUMNS):
            X = columns(A, chunk)
            Y = X if B is A else columns(B, chunk)
            products = entrywise_products(X, Y).sum(2)
            for row, rows in enumerate(positions):
                sums[:, row, column] += products[:, rows].sum(1)
    return FrobeniusComparison(*sums)
