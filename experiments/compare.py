"""Compare curvature operators with the exact Gauss-Newton matrix: ``compare.py --help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.command import ExitCode, Interruption, Parser, list_names, main_of
from experiments.comparing import pictures
from experiments.comparing.job import Comparison, Training, job_of
from experiments.comparing.measure import Point
from experiments.comparing.operators import OPERATORS, recipes
from experiments.comparing.tables import PRINTED, Tables, shown
from experiments.folder import RunFolder
from experiments.objects import first_line
from experiments.training import progress

_DESCRIPTION = (
    "Compare curvature operators with each other and with the exact Gauss-Newton matrix along a "
    "training, for several dampings. Without options: nine of them on the Poisson equation, after "
    "0, 10 and 50 steps of KFAC* from three seeds, in about a minute."
)
OF_TRAINING = ("steps", "seconds", "record_every", "checkpoint_seconds", "checkpoint_steps")


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if all is well, 1 if something could not be measured, 2 if the request was
        wrong, 130 if interrupted.
    """
    parser = Parser(_DESCRIPTION, OF_TRAINING)
    Comparison.add_options(parser)
    options = parser.parse_args(arguments)
    if options.list is not None:
        list_names(options.list)
        if not options.list:
            print("\n--operators, besides the optimizers with a curvature")
            for name, recipe in OPERATORS.items():
                print(f"  {name:30}{getattr(recipe, '__name__', recipe)}")
        return ExitCode.SUCCESS
    job, trainings = job_of(parser, options)
    return run(job, trainings, options.run_folder)


def run(job: Comparison, trainings: Sequence[Training], path: Path | None) -> ExitCode:
    """Compare at all points, and close with table and figures.

    Args:
        job: What to measure.
        trainings: Where.
        path: The run folder; None for a new one.
    """
    first, tables = trainings[0].trainer, Tables()
    title = f"{first.describe()}, {first.label}"
    folder = RunFolder.create(path, f"compare-{first.problem.name}")
    operators = recipes(job.operators)
    bar = progress(total=len(operators) * sum(len(training.states) for training in trainings))
    try:
        folder.begin(job, first.device)
        print(f"{title}\nrun folder: {folder.path}", flush=True)
        with Interruption() as interruption, bar:
            for training in trainings:
                try:
                    for step in training.points(interruption):
                        point = Point(training.name, training.trainer, job, tables)
                        for label, recipe in operators.items():
                            if not interruption.requested:
                                bar.set_description(f"{training.name}, step {step}, {label}", False)
                                point.measure(label, recipe)
                                bar.update()
                        tables.save(folder.path, job, title)  # so that no point is lost
                except (ArithmeticError, ValueError, RuntimeError, MemoryError) as error:
                    tables.failures.append(f"{training.name} stopped: {first_line(error)}")
            if tables.rows["table"]:
                _close(job, tables, folder.path, title)
    except OSError as error:
        tables.failures.append(f"cannot write to {folder.path} ({error.strerror or error})")
    finally:
        folder.close()
    print("\n".join(dict.fromkeys(tables.failures)))
    if interruption.requested:
        return ExitCode.INTERRUPTED
    return ExitCode.FAILURE if tables.failures else ExitCode.SUCCESS


def _close(job: Comparison, tables: Tables, path: Path, title: str) -> None:
    table = tables["table"]
    step = table["step"].max()
    last = shown(table[(table["step"] == step) & (table["damping"] == job.middle)])
    printed = last[[name for name in PRINTED if name in last]].to_string(index=False)
    print(
        f"\nafter {step} steps, λ = {job.middle:g}, medians over the trainings\n{printed}\n"
        "Against the exact Gauss-Newton matrix: cosine and relative error of the matrix, cosine of "
        "its diagonal blocks; share of the exact model's decrease, cosine of the step; condition "
        "number and iterations of CG with the inverse as preconditioner."
    )
    drawn = ", ".join(picture.name for picture in pictures.draw(path, tables, job, title))
    print(f"figures: {drawn}\ntables: table.md, table.csv, ... in {path}")


if __name__ == "__main__":
    main_of(main)
