"""Where to compare: along a training of its own, or at the checkpoints of earlier runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.comparing.settings import Settings
from experiments.training import checkpoint
from experiments.training.checkpoint import CURRENT, PREVIOUS, DamagedCheckpointError
from experiments.training.command_line import parse
from experiments.training.errors import UserError, first_line
from experiments.training.problems import build_problem
from experiments.training.run_folder import CONFIG
from experiments.training.settings import Settings as TrainingSettings
from experiments.training.trainer import Trainer
from pinncurv.linops import FactorizationError


@dataclass(frozen=True)
class Point:
    """A network, its loss and its batch at one step of one training.

    Args:
        trajectory: Which training: its seed, or its run folder.
        step: The training step.
        trainer: What holds them.
    """

    trajectory: str
    step: int
    trainer: Trainer


class TrainingStoppedError(Exception):
    """A training that cannot reach the next point."""


class Trajectory(ABC):
    """One training, and the points on it.

    Args:
        name: The seed, or the run folder.
        settings: The resolved settings of the training.
        device: Where to compute.
    """

    def __init__(self, name: str, settings: TrainingSettings, device: torch.device) -> None:
        self.name = name
        self.settings = settings
        (self.optimizer,) = settings.optimizers
        problem = build_problem(settings.problem, settings.sizes)
        try:
            self.trainer = Trainer(self.optimizer, settings, problem, device)
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"The network cannot be set up: {first_line(error)}") from error

    @property
    @abstractmethod
    def steps(self) -> tuple[int, ...]:
        """The training steps, ascending."""

    @abstractmethod
    def points(self) -> Iterator[Point]:
        """Yield the points in that order; each is valid until the next one is asked for.

        Raises:
            TrainingStoppedError: If there can be no further point.
        """


class OwnTraining(Trajectory):
    """A training from a seed on.

    Args:
        seed: The seed of initialization and points.
        settings: The settings of the comparison.
        device: Where to compute.
    """

    def __init__(self, seed: int, settings: Settings, device: torch.device) -> None:
        self._steps = settings.steps
        super().__init__(f"seed {seed}", settings.training(seed).resolved(), device)

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps."""
        return self._steps

    def points(self) -> Iterator[Point]:
        """Train from point to point."""
        for step in self.steps:
            try:
                while self.trainer.step < step:
                    self.trainer.advance()
            except (FloatingPointError, FactorizationError, RuntimeError) as error:
                raise TrainingStoppedError(first_line(error)) from error
            yield Point(self.name, step, self.trainer)


class EarlierRun(Trajectory):
    """The initialization of a run of train.py, and the checkpoints of one of its optimizers.

    Args:
        folder: The run folder.
        settings: The settings of the comparison.
        device: Where to compute.

    Raises:
        UserError: If the folder is no run, or has no checkpoint of the optimizer.
    """

    def __init__(self, folder: Path, settings: Settings, device: torch.device) -> None:
        run = _settings_of(folder)
        name = settings.optimizer or _first_with_checkpoint(folder, run)
        self._states = {0: None, **_states(folder / name)}
        if len(self._states) == 1:
            raise UserError(
                f"--runs: {folder} has no checkpoint of {name}. It has some of: "
                f"{', '.join(_with_checkpoint(folder, run)) or 'none of its optimizers'}."
            )
        chunk_size = settings.chunk_size or run.chunk_size
        training = replace(run, optimizers=(name,), chunk_size=chunk_size).resolved()
        super().__init__(str(folder), training, device)

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps."""
        return tuple(sorted(self._states))

    def points(self) -> Iterator[Point]:
        """Load checkpoint by checkpoint."""
        for step in self.steps:
            state = self._states[step]
            if state is not None:
                try:
                    self.trainer.load_state_dict(state)
                except (RuntimeError, KeyError, ValueError) as error:
                    raise TrainingStoppedError(
                        f"The checkpoint of step {step} does not fit {self.name}/{CONFIG}: "
                        f"{first_line(error)}"
                    ) from error
            yield Point(self.name, step, self.trainer)


def trajectories(settings: Settings, device: torch.device) -> list[Trajectory]:
    """Return the trainings that are asked for, ready to start.

    Raises:
        UserError: If one cannot be set up, or they differ in problem or network.
    """
    if not settings.runs:
        return [OwnTraining(seed, settings, device) for seed in settings.seeds]
    runs: list[Trajectory] = [
        EarlierRun(Path(folder), settings, device) for folder in settings.runs
    ]
    for name in ("problem", "hidden", "activation", "dtype", "dimension"):
        values = {getattr(run.settings, name) for run in runs}
        if len(values) > 1:
            raise UserError(f"--runs must agree in {name}, got {sorted(map(str, values))}.")
    return runs


def _settings_of(folder: Path) -> TrainingSettings:
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"--runs: {folder} has no {CONFIG}. Name folders that experiments/train.py wrote."
        )
    try:
        return parse(["--config", str(folder / CONFIG)]).settings
    except SystemExit as stop:
        raise UserError(
            f"--runs: {folder / CONFIG} does not hold the settings of a training."
        ) from stop


def _with_checkpoint(folder: Path, run: TrainingSettings) -> list[str]:
    return [name for name in run.optimizers if (folder / name / CURRENT).exists()]


def _first_with_checkpoint(folder: Path, run: TrainingSettings) -> str:
    names = _with_checkpoint(folder, run)
    if not names:
        raise UserError(
            f"--runs: {folder} has no checkpoint. Train with --checkpoint-steps or to the end."
        )
    return names[0]


def _states(folder: Path) -> dict[int, Any]:
    """Return the states of all whole checkpoints by step."""
    states = {}
    for path in (folder / PREVIOUS, folder / CURRENT):
        try:
            state = checkpoint.read(path)["state"]
        except (DamagedCheckpointError, FileNotFoundError):
            continue
        states[int(state["step"])] = state
    return states
