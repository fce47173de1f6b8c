"""Operators on the parameters of some layers only, and one operator made of several such."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Size, Tensor

from pinncurv.linops import policy
from pinncurv.linops.blocks import Block, check_blocks, flat_positions, from_joint, to_joint
from pinncurv.linops.cg_inverse import CGInverseLinearOperator
from pinncurv.linops.dense import (
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
)
from pinncurv.linops.inverses import Damped
from pinncurv.linops.kronecker import SumKroneckerLinearOperator
from pinncurv.linops.layerwise import Joint, LayerwiseLinearOperator
from pinncurv.linops.operator import PyTorchLinearOperator, SymmetricLinearOperator


@dataclass(frozen=True)
class Selection:
    """The parameters of some layers, in the order in which they stand among all parameters.

    Attributes:
        positions: Their positions in the list of all parameters.
        shapes: Their shapes.
        blocks: The layers, whose positions count the selected parameters.
    """

    positions: tuple[int, ...]
    shapes: tuple[Size, ...]
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, blocks: Sequence[Block], shapes: Sequence[Sequence[int]]) -> Selection:
        """Select layers, whose positions count all parameters, from the shapes of these.

        Raises:
            ValueError: If there is no layer, or one does not fit the shapes.
        """
        positions = sorted({position for block in blocks for position in block.positions})
        if not positions or positions[0] < 0 or positions[-1] >= len(shapes):
            raise ValueError(
                f"The layers must be one or more of those of the operator's {len(shapes)} "
                f"parameters, got {list(blocks)}. Take them from operator.blocks or from "
                "ParameterSpace.blocks."
            )
        local: dict[int | None, int] = {position: i for i, position in enumerate(positions)}
        renumbered = tuple(
            replace(block, weight=local[block.weight], bias=local.get(block.bias))
            for block in blocks
        )
        selected = tuple(Size(shapes[position]) for position in positions)
        check_blocks(renumbered, selected)
        return cls(tuple(positions), selected, renumbered)


class RestrictedLinearOperator(SymmetricLinearOperator):
    """Any symmetric operator on the parameters of some layers only.

    P C Pᵀ, P selects parameters

    Cost: a product is one with C.
    """

    def __init__(self, operator: PyTorchLinearOperator, blocks: Sequence[Block]) -> None:
        self.operator = operator
        self.layers = tuple(blocks)
        self.selection = Selection.of(blocks, operator._in_shape)
        super().__init__(self.selection.shapes, operator.device, operator.dtype)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The layers, whose positions count the selected parameters."""
        return self.selection.blocks

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        whole = [X[0].new_zeros(*shape, X[0].shape[-1]) for shape in self.operator._in_shape]
        for position, x in zip(self.selection.positions, X, strict=True):
            whole[position] = x
        Y = self.operator._matmat(whole)
        return [Y[position] for position in self.selection.positions]

    def inverse(self, damping: float) -> PyTorchLinearOperator:
        """Return the damped inverse (P C Pᵀ + λ I)⁻¹.

        It is the restriction of that of C if C has no entries between layers. Otherwise it is
        dense up to ``policy.LARGEST_DENSE`` parameters, else by conjugate gradients.
        """
        if isinstance(self.operator, LayerwiseLinearOperator | DiagonalLinearOperator):
            return restrict(self.operator.inverse(damping), self.layers)
        if self.shape[0] <= policy.LARGEST_DENSE:
            return DenseLinearOperator(self.to_dense(), self.shapes).inverse(damping)
        return CGInverseLinearOperator(self, damping)


@singledispatch
def restrict(operator: PyTorchLinearOperator, blocks: Sequence[Block]) -> SymmetricLinearOperator:
    """Restrict a symmetric operator to the parameters of some layers.

    C ↦ P C Pᵀ, P selects parameters

    The result acts on the selected parameters alone, in their order among all of them: its spectrum
    has no zeros of parameters that were left out, and its damped inverse is that of the block. The
    layers come from ``operator.blocks`` or ``ParameterSpace.blocks``; those of the result count the
    selected parameters. Kronecker products and dense blocks stay such; register the restriction of
    another structure with ``@restrict.register``.

    Raises:
        ValueError: If there is no layer, or one does not fit the operator.
    """
    return RestrictedLinearOperator(operator, blocks)


