"""Causal weights: later times count once the earlier ones are solved."""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pinncurv.problems.energy import check_squares
from pinncurv.problems.loss_term import LossTerm


@dataclass(frozen=True, eq=False)
class CausalWeights:
    """Weights that fall with the residuals at earlier times: a function of points (t, x).

    w(t, x) = exp(-ε Σ_{k<i} L_k) for t in slab i,    L_k = mean of |r|² in slab k

    They are the ``weight`` of a loss term, start at one, and change with `update_`, e.g. before
    every step. Once the smallest is nearly one, ε may be raised, or the training is done.

    Args:
        start: The first time.
        end: The last time.
        slabs: Number of slabs of equal length.
        tolerance: The number ε.

    Raises:
        ValueError: If the times do not increase, there is no slab, the tolerance is negative, or a
            number is not finite.

    Source: Wang, Sankaran, Perdikaris 2022 (arXiv 2203.07404), algorithm 1.
    """

    start: float
    end: float
    slabs: int = 32
    tolerance: float = 1.0
    by_slab: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Begin with ones."""
        given = -math.inf < self.start < self.end < math.inf and 0 <= self.tolerance < math.inf
        if not (given and isinstance(self.slabs, int) and self.slabs > 0):
            raise ValueError(
                "Causal weights must have a start before their end, at least one slab and a finite "
                f"tolerance >= 0, got start={self.start}, end={self.end}, slabs={self.slabs!r}, "
                f"tolerance={self.tolerance}. Pass the times of the domain."
            )
        object.__setattr__(self, "by_slab", torch.ones(self.slabs, dtype=torch.float64))

    def __call__(self, x: Float[Tensor, "N d"]) -> Float[Tensor, " N"]:
        """Return the weights of points."""
        return self.by_slab.to(x)[self._slab(x)]

    def update_(self, term: LossTerm, model: nn.Module, x: Float[Tensor, "N d"]) -> None:
        """Let the weights follow the residuals of a term at points, in every slab enough of them.

        Args:
            term: The term, whose own weights do not enter.
            model: The network.
            x: The points.

        Raises:
            TypeError: If the term is an energy.
        """
        check_squares([term])
        with torch.no_grad():
            squares = term.evaluate(model, x).square().sum(1).to(self.by_slab)
        slab = self._slab(x).to(self.by_slab.device)
        counts = slab.bincount(minlength=self.slabs).clamp(min=1)
        means = slab.bincount(squares, minlength=self.slabs) / counts
        earlier = means.cumsum(0) - means
        self.by_slab.copy_(torch.exp(-self.tolerance * earlier))

    def _slab(self, x: Tensor) -> Tensor:
        position = (x[:, 0] - self.start) * (self.slabs / (self.end - self.start))
        return position.floor().long().clamp(0, self.slabs - 1)
