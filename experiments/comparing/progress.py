"""Shows how far a comparison is: one live line in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.status import Status

# Seconds between two lines where lines add up.
_PAUSE = 5.0


class Progress:
    """The progress of a comparison.

    Args:
        console: Where to show it.
        total: How many operators are compared at how many points, in all.
    """

    def __init__(self, console: Console, total: int) -> None:
        self._console = console
        self._total = total
        self._done = 0
        self._started = time.monotonic()
        self._shown = -_PAUSE
        self._status: Status | None = None

    def __enter__(self) -> Progress:
        """Begin."""
        if self._console.is_terminal:
            self._status = self._console.status("")
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        if self._status is not None:
            self._status.stop()

    def show(self, what: str) -> None:
        """Say what is being done, if it is time."""
        now = time.monotonic()
        left = (now - self._started) / self._done * (self._total - self._done) if self._done else 0
        line = f"[{self._done}/{self._total}] {what}"
        if self._done:
            line += f", {timedelta(seconds=round(left))} left"
        if self._status is not None:
            self._status.update(line)
        elif now - self._shown >= _PAUSE:
            self._shown = now
            self._console.print(line, soft_wrap=True, highlight=False, markup=False)

    def advance(self) -> None:
        """Count one more."""
        self._done += 1
