"""Layers as blocks: the joint matrix of a layer's weight and bias, to it and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class LayerBlock:
    """The part of the parameter space that belongs to one linear layer.

    [W, b] ∈ ℝ^(d_out × (d_in + 1))

    Attributes:
        name: Name of the layer, used in error messages.
        weight: Position of the weight ``[d_out, d_in]`` in the parameter list.
        bias: Position of the bias ``[d_out]`` in the parameter list, ``None`` without bias.
        d_out: Number of outputs.
        d_in: Number of inputs.
    """

    name: str
    weight: int
    bias: int | None
    d_out: int
    d_in: int

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the joint matrix, whose last column is the bias."""
        return self.d_out, self.d_in + (self.bias is not None)

    @property
    def numel(self) -> int:
        """Number of parameters in the block."""
        return self.d_out * self.shape[1]


def check_blocks(blocks: Sequence[LayerBlock], shapes: Sequence[Sequence[int]]) -> None:
    """Check that the blocks cover each parameter exactly once and with the right shape.

    ⨄_l {weight_l, bias_l} = {0, …, P − 1}

    Args:
        blocks: The blocks.
        shapes: The shapes of all P parameters.

    Raises:
        ValueError: If a parameter is missing, covered twice, or of another shape.
    """
    owner: dict[int, str] = {}
    for block in blocks:
        expected = {block.weight: (block.d_out, block.d_in)}
        if block.bias is not None:
            expected[block.bias] = (block.d_out,)  # type: ignore[assignment]
            if block.bias == block.weight:
                raise ValueError(
                    f"Weight and bias of layer {block.name} must be different parameters, "
                    f"received position {block.weight} for both. Pass bias=None without bias."
                )
        for position, shape in expected.items():
            if position in owner:
                raise ValueError(
                    f"Each parameter must belong to one block, parameter {position} belongs to "
                    f"{owner[position]} and {block.name}. Join the layers that share it."
                )
            if not 0 <= position < len(shapes) or tuple(shapes[position]) != shape:
                received = (
                    tuple(shapes[position])
                    if 0 <= position < len(shapes)
                    else f"only {len(shapes)} parameters"
                )
                raise ValueError(
                    f"Parameter {position} of layer {block.name} must have shape {shape}, "
                    f"received {received}. Check the block's positions and widths."
                )
            owner[position] = block.name
    missing = [position for position in range(len(shapes)) if position not in owner]
    if missing:
        raise ValueError(
            f"Each parameter must belong to one block, parameters {missing} belong to none. "
            "Add their layers, or leave them out of the parameter list."
        )


def to_joint(
    tensors: Sequence[Tensor], blocks: Sequence[LayerBlock]
) -> list[Shaped[Tensor, "*K _ _"]]:
    """Collect the joint matrices of all blocks from a list in parameter order.

    X_l = [W_l, b_l]

    Args:
        tensors: Tensors ``[*shape]`` (vector) or ``[*shape, K]`` (matrix) in parameter order.
        blocks: The blocks.

    Returns:
        One tensor per block, ``[d_out, d_in + 1]`` for a vector and ``[K, d_out, d_in + 1]`` for a
        matrix (``d_in`` instead of ``d_in + 1`` without bias).
    """
    joints = []
    for block in blocks:
        X = tensors[block.weight]
        if block.bias is not None:
            X = torch.cat([X, tensors[block.bias].unsqueeze(1)], 1)
        joints.append(X if X.ndim == 2 else X.movedim(-1, 0))
    return joints


def from_joint(
    joints: Sequence[Shaped[Tensor, "*K _ _"]], blocks: Sequence[LayerBlock]
) -> list[Tensor]:
    """Distribute the joint matrices of all blocks to a list in parameter order.

    W_l, b_l = X_l[:, :d_in], X_l[:, d_in]

    Args:
        joints: One tensor per block, ``[d_out, d_in + 1]`` for a vector and
            ``[K, d_out, d_in + 1]`` for a matrix.
        blocks: The blocks.

    Returns:
        Tensors ``[*shape]`` (vector) or ``[*shape, K]`` (matrix) in parameter order. They are views
        of the joint matrices.
    """
    tensors: dict[int, Tensor] = {}
    for joint, block in zip(joints, blocks, strict=True):
        X = joint if joint.ndim == 2 else joint.movedim(0, -1)
        if block.bias is None:
            tensors[block.weight] = X
        else:
            tensors[block.weight] = X.narrow(1, 0, block.d_in)
            tensors[block.bias] = X.select(1, block.d_in)
    return [tensors[position] for position in range(len(tensors))]


def flat_positions(
    blocks: Sequence[LayerBlock], shapes: Sequence[Sequence[int]]
) -> list[Int[Tensor, " _"]]:
    """Find each block's entries in the concatenation of all parameters.

    θ[position_l] = vec(X_l), row-major

    Args:
        blocks: The blocks.
        shapes: The shapes of all parameters.

    Returns:
        One index tensor ``[d_out (d_in + 1)]`` per block.
    """
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.arange(sum(sizes)).split(sizes)
    positions = [x.reshape(shape) for x, shape in zip(flat, shapes, strict=True)]
    return [joint.flatten() for joint in to_joint(positions, blocks)]
