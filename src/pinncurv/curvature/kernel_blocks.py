"""Inner products of rows of the Jacobian: the blocks that a kernel is made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.single import SingleBlock, widened
from pinncurv.linearization import DenseRows, EntryRows, JacobianBlock, LinearLayer
from pinncurv.machine import add_lower_product_, sizes_of, symmetric_product

# What an elementwise multiplication costs, in multiplications inside of a matrix product.
_ELEMENTWISE_COST = 16


@dataclass(frozen=True, eq=False)
class Side:
    """The rows of the Jacobian of one chunk.

    Args:
        row: The row, or column, of the kernel where they start.
        n: The number of points.
        V: The number of components.
        blocks: The blocks of the Jacobian, in the order of the parameter space.
        small: The same in float32, where their products are to be formed in it.
    """

    row: int
    n: int
    V: int
    blocks: Sequence[JacobianBlock | None]
    small: Sequence[SingleBlock | None]

    @classmethod
    def of(
        cls,
        row: int,
        residual: Float[Tensor, "n V"],
        blocks: Sequence[JacobianBlock | None],
        dtype: torch.dtype,
        single: bool = False,
    ) -> Side:
        """Return the side of a chunk with this residual and these blocks, in a data type."""
        n, V = residual.shape
        cast = [None if block is None else block.to(dtype) for block in blocks]
        small = [
            None if not single or b is None or isinstance(b, EntryRows) else SingleBlock.of(b)
            for b in cast
        ]
        return cls(row, n, V, cast, small)

    @property
    def range(self) -> slice:
        """The rows, or columns, of the kernel."""
        return slice(self.row, self.row + self.n * self.V)


def add_inner_products_(
    kernel: Float[Tensor, "R m"], pairs: Sequence[tuple[Side, Side]]
) -> Float[Tensor, "R m"]:
    """Add the inner products of the rows of two sides, for some pairs of sides.

    Each layer takes the way of fewer multiplications per pair of points. Through rows of the
    Jacobian, of some of the layer's outputs at all points, these are V W d_out d_in; through pairs
    of channels they are S² (V W d_out + d_in) and the elementwise product. Few channels or wide
    layers favour the latter.

    Of a side with itself only the lower triangle is right.

    Returns:
        ``kernel``.
    """
    by_rows: dict[int, list[tuple[Side, Side]]] = {}
    for left, right in pairs:
        others = []
        for i, (a, b) in enumerate(zip(left.blocks, right.blocks, strict=True)):
            if a is None or b is None:
                continue
            if _rows_are_cheaper(a, b):
                by_rows.setdefault(i, []).append((left, right))
            else:
                others.append(i)
        _add_by_tiles_(kernel[left.range, right.range], left, right, others)
    for i, some in by_rows.items():
        _add_through_rows_(kernel, i, some)
    return kernel


def _rows_are_cheaper(left: JacobianBlock, right: JacobianBlock) -> bool:
    if isinstance(left, EntryRows) or isinstance(right, EntryRows):
        return False
    if isinstance(left, DenseRows) or isinstance(right, DenseRows):
        return True
    left, right = left.as_layer(), right.as_layer()
    (V, n), (W, m) = left.num_rows, right.num_rows
    (S, _, d_in), Q, d_out = left.Z.shape, len(right.Z), left.d_out
    through_rows = d_out * d_in * (V * W + S * V / m + Q * W / n)
    through_channels = S * Q * (V * W * (d_out + _ELEMENTWISE_COST) + d_in)
    return through_rows <= through_channels


# --- through rows ---------------------------------------------------------------------------------


def _add_through_rows_(kernel: Tensor, i: int, pairs: Sequence[tuple[Side, Side]]) -> None:
    """Add J_l J_lᵀ of the i-th block, for a few of the layer's outputs at a time."""
    sides = list({id(side): side for pair in pairs for side in pair}.values())
    held = sizes_of(kernel.device).held // sum(side.n * side.V for side in sides)
    small = {id(side): side.small[i] for side in sides}
    blocks = [side.blocks[i] if (s := small[id(side)]) is None else s.block for side in sides]
    for rows in zip(*(_rows(block, held) for block in blocks), strict=True):
        of = {id(side): part for side, part in zip(sides, rows, strict=True)}
        for left, right in pairs:
            target = kernel[left.range, right.range]
            a, b = of[id(left)], of[id(right)]
            c, d = small[id(left)], small[id(right)]
            if c is not None and d is not None:
                product = symmetric_product(a.mT) if left is right else a @ b.mT
                target += widened(product, c.scale, d.scale)
            elif left is right:
                add_lower_product_(target, a.mT)
            else:
                target.addmm_(a, b.mT)


