"""Trying an update: move the parameters, look at the loss, and go back or stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pinncurv.optim.protocols import LeastSquares


class Trial:
    """Moves the parameters of an objective on trial.

    Args:
        objective: The loss on one batch.
        parameters: The parameters.
        keeps: Whether to keep what the next linearization of the whole objective needs.
    """

    def __init__(
        self, objective: LeastSquares, parameters: Sequence[Tensor], keeps: bool = True
    ) -> None:
        self._keeps = keeps
        self.objective = objective
        self.parameters = parameters
        self.evaluation: Any = None  # of where the parameters are, if that may be gone on with
        self._start = self._now = _flat(parameters)

    def loss_at(self, update: Sequence[Tensor], scale: float) -> float:
        """Return L(θ + scale · update) without a graph; the parameters stay at θ."""
        try:
            self._place(update, scale)
            return float(self.objective.loss())
        finally:
            self.restore()

    def residual_at(
        self, linearized: Any, update: Sequence[Tensor], scale: float
    ) -> Sequence[Tensor]:
        """Return r̃ of a linearization's points at θ + scale · update; the parameters stay at θ."""
        try:
            self._place(update, scale)
            residual: Sequence[Tensor] = linearized.residual_now()
            return residual
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
        if not math.isfinite(self._now.sum()):
            return math.nan  # a saturated network would hide it from the loss
        evaluate = getattr(self.objective, "evaluate", None) if self._keeps else None
        if evaluate is None or limit is not None:
            loss = float(self.objective.loss())
            if evaluate is None or limit is None or not loss <= limit:
                return loss
        with torch.enable_grad():
            self.evaluation = evaluate()
        return float(self.evaluation.loss)

    @property
    def moved(self) -> bool:
        """Whether the parameters are not at θ; an update may be below their resolution."""
        return not torch.equal(self._now, self._start)

    def restore(self) -> None:
        """Set the parameters back to θ, bit for bit."""
        self._place(None)

    def ended_at(self, objective: LeastSquares, parameters: Sequence[Tensor]) -> bool:
        """Whether the next step starts where this one was evaluated, and nothing has changed."""
        return (
            self.evaluation is not None
            and objective is self.objective
            and self.evaluation.is_current()
            and {id(p) for p in parameters} == {id(p) for p in self.parameters}
            and (now := _flat(self.parameters)).dtype == self._now.dtype
            and now.device == self._now.device
            and torch.equal(now, self._now)
        )

    def _place(self, update: Sequence[Tensor] | None, scale: float = 1.0) -> None:
        self.evaluation, self._now = None, self._start
        if update is not None:
            self._now = torch.add(self._start, _flat(update).to(self._start), alpha=scale)
        parts = self._now.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
