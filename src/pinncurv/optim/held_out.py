"""The loss on points that are not trained on, beside the one that is minimized."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from pinncurv.optim.protocols import StepRecord, check_part

# Points are the same when the losses agree to this part, as often in a row.
_SAME = 1e-5

# The points are exhausted when the loss on others has been this many times larger, as often in
# a row: residuals are then ten times larger between the points than at them.
FACTOR, TIMES = 100.0, 3


def exhausted(losses: Sequence[tuple[float, float]]) -> str:
    """Say whether a network fits its points and not the equation, or others were never measured.

    L_held_out > 100 L, three times in a row; if L < 0, L_held_out rises by more than L falls

    If they agree to five digits, three times in a row, they are of the same points.

    Args:
        losses: L where it is minimized and L on other points, of the last measurements.

    Returns:
        A sentence and what to do, or nothing.
    """
    last = list(losses)[-TIMES:]
    if len(last) < TIMES:
        return ""
    loss, other = last[-1]
    if all(abs(loss) > 0 and abs(other - loss) <= _SAME * abs(loss) for loss, other in last):
        return (
            "The loss on points that are not trained on is that on those that are: these are the "
            "same, as ``Fixed`` ones always are, and it says nothing about the equation between "
            "them. Pass HeldOut an objective at points of its own."
        )
    if any(loss < 0 for loss, _ in last):  # an energy, of which no multiple is a measure
        falls = [a[0] - b[0] for a, b in pairwise(last)]
        rises = [b[1] - a[1] for a, b in pairwise(last)]
        if min(*falls, *rises) <= 0 or sum(rises) <= sum(falls):
            return ""
        compared = f"{other:.2e} and rises, while it falls, to {loss:.2e}, on those that are"
    elif all(other > FACTOR * loss for loss, other in last):
        compared = f"{other:.1e}, more than {FACTOR:.0f} times the {loss:.1e} on those that are"
    else:
        return ""
    return (
        f"The loss on points that are not trained on is {compared}: the network fits its points, "
        "no longer the equation, and more steps do not help. Take more points, or draw new ones "
        "while training."
    )


class HeldOut:
    """Measures the loss on a second batch that is not trained on.

        held_out = HeldOut(objective.resampled(generator))
        record = held_out(optimizer.step(objective))

    A loss of 1e-12 at the points goes along with any error between them. A warning says so once,
    see ``exhausted``.

    Args:
        objective: The loss on the second batch, of the same network. Where points are ``Fixed``,
            those of ``resampled`` are the same, and a warning says so where the record has the
            loss after the step.
        every: Steps between two measurements.

    Raises:
        ValueError: If ``every`` is not positive.
        TypeError: If the objective has no method ``loss``.
    """

    def __init__(self, objective: Any, every: int = 50) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}. It counts steps.")
        check_part("The held-out objective", objective, "Objective.sample(model, terms)", "loss")
        self.objective, self.every = objective, every
        self._steps = 0
        self._last: deque[tuple[float, float]] = deque(maxlen=TIMES)
        self._told = False

    def __call__(self, record: StepRecord) -> StepRecord:
        """Return the record of a step with ``held_out``, if it is due.

        Args:
            record: What an optimizer returned; its loss after the step is taken, or the one before
                where that was not evaluated.
        """
        self._steps += 1
        if self._steps % self.every:
            return record
        loss = record.loss if math.isnan(record.new_loss) else record.new_loss
        other, words = self.measure(loss)
        if words:
            warnings.warn(words, stacklevel=2)
        return replace(record, held_out=other)

    def measure(self, loss: float) -> tuple[float, str]:
        """Return the loss now, and in words, once, that the points are exhausted.

        Args:
            loss: L at the points that are trained on.
        """
        with torch.no_grad():
            other = float(self.objective.loss())
        self._last.append((loss, other))
        words = "" if self._told else exhausted(self._last)
        self._told = self._told or bool(words)
        return other, words