def _rows(block: JacobianBlock | None, columns: int) -> Iterator[Float[Tensor, "nV _"]]:
    """Yield the rows of a block, about so many columns at a time."""
    assert block is not None
    if isinstance(block, DenseRows):
        matrix = block.matrix.transpose(0, 1).flatten(0, 1)
        yield from matrix.split(max(1, columns), 1)
        return
    layer = block.as_layer()
    Z = layer.with_bias_column(layer.Z.transpose(0, 1), 1).contiguous()
    for G in layer.gradients.split(max(1, columns // Z.shape[-1]), 3):
        left = G.permute(2, 0, 3, 1).flatten(1, 2)  # [n, V d_out, S]
        yield torch.bmm(left.contiguous(), Z).view(len(Z) * len(G), -1)


# --- through channels -----------------------------------------------------------------------------


def _add_by_tiles_(
    target: Float[Tensor, "nV mW"], left: Side, right: Side, blocks: Sequence[int]
) -> None:
    """Add the products of some blocks, in tiles that stay in the cache; of two equal sides half."""
    if not blocks:
        return
    tile, V, W = sizes_of(target.device).tile, left.V, right.V
    for p in _tiles(left.n, tile):
        for q in _tiles(right.n, tile):
            if left is right and q.start > p.start:
                continue
            part = target.new_zeros(V, p.stop - p.start, W, q.stop - q.start)
            for i in blocks:
                small = left.small[i], right.small[i]
                _add_tile_(part, (left.blocks[i], right.blocks[i]), small, p, q)
            target[V * p.start : V * p.stop, W * q.start : W * q.stop] += (
                part.permute(1, 0, 3, 2).flatten(2).flatten(0, 1)
            )


def _add_tile_(
    part: Float[Tensor, "V n W m"],
    blocks: tuple[JacobianBlock | None, JacobianBlock | None],
    small: tuple[SingleBlock | None, SingleBlock | None],
    p: slice,
    q: slice,
) -> None:
    """Add the products of one block at some points, formed in float32 if it is there in that."""
    (a, b), (c, d) = blocks, small
    if c is not None and d is not None:
        rounded = torch.zeros_like(part, dtype=torch.float32)
        _add_products_(rounded, c.block.at(p), d.block.at(q))
        part += widened(rounded, c.scale, d.scale)
        return
    assert a is not None
    assert b is not None
    _add_products_(part, a.at(p), b.at(q))


def _tiles(n: int, tile: int) -> Iterator[slice]:
    for start in range(0, n, tile):
        yield slice(start, min(n, start + tile))


def _add_products_(
    part: Float[Tensor, "V n W m"], left: JacobianBlock, right: JacobianBlock
) -> None:
    if isinstance(left, EntryRows):
        part += left.product(_as_vectors(right)).view(part.shape)
    elif isinstance(right, EntryRows):
        part += right.product(_as_vectors(left))[0].t().reshape(part.shape)
    else:
        _add_through_channels_(part, left.as_layer(), right.as_layer())


def _as_vectors(block: JacobianBlock) -> list[Tensor]:
    """Return all rows as directions, one tensor ``[V n, *shape]`` per parameter."""
    rows = block.rows(slice(None))
    return [part.reshape(-1, *shape) for part, shape in zip(rows, block.shapes, strict=True)]


def _add_through_channels_(
    part: Float[Tensor, "V n W m"], left: LinearLayer, right: LinearLayer
) -> None:
    """Add Σ_sq (g_vns · g_wmq) (z_ns · z_mq), with one more for the bias on value channels."""
    for s, (z, g) in enumerate(zip(left.Z, left.gradients.unbind(1), strict=True)):
        for q, (y, h) in enumerate(zip(right.Z, right.gradients.unbind(1), strict=True)):
            overlap = z @ y.t()
            if left.bias is not None and s in left.value_channels and q in right.value_channels:
                overlap += 1
            gradients = g.flatten(0, 1) @ h.flatten(0, 1).t()
            part.addcmul_(gradients.view_as(part), overlap.unsqueeze(1))
