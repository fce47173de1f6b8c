"""Groups of parameters as blocks: the joint matrix of a layer's weight and bias, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """A group of parameters with its part of an operator: a linear layer, or one other parameter.

    [W, b] ∈ ℝ^(d_out × (d_in + 1)),  for another parameter vec(θ)ᵀ ∈ ℝ^(1 × numel)

    Attributes:
        name: Name of the layer or parameter, used in error messages.
        weight: Position of the weight ``[d_out, d_in]``, or of the parameter, in the list.
        bias: Position of the bias ``[d_out]`` in the parameter list, ``None`` without bias.
        d_out: Number of outputs; 1 for another parameter.
        d_in: Number of inputs; the number of entries of another parameter.
        stored: Shape in which the weight is stored if not ``[d_out, d_in]``: any shape for another
            parameter, ``[d_in, d_out]`` for a transposed layer.
        kronecker: Whether it is a linear layer, with two Kronecker factors. Another parameter has
            an exact dense matrix A, and B = 1.
    """

    name: str
    weight: int
    bias: int | None
    d_out: int
    d_in: int
    stored: tuple[int, ...] | None = None
    kronecker: bool = True

    @classmethod
    def dense(cls, name: str, position: int, shape: Sequence[int]) -> Block:
        """Return the block of one parameter that is no weight of a linear layer."""
        return cls(name, position, None, 1, torch.Size(shape).numel(), tuple(shape), False)

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of the parameters in the list."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight, or of the other parameter, as it is stored."""
        return (self.d_out, self.d_in) if self.stored is None else self.stored

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the joint matrix, whose last column is the bias."""
        return self.d_out, self.d_in + (self.bias is not None)

    @property
    def numel(self) -> int:
        """Number of parameters in the block."""
        return self.d_out * self.shape[1]

    def to_matrix(self, X: Tensor) -> Tensor:
        """Bring a stored weight, with any further axes first, to ``[..., d_out, d_in]``."""
        if self.stored is None:
            return X
        if self.kronecker:
            return X.mT
        return X.reshape((*X.shape[: X.ndim - len(self.stored)], 1, self.d_in))

    def from_matrix(self, X: Tensor) -> Tensor:
        """Bring ``[..., d_out, d_in]`` to the shape in which the weight is stored."""
        if self.stored is None:
            return X
        return X.mT if self.kronecker else X.reshape((*X.shape[:-2], *self.stored))


def check_blocks(blocks: Sequence[Block], shapes: Sequence[Sequence[int]]) -> None:
    """Check that the blocks cover each parameter exactly once and with the right shape.

    ⨄_l {weight_l, bias_l} = {0, …, P − 1}

    Raises:
        ValueError: If a parameter is missing, covered twice, or of another shape.
    """
    owner: dict[int, str] = {}
    for block in blocks:
        if block.bias == block.weight:
            raise ValueError(
                f"Weight and bias of layer {block.name} must be different parameters, "
                f"got position {block.weight} for both. Pass bias=None without bias."
            )
        wanted = (block.weight_shape, (block.d_out,))
        for position, shape in zip(block.positions, wanted, strict=False):
            if position in owner:
                raise ValueError(
                    f"Each parameter must belong to one block, parameter {position} belongs to "
                    f"{owner[position]} and {block.name}. Join the layers that share it."
                )
            exists = 0 <= position < len(shapes)
            got = tuple(shapes[position]) if exists else f"only {len(shapes)} parameters"
            if got != shape:
                raise ValueError(
                    f"Parameter {position} of layer {block.name} must have shape {shape}, "
                    f"got {got}. Check the block's positions and widths."
                )
            owner[position] = block.name
    missing = [position for position in range(len(shapes)) if position not in owner]
    if missing:
        raise ValueError(
            f"Each parameter must belong to one block, parameters {missing} belong to none. "
            "Add their blocks, or leave them out of the parameter list."
        )


def to_joint(tensors: Sequence[Tensor], blocks: Sequence[Block]) -> list[Shaped[Tensor, "*K _ _"]]:
    """Collect the joint matrices of all blocks from a list in parameter order.

    X_l = [W_l, b_l]

    Tensors ``[*shape]`` (vector) become ``[d_out, d_in + 1]``, and ``[*shape, K]`` (matrix)
    ``[K, d_out, d_in + 1]`` (``d_in`` instead of ``d_in + 1`` without bias).
    """
    joints = []
    for block in blocks:
        X = tensors[block.weight]
        is_matrix = X.ndim > len(block.weight_shape)
        X = block.to_matrix(X.movedim(-1, 0) if is_matrix else X)
        if block.bias is not None:
            bias = tensors[block.bias]
            X = torch.cat([X, (bias.mT if is_matrix else bias).unsqueeze(-1)], -1)
        joints.append(X)
    return joints


def from_joint(joints: Sequence[Shaped[Tensor, "*K _ _"]], blocks: Sequence[Block]) -> list[Tensor]:
    """Distribute the joint matrices of all blocks to a list in parameter order.

    W_l, b_l = X_l[:, :d_in], X_l[:, d_in]

    The inverse of ``to_joint``; the tensors are views of the joint matrices.
    """
    tensors: dict[int, Tensor] = {}
    for X, block in zip(joints, blocks, strict=True):
        is_matrix = X.ndim == 3
        weight = block.from_matrix(X if block.bias is None else X.narrow(-1, 0, block.d_in))
        tensors[block.weight] = weight.movedim(0, -1) if is_matrix else weight
        if block.bias is not None:
            bias = X.select(-1, block.d_in)
            tensors[block.bias] = bias.mT if is_matrix else bias
    return [tensors[position] for position in range(len(tensors))]


def flat_positions(
    blocks: Sequence[Block], shapes: Sequence[Sequence[int]]
) -> list[Int[Tensor, " _"]]:
    """Find each block's entries in the concatenation of all parameters.

    θ[position_l] = vec(X_l), row-major
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.arange(sum(sizes)).split(sizes)
    positions = [x.reshape(shape) for x, shape in zip(flat, shapes, strict=True)]
    return [joint.flatten() for joint in to_joint(positions, blocks)]
