"""Blocks of points: the part of a loss term that is evaluated or linearized at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops import make_plan
from pinncurv.problems import LossTerm

# A jet of the widest layer should have at most this many elements: it then stays in the cache, and
# its memory is recycled by the allocator instead of being mapped anew for every operation.
_BLOCK_ELEMENTS = 1 << 19


@dataclass(frozen=True, eq=False)
class TermBlock:
    """A loss term at some or all of its points.

    r̃_n = sqrt(w_n / N) r_n, with N the number of all points, not of those of the block

    Args:
        term: The term.
        x: The points, ``[n, d]``.
        scale: sqrt(w_n / N), a number or ``[n, 1]``.
    """

    term: LossTerm
    x: Float[Tensor, "n d"]
    scale: float | Float[Tensor, "n 1"]

    @classmethod
    def of_all(cls, term: LossTerm, x: Float[Tensor, "N d"]) -> TermBlock:
        """Return the block of all N points."""
        return cls(term.to(x), x, term.scale(x))

    def at(self, points: slice | Tensor) -> TermBlock:
        """Return the block of some of these points."""
        scale = self.scale if isinstance(self.scale, float) else self.scale[points]
        return TermBlock(self.term.at(points), self.x[points], scale)

    def cut(
        self, parameters: dict[str, Tensor], chunk_size: int | None = None
    ) -> Iterator[TermBlock]:
        """Cut into blocks that stay in the cache, of at most ``chunk_size`` points.

        Args:
            parameters: The trainable parameters by name, whose widths count.
            chunk_size: Most points of a block; None for no further limit.
        """
        step = points_per_block(self.term, self.x, parameters)
        step = min(step, chunk_size or step)
        for start in range(0, len(self.x), step):
            yield self.at(slice(start, start + step))

    def residual(self, model: Module) -> Float[Tensor, "n V"]:
        """Evaluate the scaled residual r̃."""
        return self.term.evaluate(model, self.x) * self.scale

    def loss(self, model: Module) -> Float[Tensor, ""]:
        """Evaluate what these points contribute to the loss, ½‖r̃‖²."""
        return 0.5 * self.residual(model).square().sum()


def points_per_block(term: LossTerm, x: Tensor, parameters: dict[str, Tensor]) -> int:
    """Return how many points to process at a time so that jets stay small, in equal blocks."""
    widest = max(max(parameter.shape, default=1) for parameter in parameters.values())
    S = make_plan(term.at(slice(1)).operators, x[:1]).layout.S
    blocks = math.ceil(len(x) * S * widest / _BLOCK_ELEMENTS)
    return math.ceil(len(x) / blocks)
