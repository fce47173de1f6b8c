"""Saying once, in words, that a training has stopped making progress, and what to change."""

from __future__ import annotations

import math
import warnings
from collections import deque

from pinncurv.optim.protocols import StepRecord

# Steps that are looked at together, and by which part their best loss must be less than that of as
# many before; a negative one is an energy, of which only a part is its distance to the minimum.
_CURVATURE_STEPS, _FIRST_ORDER_STEPS = 100, 2000
_PROGRESS, _ENERGY_PROGRESS = 1e-2, 1e-6

# Below this part of a full step, an update is called short.
_SHORT = 2.0**-8


class StoppedProgress(UserWarning):
    """The loss has stopped falling, though the training goes on."""


class Progress:
    """Watches the records of an optimizer, and warns once when the loss has stopped falling.

    m - min_{last k} L < c |m|,  m = min_{k before} L,  k = 100 steps of curvature, 2000 of the
    first order,  c = 1e-2, or 1e-6 for an energy that is negative

    Args:
        first_order: Whether it is an optimizer without curvature.
    """

    def __init__(self, first_order: bool = False) -> None:
        self._steps = _FIRST_ORDER_STEPS if first_order else _CURVATURE_STEPS
        self._records: deque[tuple[float, bool]] = deque(maxlen=2 * self._steps)
        self._told = False
        self._level = 3 if first_order else 5  # torch wraps the step of its optimizers twice

    def observe(self, record: StepRecord) -> None:
        """Look at one more step, and warn if it is time."""
        short = not record.accepted or min(record.scale, record.step_size) < _SHORT
        loss = record.loss if math.isfinite(record.loss) else math.inf
        self._records.append((loss, short))
        if self._told or len(self._records) < 2 * self._steps:
            return
        losses = [loss for loss, _ in self._records]
        before, now = min(losses[: self._steps]), min(losses[self._steps :])
        part = _ENERGY_PROGRESS if now < 0 else _PROGRESS
        if not before - now < part * abs(before):
            return
        self._told = True
        short_ones = sum(short for _, short in list(self._records)[self._steps :])
        warnings.warn(
            f"The loss has fallen by less than {100 * part:g} % in {self._steps} steps, to "
            f"{now:.3g}. " + self._advice(record, losses[self._steps :], short_ones),
            StoppedProgress,
            stacklevel=self._level,
        )

    def _advice(self, record: StepRecord, losses: list[float], short: int) -> str:
        """Return what may be the cause, and what to change."""
        spread = max(losses) / min(losses) if min(losses) > 0 else 1.0
        if self._steps == _FIRST_ORDER_STEPS:
            return "Lower the learning rate, or go on with a method of curvature: presets.auto."
        if short > self._steps / 2:
            return (
                f"{short} of these steps were rejected or shortened to less than {_SHORT:.0e} of "
                f"their length, with a damping of {record.damping:.1e}. Take more damping, one "
                "that adapts (damping_rule=pinncurv.optim.ShortStepDamping()), or presets.auto."
            )
        if spread > 2:
            return (
                f"It varies by a factor of {spread:.2g}: what is left is the choice of points. "
                "Take more of them, or draw new ones less often."
            )
        return (
            "The steps were not short: what this network can represent at these points, in this "
            "precision, may be reached. Take more points if the held-out loss is much larger, else "
            "a larger network, one whose output has the scale of the solution, another weight of "
            "the terms, or float64."
        )