def _indices(operator: LayerwiseLinearOperator, blocks: Sequence[Block]) -> list[int]:
    """Find layers in a block-diagonal operator."""
    unknown = [block for block in blocks if block not in operator.blocks]
    if unknown:
        raise ValueError(
            f"The layers must be among {[block.name for block in operator.blocks]} of the "
            f"operator, got {unknown}. Take them from operator.blocks."
        )
    return [operator.blocks.index(block) for block in blocks]


@restrict.register
def _(operator: SumKroneckerLinearOperator, blocks: Sequence[Block]) -> SumKroneckerLinearOperator:
    factors = [operator.factors[i] for i in _indices(operator, blocks)]
    selection = Selection.of(blocks, operator.shapes)
    return SumKroneckerLinearOperator(factors, selection.blocks, selection.shapes, operator.terms)


@restrict.register
def _(
    operator: DenseBlockDiagonalLinearOperator, blocks: Sequence[Block]
) -> DenseBlockDiagonalLinearOperator:
    matrices = [operator.matrices[i] for i in _indices(operator, blocks)]
    selection = Selection.of(blocks, operator.shapes)
    return DenseBlockDiagonalLinearOperator(matrices, selection.blocks, selection.shapes)


class BlockDiagonalLinearOperator(LayerwiseLinearOperator):
    """Block diagonal over layers, with an operator of its own for each layer's parameters.

    C = diag(C_1, …, C_L)

    Cost: the sum of those of the layers' operators. ``block_diagonal`` builds it.
    """

    def __init__(self, operators: Sequence[PyTorchLinearOperator], blocks: Sequence[Block]) -> None:
        first, shapes = operators[0], _shapes(blocks)
        super().__init__(blocks, shapes, first.device, first.dtype)
        self.operators = tuple(operators)
        self.selections = tuple(Selection.of([block], shapes) for block in self.blocks)
        for block, selection, operator in zip(blocks, self.selections, operators, strict=True):
            expected = (list(selection.shapes), first.device, first.dtype)
            got = (operator._in_shape, operator.device, operator.dtype)
            if got != expected:
                raise ValueError(
                    f"The operator of layer {block.name} must act on (shapes, device, dtype) "
                    f"{expected}, got {got}. Use restrict(operator, [block])."
                )

    def _apply(self, layer: int, X: Joint) -> Joint:
        blocks = self.selections[layer].blocks
        return to_joint(self.operators[layer] @ from_joint([X], blocks), blocks)[0]

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        operator, selection = self.operators[layer], self.selections[layer]
        if isinstance(operator, SymmetricLinearOperator):
            dense = operator.to_dense()
        else:
            dense = operator @ torch.eye(operator.shape[1], device=self.device, dtype=self.dtype)
        (position,) = flat_positions(selection.blocks, selection.shapes)
        return dense[position.unsqueeze(1), position]

    def inverse(self, damping: float) -> BlockDiagonalLinearOperator:
        """Return the damped inverse, each block's by ``Damped``."""
        return BlockDiagonalLinearOperator(list(map(Damped(damping), self.operators)), self.blocks)


def _shapes(blocks: Sequence[Block]) -> list[tuple[int, ...]]:
    """Return the shapes of the parameters of some layers, in the order of their positions."""
    shapes = {block.weight: block.weight_shape for block in blocks}
    shapes |= {block.bias: (block.d_out,) for block in blocks if block.bias is not None}
    return [shapes[position] for position in sorted(shapes)]


def block_diagonal(
    operators: Sequence[PyTorchLinearOperator], blocks: Sequence[Block]
) -> BlockDiagonalLinearOperator:
    """Take each layer's block from an operator of its own.

    diag(P_1 C_1 P_1ᵀ, …, P_L C_L P_Lᵀ), P_l selects the parameters of layer l

    There is one operator per layer: on all parameters, of which the layer's block is taken, or on
    the layer's parameters alone. For example KFAC for all layers but the last, which gets the exact
    block:

        block_diagonal([kfac, kfac, exact], kfac.blocks)

    Raises:
        ValueError: If there is not one operator per layer, or one does not fit.
    """
    if not blocks or len(operators) != len(blocks):
        raise ValueError(
            f"There must be one operator for each of the {len(blocks)} layers, got "
            f"{len(operators)}. Repeat an operator that is meant for several layers."
        )
    shapes = _shapes(blocks)
    return BlockDiagonalLinearOperator(
        [
            operator
            if operator._in_shape == list(Selection.of([block], shapes).shapes)
            else restrict(operator, [block])
            for operator, block in zip(operators, blocks, strict=True)
        ],
        blocks,
    )
