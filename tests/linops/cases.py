"""Small operators of every structure, for the tests of linops."""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from pinncurv.linops import Block, KroneckerFactors, SumKroneckerLinearOperator


def psd(n: int, generator: Generator, rank: int | None = None, scale: float = 1.0) -> Tensor:
    """A random positive semidefinite matrix, well conditioned unless a rank is given."""
    rank = 2 * n if rank is None else rank
    X = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    return scale * X @ X.mT / max(rank, 1)


def layers(
    widths: Sequence[int], bias: Sequence[bool] | bool = True
) -> tuple[list[Block], list[tuple[int, ...]]]:
    """Blocks and shapes of a multilayer perceptron, with or without biases."""
    biases = [bias] * (len(widths) - 1) if isinstance(bias, bool) else bias
    blocks: list[Block] = []
    shapes: list[tuple[int, ...]] = []
    for i, (d_in, d_out, has_bias) in enumerate(zip(widths[:-1], widths[1:], biases, strict=True)):
        weight = len(shapes)
        shapes += [(d_out, d_in), (d_out,)] if has_bias else [(d_out, d_in)]
        position = weight + 1 if has_bias else None
        blocks.append(Block(f"net.{2 * i}", weight, position, d_out, d_in))
    return blocks, shapes


def mixed_parameters() -> tuple[list[Block], list[tuple[int, ...]]]:
    """A layer, a transposed one, a number and a tensor, in an order of their own."""
    shapes: list[tuple[int, ...]] = [(), (3,), (2, 3, 2), (3, 2), (2, 4), (4,)]
    blocks = [
        Block("net.0", 3, 1, 3, 2),
        Block("transposed", 4, 5, 4, 2, stored=(2, 4)),
        Block.dense("slope", 0, ()),
        Block.dense("tensor", 2, (2, 3, 2)),
    ]
    return blocks, shapes


def mixed_kronecker(
    T: int, generator: Generator, dtype: torch.dtype = torch.float64
) -> SumKroneckerLinearOperator:
    """A sum of Kronecker products, and exact blocks where there are no layers."""
    blocks, shapes = mixed_parameters()
    factors = [
        [
            KroneckerFactors(
                psd(block.shape[1], generator).to(dtype),
                (psd(block.d_out, generator) if block.kronecker else torch.ones(1, 1)).to(dtype),
            )
            for _ in range(T)
        ]
        for block in blocks
    ]
    return SumKroneckerLinearOperator(factors, blocks, shapes)


def kronecker(
    widths: Sequence[int],
    T: int,
    generator: Generator,
    bias: Sequence[bool] | bool = True,
    factor: Callable[[int, Generator], Tensor] = psd,
    dtype: torch.dtype = torch.float64,
) -> SumKroneckerLinearOperator:
    """A sum of Kronecker products with random factors."""
    blocks, shapes = layers(widths, bias)
    factors = [
        [
            KroneckerFactors(
                factor(block.shape[1], generator).to(dtype),
                factor(block.d_out, generator).to(dtype),
            )
            for _ in range(T)
        ]
        for block in blocks
    ]
    terms = ["interior", "boundary", "initial", "data"][:T]
    return SumKroneckerLinearOperator(factors, blocks, shapes, terms)


def kronecker_oracle(operator: SumKroneckerLinearOperator) -> Tensor:
    """The matrix, entry by entry from the definition: column p is the image of unit vector p."""
    sizes = [shape.numel() for shape in operator.shapes]
    D = sum(sizes)
    columns = []
    for p in range(D):
        unit = torch.zeros(D, dtype=torch.float64)
        unit[p] = 1
        parameters = [
            piece.reshape(shape)
            for piece, shape in zip(unit.split(sizes), operator.shapes, strict=True)
        ]
        images = [torch.zeros_like(parameter) for parameter in parameters]
        for block, factors in zip(operator.blocks, operator.factors, strict=True):
            X = parameters[block.weight]
            stored = X.shape
            if not block.kronecker:
                X = X.flatten()[None]
            elif block.stored is not None:
                X = X.T
            if block.bias is not None:
                X = torch.hstack([X, parameters[block.bias][:, None]])
            Y = sum(
                torch.einsum("ij,jk,kl->il", pair.B.double(), X, pair.A.double())
                for pair in factors
            )
            W = Y[:, : block.d_in]
            images[block.weight] = (W if W.shape == stored else W.T).reshape(stored)
            if block.bias is not None:
                images[block.bias] = Y[:, -1]
        columns.append(torch.hstack([image.flatten() for image in images]))
    return torch.stack(columns, 1)


STRUCTURES = [
    ([2, 3, 1], True),
    ([2, 3, 1], False),
    ([3, 2, 4, 1], [True, False, True]),
    ([1, 1], True),
    ([1, 1], False),
]
