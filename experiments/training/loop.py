"""Trains until the budget is spent, the user interrupts, or the loss is no longer finite."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from experiments.training import checkpoint
from experiments.training.errors import first_line
from experiments.training.metrics import MetricsFile
from experiments.training.progress import Progress
from experiments.training.settings import Settings
from experiments.training.trainer import Trainer
from pinncurv.linops import FactorizationError

FINISHED = "finished"
INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class Budget:
    """How long to train.

    Args:
        seconds: In seconds of the optimizer's own steps.
        steps: In steps.
    """

    seconds: float | None
    steps: int | None

    def spent(self, trainer: Trainer) -> bool:
        """Return whether either is spent."""
        return (self.steps is not None and trainer.step >= self.steps) or (
            self.seconds is not None and trainer.seconds >= self.seconds
        )

    def seconds_left(self, trainer: Trainer) -> float:
        """Return an estimate from the steps so far."""
        left = []
        if self.seconds is not None:
            left.append(self.seconds - trainer.seconds)
        if self.steps is not None and trainer.step:
            left.append((self.steps - trainer.step) * trainer.seconds / trainer.step)
        return max(0.0, min(left, default=0.0))


class Interruption:
    """Turns Ctrl-C and SIGTERM into a request; the second one stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        """Start to listen."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the signals as they were."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # Not by print, which the signal may just have interrupted.
        os.write(2, b"\nStopping after this step; once more stops at once.\n")


class _CheckpointClock:
    """Says when a checkpoint is due."""

    def __init__(self, settings: Settings) -> None:
        self._seconds = settings.checkpoint_seconds
        self._steps = settings.checkpoint_steps
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Return whether it is time."""
        if self._steps is not None and step % self._steps == 0:
            return True
        return self._seconds is not None and time.monotonic() - self._last >= self._seconds

    def reset(self) -> None:
        """Start to count again."""
        self._last = time.monotonic()


def is_recorded(step: int, every: int) -> bool:
    """Return whether a step gets a row in the metrics.

    Args:
        step: The step.
        every: The interval; 0 for 32 rows per doubling of the step.
    """
    return step % (every or max(1, 1 << max(0, step.bit_length() - 6))) == 0


def train(
    trainer: Trainer,
    settings: Settings,
    folder: Path,
    progress: Progress,
    interruption: Interruption,
) -> str:
    """Train one optimizer, from where it is until its budget is spent.

    Args:
        trainer: The optimizer at work.
        settings: The resolved settings.
        folder: Where metrics and checkpoints go.
        progress: Shows what happens.
        interruption: Asks to stop after the current step.

    Returns:
        How it ended: ``FINISHED``, ``INTERRUPTED``, or what went wrong. The checkpoint then is of
        the last step, or, if something went wrong, of an earlier one.
    """
    budget = Budget(settings.seconds, settings.steps)
    identity = settings.identity(trainer.name)
    clock = _CheckpointClock(settings)
    metrics = record = None

    def save() -> None:
        trainer.check_finite()
        checkpoint.save(folder, trainer.state_dict(), identity)
        clock.reset()

    try:
        first = trainer.measure(None)
        metrics = MetricsFile(folder, list(first), trainer.step)
        if metrics.last_step < trainer.step == 0:
            metrics.append(first)
        progress.start(trainer, float(first["rmse"]))
        while not (budget.spent(trainer) or interruption.requested):
            record = trainer.advance()
            if is_recorded(trainer.step, settings.record_every):
                row = trainer.measure(record)
                metrics.append(row)
                progress.measured(float(row["rmse"]))
            progress.update(trainer, record, budget.seconds_left(trainer))
            if clock.due(trainer.step):
                save()
        if metrics.last_step < trainer.step:
            metrics.append(trainer.measure(record))
        if record is not None or trainer.step == 0:
            save()
    except (FloatingPointError, FactorizationError) as error:
        return str(error)
    except (RuntimeError, MemoryError) as error:  # out of memory, mostly; others may fit
        return f"{type(error).__name__}: {first_line(error)}"
    finally:
        if metrics is not None:
            metrics.close()
        progress.stop()
    return INTERRUPTED if interruption.requested and not budget.spent(trainer) else FINISHED
