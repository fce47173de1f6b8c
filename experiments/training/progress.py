"""Shows how far training has come: one live line in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.text import Text

from experiments.training.trainer import Trainer
from pinncurv.optim import StepRecord

# Where lines add up: the first seconds between two, later this part of the time so far.
_FIRST_PAUSE, _LATER_PAUSE = 5.0, 0.1


class Progress:
    """The progress of one optimizer.

    Args:
        console: Where to show it.
        position: Which of the optimizers this is, e.g. "1/3".
    """

    def __init__(self, console: Console, position: str) -> None:
        self._console = console
        self._position = position
        self._live: Live | None = None
        self._rmse = float("nan")
        self._line = ""
        self._started = self._shown = time.monotonic()

    def start(self, trainer: Trainer, rmse: float) -> None:
        """Show that work begins."""
        self._rmse = rmse
        begin = "starts" if trainer.step == 0 else f"continues after step {trainer.step}"
        self._line = f"{self._position} {trainer.name} {begin}, RMSE {rmse:.2e}"
        self._started = self._shown = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render)
            self._live.start()
        else:
            self._print()

    def measured(self, rmse: float) -> None:
        """Take note of a new error."""
        self._rmse = rmse

    def update(self, trainer: Trainer, record: StepRecord, seconds_left: float) -> None:
        """Take note of a step, and show it if it is time."""
        if self._live is None and not self._pause_is_over():
            return
        self._line = self._describe(trainer, record, seconds_left)
        if self._live is None:
            self._print()

    def stop(self) -> None:
        """Leave the last line standing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _describe(self, trainer: Trainer, record: StepRecord, seconds_left: float) -> str:
        terms = " + ".join(f"{name} {loss:.1e}" for name, loss in record.term_losses.items())
        parts = [
            f"{self._position} {trainer.name} step {trainer.step}",
            f"{timedelta(seconds=round(seconds_left))} left",
            f"RMSE {self._rmse:.2e}",
            f"loss {record.loss:.2e} = {terms}",
            f"step size {record.step_size:.2g}",
        ]
        if trainer.rejected:
            parts.append(f"{trainer.rejected} rejected")
        return ", ".join(parts)

    def _pause_is_over(self) -> bool:
        now = time.monotonic()
        pause = max(_FIRST_PAUSE, _LATER_PAUSE * (now - self._started))
        return now - self._shown >= pause

    def _print(self) -> None:
        self._shown = time.monotonic()
        self._console.print(self._line, soft_wrap=True, highlight=False)

    def _render(self) -> Text:
        """Return the newest line; rich asks for it a few times per second."""
        return Text(self._line)
