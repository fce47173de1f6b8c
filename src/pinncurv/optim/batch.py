"""Which of the residuals a step linearizes: all, or random ones as long as these are enough."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from pinncurv.linops import policy
from pinncurv.optim.protocols import LinearizedLoss, offers


@dataclass(frozen=True)
class GrowingBatch:
    """Linearize at random points, more of them when a step helps these more than the others.

    m ← factor · m  if  (1 - L' / L) < share · (1 - L'_m / L_m)

    L is the loss of all points, by which steps are chosen and accepted; L_m that of the m residuals
    that direction and curvature come from. Other points are drawn in every step. The kernel of m
    residuals costs m² D, so that the first steps, which need to see little, cost little; in the end
    m is the number of all residuals, or ``largest``. Objectives without ``linearize_some`` and
    ``rows`` are linearized as a whole.

    Args:
        rows: m of the first step.
        factor: By which it grows.
        share: Which part of the relative decrease there all points must see.
        largest: Largest m; more than that are never linearized together.
        seed: Which points.
    """

    rows: int = 400
    factor: float = 1.5
    share: float = 0.5
    largest: int = policy.LARGEST_SIDE
    seed: int = 0

    def __post_init__(self) -> None:
        whole = all(isinstance(number, int) for number in (self.rows, self.largest, self.seed))
        within = 1 <= self.rows <= self.largest and self.factor > 1 and 0 < self.share <= 1
        if not (whole and within):
            raise ValueError(
                "Must hold: 1 <= rows <= largest, factor > 1 and 0 < share <= 1, the first two and "
                f"the seed being whole numbers, got {self}."
            )

    def linearize(self, objective: Any, rows: int, step: int) -> LinearizedLoss | None:
        """Linearize at random points; None where the whole objective is to be linearized.

        Args:
            objective: The loss.
            rows: m.
            step: The number of the step, which draws the points.
        """
        if not offers(objective, "linearize_some", "rows"):
            return None
        if not getattr(objective, "is_sum_of_squares", True):  # what is judged is residuals
            return None
        if rows >= objective.rows and getattr(objective, "chunk_size", None) is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + step)
        linearized: LinearizedLoss = objective.linearize_some(rows, generator)
        return linearized

    def grown(self, rows: int, decrease: float, its: float) -> int:
        """Return m for the next step.

        Args:
            rows: m.
            decrease: 1 - L' / L.
            its: 1 - L'_m / L_m.
        """
        if decrease > 0 and decrease >= self.share * its:
            return rows
        return min(self.largest, math.ceil(rows * self.factor))  # one more at least
