"""Trackers behind one small interface: they get every recorded row, and may be none at all."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from experiments.experiment import Experiment
from experiments.objects import UserError, near_misses, told


class Tracker(Protocol):
    """What is asked of a tracker."""

    def log(self, training: str, step: int, numbers: Mapping[str, float]) -> None:
        """Take note of the numbers after a step of one training."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Writes event files next to the metrics."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra

        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, training: str, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(f"{name}/{training}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Writes to Weights & Biases, one run per run folder; WANDB_MODE=offline keeps it local."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb  # noqa: PLC0415 - an extra

        self._run = wandb.init(
            project="pinncurv", name=folder.name, dir=str(folder), config=dict(settings)
        )

    def log(self, training: str, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(
            {f"{training}/{name}": value for name, value in {**numbers, "step": step}.items()}
        )

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
}


def check_trackers(names: Sequence[str]) -> None:
    """Check that there are trackers of some names.

    Raises:
        UserError: If there is none of a name.
    """
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            near = near_misses(name, TRACKERS)
            raise UserError(f"--track must be of {known}, got {name}.{near}")


class Trackers:
    """The trackers of a run.

    Args:
        names: Their names.
        folder: The run folder.
        experiment: What is run.

    Raises:
        UserError: If one is not installed.
    """

    def __init__(self, names: Sequence[str], folder: Path, experiment: Experiment) -> None:
        self._trackers: list[Tracker] = []
        for name in names:
            try:
                self._trackers.append(TRACKERS[name](folder, dataclasses.asdict(experiment)))
            except ImportError as error:
                raise UserError(
                    f"--track {name}: {error}. Install it: pip install {name}."
                ) from error
            except Exception as error:  # no disk, no network, no account
                raise UserError(f"--track {name}: {told(error)}") from error

    def recorder(self, training: str) -> Callable[[Mapping[str, Any]], bool]:
        """Return what passes the rows of one training on; it never asks to stop."""

        def record(row: Mapping[str, Any]) -> bool:
            numbers = {k: float(v) for k, v in row.items() if not isinstance(v, str) and v == v}
            for tracker in list(self._trackers):
                with self._expendable(tracker):
                    tracker.log(training, int(row["step"]), numbers)
            return False

        return record

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for tracker in list(self._trackers):
            with self._expendable(tracker):
                tracker.close()

    @contextmanager
    def _expendable(self, tracker: Tracker) -> Iterator[None]:
        """Go on without a tracker that fails; the run folder has all it was told."""
        try:
            yield
        except Exception as error:
            name = type(tracker).__name__
            print(f"warning: goes on without {name}: {told(error)}", file=sys.stderr)
            self._trackers.remove(tracker)
