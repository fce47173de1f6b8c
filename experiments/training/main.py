"""The job: read, check everything, train, and close with table and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from experiments.training import checkpoint, figure, summary
from experiments.training.command_line import CommandLine, parse
from experiments.training.device import set_up_device
from experiments.training.environment import describe_environment
from experiments.training.errors import UserError, first_line
from experiments.training.loop import FINISHED, INTERRUPTED, Interruption, train
from experiments.training.problems import PROBLEMS, build_problem
from experiments.training.program import ExitCode, run_program
from experiments.training.progress import Progress
from experiments.training.run_folder import RunFolder
from experiments.training.settings import Settings
from experiments.training.trainer import Trainer
from pinncurv.problems import Problem


@dataclass(frozen=True)
class Job:
    """All that is needed, checked and built.

    Args:
        settings: The resolved settings.
        trainers: One per optimizer.
        folder: The run folder.
    """

    settings: Settings
    trainers: Sequence[Trainer]
    folder: RunFolder

    @property
    def title(self) -> str:
        """What is trained."""
        return self.trainers[0].describe(self.settings.activation, self.settings.dtype)


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if every optimizer finished, 1 if one failed, 2 if the request was wrong,
        130 if interrupted.
    """
    return run_program(
        lambda: prepare(parse(arguments)),
        lambda job: run(job, Console()),
        lambda path: f"stopped at once; {_hint(path)}",
    )


def prepare(line: CommandLine) -> Job:
    """Check everything and build it; nothing is written before all is well.

    Raises:
        UserError: If the request cannot be met.
        ValueError: If a part of the library refuses its settings.
    """
    settings = line.settings.resolved()
    device = set_up_device(settings)
    problem = build_problem(settings.problem, settings.sizes)
    trainers = [_trainer(name, settings, problem, device) for name in settings.optimizers]
    if line.resume is None:
        folder = RunFolder.create(line.run_folder, settings.problem)
    else:
        folder = RunFolder(line.resume)
        _restore(trainers, settings, folder)
    folder.write_settings(settings)
    folder.write_environment(describe_environment(device))
    return Job(settings, trainers, folder)


def _trainer(name: str, settings: Settings, problem: Problem, device: torch.device) -> Trainer:
    """Build one optimizer with all that it works on; errors say which one it is."""
    try:
        return Trainer(name, settings, problem, device)
    except (UserError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"{name} cannot be set up: {first_line(error)}") from error


def _restore(trainers: Sequence[Trainer], settings: Settings, folder: RunFolder) -> None:
    """Continue from the newest checkpoints, where there are any."""
    try:
        for trainer in trainers:
            state = checkpoint.load(folder.path / trainer.name, settings.identity(trainer.name))
            if state is not None:
                trainer.load_state_dict(state)
    except UserError:
        folder.close()
        raise


def run(job: Job, console: Console) -> ExitCode:
    """Train all optimizers, and close with table and figure.

    Args:
        job: What to do.
        console: Where to show it.

    Returns:
        The exit code.
    """
    console.print(f"{job.title}\nrun folder: {job.folder.path}", highlight=False, soft_wrap=True)
    results: dict[str, summary.Result] = {}
    with Interruption() as interruption:
        for i, trainer in enumerate(job.trainers):
            folder = job.folder.optimizer(trainer.name)
            progress = Progress(console, f"[{i + 1}/{len(job.trainers)}]")
            outcome = train(trainer, job.settings, folder, progress, interruption)
            results[trainer.name] = summary.read_result(folder, outcome)
            if interruption.requested:
                break
    _close(job, results, console)
    outcomes = {result.outcome for result in results.values()}
    if interruption.requested:
        return ExitCode.INTERRUPTED
    return ExitCode.SUCCESS if outcomes == {FINISHED} else ExitCode.FAILURE


def _close(job: Job, results: dict[str, summary.Result], console: Console) -> None:
    """Show and save the table, draw the figure, and say what is left to do."""
    path = job.folder.path
    console.print()
    summary.show(results, job.title, console)
    summary.save(results, path)
    measured = {name for name, result in results.items() if result.metrics}
    models = {trainer.name: trainer.model for trainer in job.trainers if trainer.name in measured}
    coordinates = PROBLEMS[job.settings.problem].coordinates
    lines = [f"metrics, checkpoints, settings: {path}"]
    if models:
        picture = figure.draw(path, job.trainers[0].problem, models, coordinates, job.title)
        lines.insert(0, f"figure: {picture}")
    for name, result in results.items():
        if result.outcome not in (FINISHED, INTERRUPTED):
            lines.append(f"{name} stopped: {result.outcome}")
    if len(results) < len(job.trainers) or INTERRUPTED in {r.outcome for r in results.values()}:
        lines.append(f"interrupted; {_hint(path)}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _hint(path: Path) -> str:
    return f"continue with: python experiments/train.py --resume {path}"
