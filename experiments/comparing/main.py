"""The job: read, check everything, compare point by point, and close with table and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from experiments.comparing import figures, table
from experiments.comparing.command_line import CommandLine, parse
from experiments.comparing.measure import OperatorResult, measure
from experiments.comparing.points import TrainingStoppedError, Trajectory, trajectories
from experiments.comparing.progress import Progress
from experiments.comparing.settings import Settings
from experiments.training.device import set_up_device
from experiments.training.environment import describe_environment
from experiments.training.errors import UserError
from experiments.training.program import ExitCode, run_program
from experiments.training.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """All that is needed, checked and built.

    Args:
        settings: The resolved settings.
        trajectories: The trainings to compare along.
        folder: The run folder.
    """

    settings: Settings
    trajectories: Sequence[Trajectory]
    folder: RunFolder

    @property
    def title(self) -> str:
        """What is compared."""
        first = self.trajectories[0]
        return f"{first.trainer.describe()}, {first.optimizer}"


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if all is well, 1 if something could not be measured, 2 if the request was
        wrong, 130 if interrupted.
    """
    return run_program(
        lambda: prepare(parse(arguments)),
        lambda job: run(job, Console(), Console(stderr=True)),
        lambda path: f"stopped; results so far: {path}",
    )


def prepare(line: CommandLine) -> Job:
    """Check everything and build it; nothing is written before all is well.

    Raises:
        UserError: If the request cannot be met.
        ValueError: If a part of the library refuses its settings.
    """
    settings = line.settings.resolved()
    device = set_up_device(settings)
    trainings = trajectories(settings, device)
    folder = _create_folder(line.run_folder, trainings[0].settings.problem)
    folder.write_settings(settings)
    folder.write_environment(describe_environment(device))
    return Job(settings, trainings, folder)


def _create_folder(path: Path | None, problem: str) -> RunFolder:
    if path is not None and path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"The run folder {path} exists and is not empty. Choose another one with --run-folder."
        )
    return RunFolder.create(path, f"compare-{problem}")


def run(job: Job, console: Console, status: Console) -> ExitCode:
    """Compare at all points, and close with table and figures.

    Args:
        job: What to do.
        console: Where to show results.
        status: Where to show progress.

    Returns:
        The exit code.
    """
    settings, path = job.settings, job.folder.path
    console.print(f"{job.title}\nrun folder: {path}", highlight=False, soft_wrap=True)
    results: list[OperatorResult] = []
    problems: list[str] = []
    points = sum(len(training.steps) for training in job.trajectories)
    with Progress(status, points * len(settings.operators)) as progress:
        for training in job.trajectories:
            progress.show(f"{training.name}: {training.optimizer}")
            try:
                _compare_along(training, results, progress, job)
            except TrainingStoppedError as stop:
                problems.append(f"{training.name} stopped: {stop}")
    if results:
        _close(job, results, console)
    problems += _notes(results)
    if problems:
        console.print("\n".join(problems), highlight=False, soft_wrap=True, markup=False)
    failed = any(damped.failed for result in results for damped in result.damped)
    complete = len(results) == points * len(settings.operators)
    return ExitCode.SUCCESS if complete and not failed else ExitCode.FAILURE


def _compare_along(
    training: Trajectory, results: list[OperatorResult], progress: Progress, job: Job
) -> None:
    """Add the results of one training; after every point, they are on the disk."""
    for point in training.points():
        progress.show(f"{training.name}, step {point.step}")
        for result in measure(point, job.settings):
            results.append(result)
            progress.advance()
            progress.show(f"{training.name}, step {point.step}, {result.operator} is done")
        table.save(results, job.settings, job.title, job.folder.path)
        progress.show(f"{training.name}: {training.optimizer} after step {point.step}")


def _close(job: Job, results: Sequence[OperatorResult], console: Console) -> None:
    dampings = job.settings.dampings
    table.show(results, dampings[len(dampings) // 2], console)
    pictures = figures.draw(results, dampings, job.title, job.folder.path)
    console.print(
        f"table: {job.folder.path / table.MARKDOWN}, {table.TABLE}\nfigures: "
        + ", ".join(str(picture) for picture in pictures),
        highlight=False,
        soft_wrap=True,
    )


def _notes(results: Sequence[OperatorResult]) -> list[str]:
    """Return what went wrong, one line per approximation and reason."""
    notes = {
        f"{result.operator}: {damped.note}": None
        for result in results
        for damped in result.damped
        if damped.note
    }
    return list(notes)
