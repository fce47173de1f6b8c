"""Trying an update: move the parameters, look at the loss, and go back or stay."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pinncurv.linops import check, read
from pinncurv.optim.protocols import LeastSquares, StepRecord
from pinncurv.optim.situation import dot


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
        self._lowest: tuple[float, Tensor | None] = math.inf, None  # L that was seen, and where

    def loss_at(self, update: Sequence[Tensor], scale: float) -> float:
        """Return L(θ + scale · update) without a graph; the parameters stay at θ."""
        try:
            self._place(update, scale)
            loss = self._loss()
            if loss < self._lowest[0]:
                self._lowest = loss, self._now
            return loss
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
        overflows: list[bool] = []  # which a saturated network would hide from the loss
        check(self._now.sum().isfinite(), lambda: overflows.append(True))
        try:
            loss = self._evaluate(limit)
            read()  # or the check still waits
        except (FloatingPointError, ValueError):
            read()
            if not overflows:
                raise
        return math.nan if overflows else loss

    def _evaluate(self, limit: float | None) -> float:
        """Return L where the parameters are, and keep what a next step needs."""
        evaluate = getattr(self.objective, "evaluate", None) if self._keeps else None
        known, where = self._lowest
        if evaluate is None and where is not None and torch.equal(self._now, where):
            return known
        if evaluate is None or limit is not None:
            loss = self._loss()
            if evaluate is None or limit is None or not loss <= limit:
                return loss
        with torch.enable_grad():
            self.evaluation = evaluate()
        return float(self.evaluation.loss)

    def _loss(self) -> float:
        """Return L where the parameters are; objectives of others may return a number."""
        loss: Any = self.objective.loss()
        return read(loss)[0][0] if isinstance(loss, Tensor) else float(loss)

    def take(
        self,
        proposed: StepRecord,
        update: Sequence[Tensor],
        gradient: Sequence[Tensor],
        start: int,
        halvings: int,
        monotone: bool = True,
    ) -> StepRecord:
        """Apply an update; shorten it while the loss rises, or reject it.

        Args:
            proposed: The record of the step if the update is taken; its ``new_loss`` is known if it
                comes from a search, which then has found its length.
            update: The update.
            gradient: ∇L.
            start: How often it is halved at first, if not after a search.
            halvings: How often it is halved at most.
            monotone: Whether the loss may not rise; else it has to be finite alone.

        Returns:
            The record of what was done.
        """
        loss, promised = proposed.loss, proposed.predicted_decrease
        highest = loss if monotone else sys.float_info.max
        longer = "raised the loss" if monotone else "made the loss non-finite"
        first = 0 if math.isfinite(proposed.new_loss) else min(start, halvings)
        scale, new_loss = 1.0, math.nan
        for halving in range(first, halvings + 1):
            scale = 0.5**halving
            new_loss = self.move(update, scale, limit=highest if scale < 1 else None)
            if new_loss <= highest:  # False for NaN
                break
        moved = new_loss < loss or self.moved
        if moved and math.isfinite(new_loss) and new_loss <= highest:
            if scale < 1:
                promised = float(scale**2 * promised - scale * (1 - scale) * dot(gradient, update))
            return replace(
                proposed,
                new_loss=new_loss,
                step_size=scale * proposed.step_size,
                momentum=scale * proposed.momentum,
                predicted_decrease=promised,
                scale=scale * proposed.scale,
                reason=f"shortened to {scale:g} of its length (more {longer})" if scale < 1 else "",
            )
        self.restore()
        what = "raised the loss" if math.isfinite(new_loss) else "made the loss non-finite"
        why = f"the update {what} even at {scale:g} of its length"
        if not moved:
            why = f"at {scale:g} of its length, the update no longer moves the parameters"
        return replace(
            proposed,
            new_loss=loss,
            step_size=0.0,
            momentum=0.0,
            accepted=False,
            stalled=not moved and halving == first,
            scale=0.0,
            reason=f"rejected: {why}",
        )

    @property
    def moved(self) -> bool:
        """Whether the parameters are not at θ; an update may be below their resolution."""
        return not torch.equal(self._now, self._start)

    def restore(self) -> None:
        """Set the parameters back to θ, bit for bit."""
        self._place(None)

    def ended_at(
        self,
        objective: LeastSquares,
        parameters: Sequence[Tensor],
        otherwise: Callable[[], None],
    ) -> bool:
        """Whether the next step starts where this one was evaluated, and nothing has changed.

        Args:
            objective: The objective of the next step.
            parameters: Its parameters.
            otherwise: What is called, later, if the answer is yes but numbers of the parameters
                have changed behind torch's back, as through ``tensor.data``.
        """
        if (
            self.evaluation is None
            or objective is not self.objective
            or not self.evaluation.is_current()
            or {id(p) for p in parameters} != {id(p) for p in self.parameters}
        ):
            return False
        now = _flat(self.parameters)
        if now.dtype != self._now.dtype or now.device != self._now.device:
            return False
        check((now == self._now).all(), otherwise)
        return True

    def _place(self, update: Sequence[Tensor] | None, scale: float = 1.0) -> None:
        self.evaluation, self._now = None, self._start
        if update is not None:
            self._now = torch.add(self._start, _flat(update).to(self._start), alpha=scale)
        parts = self._now.split([parameter.numel() for parameter in self.parameters])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part.view_as(parameter))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
