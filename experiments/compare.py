"""Compare curvature operators with the exact Gauss-Newton matrix: ``compare.py --help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.command import ExitCode, Interruption, Parser, list_names, main_of
from experiments.comparing import pictures
from experiments.comparing.job import Comparison, Training, job_of
from experiments.comparing.measure import Point
from experiments.comparing.operators import OPERATORS, recipes
from experiments.comparing.tables import Tables, shown
from experiments.folder import RunFolder
from experiments.objects import first_line
from experiments.training import Lines

_DESCRIPTION = (
    "Compare curvature operators with each other and with the exact Gauss-Newton matrix along a "
    "training, for several dampings. Without options: nine of them on the Poisson equation, after "
    "0, 10 and 50 steps of KFAC* from three seeds, in about a minute."
)
_OPTIONS = {
    "operators": ("C", str, "names (see --list), [LABEL=]EXPRESSION such as a=KFAC(reduce), or FILE.py:NAME"),
    "runs": ("F", str, "folders of train.py: compare at their checkpoints instead"),
    "steps": ("K", int, "compare after so many steps of training"),
    "dampings": ("L", float, "λ > 0; where one is shown it is the middle one"),
    "continued_steps": ("K", int, "train on from every point with every operator"),
    "continued_rule": ("R", str, "how λ changes then, e.g. ConstantDamping()"),
    "dense_limit": ("D", int, "most parameters for exact numbers; above, estimates"),
    "probes": ("K", int, "random vectors of each of these"),
    "lanczos_steps": ("K", int, "for spectra and condition numbers above"),
    "cg_tolerance": ("T", float, "relative residual that conjugate gradients must reach"),
    "cg_limit": ("K", int, "most iterations of these"),
}
_OF_RUNS = ("steps", "seconds", "record_every", "checkpoint_seconds", "checkpoint_steps")
_PRINTED = [
    *("operator", "cosine", "error", "block_cosine", "decrease", "step_cosine", "condition"),
    *("cg_iterations", "continued_loss"),
]


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if all is well, 1 if something could not be measured, 2 if the request was
        wrong, 130 if interrupted.
    """
    parser = Parser(_DESCRIPTION, _OF_RUNS)
    for name, (metavar, kind, text) in _OPTIONS.items():
        several = "+" if isinstance(getattr(Comparison, name), tuple) else None
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, metavar=metavar, type=kind, nargs=several, help=text)
    options = parser.parse_args(arguments)
    if options.list is not None:
        list_names(options.list)
        if not options.list:
            print("\n--operators, besides the optimizers with a curvature above")
            print("\n".join(f"  {name:30}{recipe}" for name, recipe in OPERATORS.items()))
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
    first, operators, tables = trainings[0].trainer, recipes(job.operators), Tables()
    title = f"{first.describe()}, {first.label}"
    folder = RunFolder.create(path, f"compare-{first.problem.name}")
    total = len(operators) * sum(len(training.states) for training in trainings)
    terminal = sys.stderr.isatty()
    stream = sys.stderr if terminal else Lines(sys.stderr)
    try:
        folder.begin(job, first.device)
        print(f"{title}\nrun folder: {folder.path}", flush=True)
        with Interruption() as interruption, tqdm(
            total=total, file=stream, mininterval=0.2 if terminal else 5, dynamic_ncols=terminal
        ) as bar:
            for training in trainings:
                bar.set_description(training.name, refresh=False)
                try:
                    for step in training.points(interruption):
                        point = Point(training.name, training.trainer, job, tables)
                        for label, recipe in operators.items():
                            if not interruption.requested:
                                bar.set_postfix_str(f"step {step}, {label}", refresh=False)
                                point.measure(label, recipe)
                                bar.update()
                        tables.save(folder.path, job, title)
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
    last = table[(table["step"] == step) & (table["damping"] == job.middle)]
    printed = shown(last).reindex(columns=_PRINTED).dropna(axis=1)
    print(f"\nafter {step} steps, λ = {job.middle:g}\n{printed.to_string(index=False)}")
    print(
        "Against the exact Gauss-Newton matrix: cosine and relative error of the matrix, cosine of "
        "its diagonal blocks; share of the exact model's decrease, cosine of the step; condition "
        "number and iterations of CG with the inverse as preconditioner. All: table.md, table.csv."
    )
    names = ", ".join(path.name for path in pictures.draw(path, tables, job, title))
    print(f"figures: {names}\neverything: {path}")


if __name__ == "__main__":
    main_of(main)
