"""Train a network on a PDE: ``python experiments/train.py --help``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import catalog, figures
from experiments.command import (
    ExitCode,
    Interruption,
    Parser,
    again,
    experiment_of,
    list_names,
    main_of,
    resumed,
    set_up_device,
)
from experiments.experiment import Experiment
from experiments.folder import SUMMARY, RunFolder, write_atomically
from experiments.objects import UserError, arguments, evaluate, resolve, told
from experiments.results import gather, held_out_warnings, last_rows, with_ratio
from experiments.tracking import TRACKERS, Trackers, check_trackers
from experiments.training import FINISHED, INTERRUPTED, NOT_STARTED, Trainer, Watch, restore, train

SMOKE_POINTS = 20

_DESCRIPTION = (
    "Train a network on a PDE, with one or several optimizers side by side for equal time. Without "
    "options: KFAC*, exact Gauss-Newton and Adam on the Poisson equation, in about a minute."
)


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if every optimizer finished, 1 if one failed, 2 if the request was wrong,
        130 if interrupted.
    """
    parser = Parser(_DESCRIPTION)
    parser.add_argument("--resume", metavar="F", type=Path, help="continue the run of this folder")
    parser.add_argument(
        "--smoke", action="store_true", help="two steps, one seed, few points, narrow layers"
    )
    parser.add_argument(
        "--track", metavar="W", nargs="+", default=[], help=f"also write to {' or '.join(TRACKERS)}"
    )
    options = parser.parse_args(arguments)
    if options.list is not None:
        list_names(options.list)
        return ExitCode.SUCCESS
    if options.resume and (options.config or options.run_folder):
        raise UserError(
            "--resume continues in its own folder with its own settings; drop --config and "
            "--run-folder."
        )
    experiment = experiment_of(parser, options, resumed(options.resume) if options.resume else None)
    if options.smoke:
        experiment = smoke(experiment)
    return run(experiment, options.run_folder, options.resume, options.track)


def smoke(experiment: Experiment) -> Experiment:
    """Return an experiment cut down to one seed, few points, narrow layers and two steps.

    With more time windows than two, each has a step.
    """
    settings = {
        key: str(SMOKE_POINTS) if key.rpartition(".")[2].startswith("n_") else text
        for key, text in experiment.settings.items()
        if key.rpartition(".")[2] not in ("seconds", "steps")
    }
    build = resolve(experiment.problem, catalog.PROBLEMS, "problem")
    sizes = [name for name in arguments(build) if name.startswith("n_")] if callable(build) else []
    settings.update({f"problem.{name}": str(SMOKE_POINTS) for name in sizes})
    if "network.widths" in settings:
        widths = evaluate(settings["network.widths"])
        settings["network.widths"] = str(tuple(min(width, 8) for width in widths))
    steps = max(2, len(experiment.windows) - 1)
    short = dataclasses.replace(experiment, steps=steps, seconds=None, seeds=experiment.seeds[:1])
    return dataclasses.replace(short, settings=settings).checked()


def run(
    experiment: Experiment,
    path: Path | None,
    resume: Path | None = None,
    trackers: Sequence[str] = (),
) -> ExitCode:
    """Train all optimizers from all seeds, and close with table and figure.

    Args:
        experiment: The checked experiment.
        path: The run folder; None for a new one.
        resume: The run folder to continue in.
        trackers: Names of trackers to write to as well.
    """
    check_trackers(trackers)
    device = set_up_device(experiment)
    trainings = [(label, seed) for seed in experiment.seeds for label in experiment.labels]
    # of the first seed all are built before anything is written, so that what is wrong shows now
    first = {
        label: Trainer(experiment, label, experiment.seeds[0], device)
        for label in experiment.labels
    }
    folder = (
        RunFolder(resume) if resume else RunFolder.create(path, first[trainings[0][0]].problem.name)
    )
    try:
        if resume:
            for label, trainer in first.items():
                restore(folder.path / label / f"seed{trainer.seed}", trainer)
        folder.begin(experiment, device)
        title = first[trainings[0][0]].describe()
        print(f"{title}\nrun folder: {folder.path}", flush=True)
        outcomes: dict[str, str] = {}
        with (
            Interruption() as interruption,
            Trackers(trackers, folder.path, experiment) as tracking,
        ):
            for i, (label, seed) in enumerate(trainings):
                name = f"{label}/seed{seed}"
                watch = Watch(interruption, f"[{i + 1}/{len(trainings)}]", tracking.recorder(name))
                try:
                    place = folder.part(label, f"seed{seed}")
                    trainer = first[label]
                    if seed != experiment.seeds[0]:
                        trainer = Trainer(experiment, label, seed, device)
                        # the files were read once, and may have changed since
                        trainer.identity["files"] = first[label].identity["files"]
                        restore(place, trainer)
                    outcomes[name] = train(trainer, place, watch)
                except UserError as error:
                    outcomes[name] = str(error)
                except OSError as error:
                    outcomes[name] = f"cannot write to {folder.path} ({error.strerror or error})"
                if interruption.requested:
                    break
        _close(experiment, folder.path, first, outcomes, title)
    finally:
        folder.close()
    unfinished = len(outcomes) < len(trainings) or INTERRUPTED in outcomes.values()
    if unfinished:
        rest = again("resume", folder.path, experiment)
        print(f"interrupted; continue with: python experiments/train.py {rest}")
        return ExitCode.INTERRUPTED
    return ExitCode.SUCCESS if set(outcomes.values()) == {FINISHED} else ExitCode.FAILURE


def _close(
    experiment: Experiment,
    path: Path,
    first: dict[str, Trainer],
    outcomes: dict[str, str],
    title: str,
) -> None:
    """Show and save the table, draw the figure, and say what went wrong."""
    for name, outcome in outcomes.items():
        if outcome not in (FINISHED, INTERRUPTED):
            print(f"{name} stopped: {outcome}")
    try:
        table = gather([path])
        if table.empty:
            return
        rows = with_ratio(last_rows(table))
        ended = [
            outcomes.get(f"{r.optimizer}/seed{r.seed}", NOT_STARTED) for r in rows.itertuples()
        ]
        rows = rows.assign(outcome=ended)
        columns = ["optimizer", "seed", "step", "seconds", "loss", "held_out_loss"]
        columns += ["held_out_ratio", "rmse", "relative_error", "mean_error"]
        shown = rows[[column for column in columns if column in rows]]
        shown = shown.rename(columns={"step": "steps", "seconds": "time [s]", "rmse": "RMSE"})
        print(f"\n{title}\n{shown.to_string(index=False, float_format='{:.3g}'.format)}")
        print(
            "time: of the steps alone. RMSE: root mean square of u - u* on fresh points; "
            "relative error: divided by that of u*; mean error: of the relative errors of its "
            "components. held_out_loss: on points not trained on, and as a multiple of the loss."
        )
        for line in held_out_warnings(table):
            print(line)
        write_atomically(path / SUMMARY, rows.to_csv(index=False).encode(errors="backslashreplace"))
        trained = {
            label: t.model for label, t in first.items() if f"{label}/seed{t.seed}" in outcomes
        }
        problem = next(iter(first.values())).problem
        try:
            drawn = figures.draw_run(path / "figure.png", table, problem, trained, title)
            print(f"figure: {drawn}")
        except (Exception, SystemExit) as error:  # of the user's own code it may be any
            print(f"no figure: {told(error)}")
        print(f"metrics, checkpoints, settings: {path}")
    except OSError as error:
        print(f"cannot write to {path} ({error.strerror or error})")


if __name__ == "__main__":
    main_of(main)
