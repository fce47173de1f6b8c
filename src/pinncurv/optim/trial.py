"""Trying an update: move the parameters, look at the loss, and go back or stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pinncurv.optim.protocols import LeastSquares, offers


@dataclass(frozen=True, eq=False)
class Landing:
    """Where a step has ended, with the evaluation that was made there.

    Args:
        objective: The objective that was evaluated.
        parameters: The parameters.
        values: What they were, to recognize that nothing has changed since.
        evaluation: The evaluation.
    """

    objective: LeastSquares
    parameters: Sequence[Tensor]
    values: Sequence[Tensor]
    evaluation: Any

    def is_at(self, objective: LeastSquares, parameters: Sequence[Tensor]) -> bool:
        """Whether the next step starts here, on the same objective and parameters."""
        return (
            objective is self.objective
            and self.evaluation.is_current()
            and {id(p) for p in parameters} == {id(p) for p in self.parameters}
            and all(map(_unchanged, self.parameters, self.values))
        )


def _unchanged(now: Tensor, then: Tensor) -> bool:
    same = (now.dtype, now.device) == (then.dtype, then.device)
    return same and torch.equal(now, then)


class Trial:
    """Moves the parameters of an objective on trial.

    Args:
        objective: The loss on one batch.
        parameters: The parameters.
    """

    def __init__(self, objective: LeastSquares, parameters: Sequence[Tensor]) -> None:
        self.objective = objective
        self.parameters = parameters
        self.landing: Landing | None = None
        self._start = [parameter.clone() for parameter in parameters]

    def loss_at(self, update: Sequence[Tensor], scale: float) -> float:
        """Return L(θ + scale · update) without a graph; the parameters stay at θ."""
        self._place(update, scale)
        try:
            return float(self.objective.loss())
        finally:
            self.restore()

    def move(self, update: Sequence[Tensor], scale: float, limit: float | None = None) -> float:
        """Set the parameters to θ + scale · update and return L there.

        Args:
            update: The update.
            scale: Which multiple of it to take.
            limit: Above it nothing is kept for a next step. A first look at the loss without a
                graph pays where the step is likely to be rejected.

        Returns:
            L; NaN if the parameters overflow.
        """
        self._place(update, scale)
        if not all(bool(parameter.sum().isfinite()) for parameter in self.parameters):
            return math.nan  # a saturated network would hide it from the loss
        objective: Any = self.objective
        if not offers(objective, "evaluate"):
            return float(self.objective.loss())
        if limit is not None:
            loss = float(self.objective.loss())
            if not loss <= limit:
                return loss
        with torch.enable_grad():
            evaluation = objective.evaluate()
        placed = [parameter.clone() for parameter in self.parameters]
        self.landing = Landing(self.objective, self.parameters, placed, evaluation)
        return float(evaluation.loss)

    @property
    def moved(self) -> bool:
        """Whether the parameters are not at θ; an update may be below their resolution."""
        return not all(map(torch.equal, self.parameters, self._start))

    def restore(self) -> None:
        """Set the parameters back to θ, bit for bit."""
        self.landing = None
        for parameter, start in zip(self.parameters, self._start, strict=True):
            parameter.copy_(start)

    def _place(self, update: Sequence[Tensor], scale: float) -> None:
        self.landing = None
        for parameter, start, part in zip(self.parameters, self._start, update, strict=True):
            torch.add(start, part, alpha=scale, out=parameter)
