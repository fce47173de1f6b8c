"""Gathers run folders into one tidy table, results.csv by default, and draws their curves."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import figures
from experiments.command import ExitCode, files_told, main_of
from experiments.experiment import from_json
from experiments.folder import CONFIG, ENVIRONMENT, read_json, write_atomically
from experiments.objects import UserError, short
from experiments.training import METRICS, whole_lines
from pinncurv.optim import exhausted

# Where published curves are found, if the reader has them; they are not part of the project.
PUBLISHED = Path(__file__).resolve().parents[2] / "shared/reference/kfac_pinns_2024_curves.csv.gz"

# What every file of metrics has.
_NUMBERS = ("step", "seconds", "loss", "held_out_loss", "rmse", "relative_error")

# What the paper calls the optimizers, and what they are called here.
PAPERS_NAMES = {
    "KFAC*": "kfac_star",
    "KFAC": "kfac",
    "ENGD (full)": "engd",
    "ENGD (per layer)": "engd_per_layer",
    "ENGD (diagonal)": "engd_diagonal",
    "HessianFree": "hessian_free",
    "Adam": "adam",
    "SGD": "sgd",
    "LBFGS": "lbfgs",
}


def run_folders(paths: Iterable[Path], seen: set[Path] | None = None) -> Iterator[Path]:
    """Yield the run folders among folders and below them, each once, whatever links there are."""
    seen = set() if seen is None else seen
    for path in paths:
        if (real := path.resolve()) in seen:
            continue
        seen.add(real)
        if (path / CONFIG).is_file():
            yield path
        elif path.is_dir():
            yield from run_folders(sorted(p for p in path.iterdir() if p.is_dir()), seen)
        else:
            raise UserError(f"There is no run folder {path}.")


def gather(paths: Iterable[Path]) -> pd.DataFrame:
    """Return the metrics of all runs: a row for each run, optimizer, seed and recorded step.

    Nothing in a folder is run or trusted: what cannot be read is left out.
    """
    tables = []
    for folder in run_folders(paths):
        tree = read_json(folder / CONFIG)
        try:
            experiment = from_json(tree, str(folder / CONFIG))
        except UserError:
            continue
        history = read_json(folder / ENVIRONMENT)
        last = (
            history[-1]
            if isinstance(history, list) and history and isinstance(history[-1], dict)
            else {}
        )
        labels = [label for label in experiment.labels if label.isidentifier()]  # no other folder
        for label, seed in product(labels, experiment.seeds):
            table = _metrics(folder / label / f"seed{seed}" / METRICS)
            if table is None:
                continue
            targets = ("problem", "network", label)
            settings = {
                k: v for k, v in experiment.settings.items() if k.partition(".")[0] in targets
            }
            about = {
                "run": str(folder),
                "problem": short(experiment.problem),
                "network": short(experiment.network),
                "optimizer": label,
                "seed": seed,
                "settings": json.dumps(settings),
                "commit": last.get("commit"),
                "device": last.get("device_name"),
            }
            table = table.drop(columns=list(about), errors="ignore")
            for k, (name, value) in enumerate(about.items()):
                table.insert(k, name, value)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _metrics(path: Path) -> pd.DataFrame | None:
    """Return the rows that were written to the end; None if it is no file of metrics."""
    try:
        table = pd.read_csv(whole_lines(path), on_bad_lines="skip")
        numbers = table[list(_NUMBERS)].apply(pd.to_numeric, errors="coerce")
    except (OSError, ValueError, KeyError):
        return None
    return table.assign(**numbers).dropna(subset="step")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write a table of results as CSV with four digits, whole or not at all."""
    write_atomically(path, table.to_csv(index=False, float_format="%.4g").encode())


def curves_of(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with optimizers told apart that differ in settings, or repeat a seed."""

    def labelled(rows: pd.DataFrame) -> pd.DataFrame:
        trainings = rows.drop_duplicates(["run", "seed"])
        one = trainings["settings"].nunique() == 1 and trainings["seed"].is_unique
        names = rows["run"].map(lambda run: f"{Path(run).name}/")
        return rows if one else rows.assign(optimizer=names + rows["optimizer"])

    return pd.concat([labelled(rows) for _, rows in table.groupby("optimizer", sort=False)])


def last_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the last row of every training."""
    return table.groupby(["run", "optimizer", "seed"], sort=False, as_index=False).tail(1)


def with_ratio(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows with the held-out loss as a multiple of the loss, after it."""
    place = list(rows.columns).index("held_out_loss") + 1
    rows = rows.copy()
    rows.insert(place, "held_out_ratio", rows["held_out_loss"] / rows["loss"])
    return rows


def held_out_warnings(table: pd.DataFrame) -> Iterator[str]:
    """Yield a line for every training that ended with its points exhausted."""
    for (run, name, seed), rows in table.groupby(["run", "optimizer", "seed"], sort=False):
        if words := exhausted(list(zip(rows["loss"], rows["held_out_loss"], strict=True))):
            yield f"warning: {Path(run).name}/{name}/seed{seed}: {words}"


def published_curves(problem: str, network: str) -> pd.DataFrame | None:
    """Return published curves of a problem and network, where the reference data is present.

    The reference counts steps from zero, with the error after each: of what is step k there, k + 1
    updates were taken, and that is its step here. The loss is the one before it. Where two runs
    have one name there, the second is left out.
    """
    if not PUBLISHED.is_file():
        return None
    curves = pd.read_csv(PUBLISHED)
    second = (curves.groupby("run")["step"].diff() < 0).groupby(curves["run"]).cummax()
    curves = curves[~second].assign(step=lambda table: table["step"] + 1)
    parts = curves["run"].str.split("/", expand=True)
    chosen = curves.assign(
        problem=parts[0],
        network=parts[1],
        optimizer=parts[2].map(PAPERS_NAMES).fillna(parts[2]),
        search=parts[3],
    )
    chosen = chosen[(chosen["problem"] == problem) & (chosen["network"] == network)].rename(
        columns={"time": "seconds", "l2_error": "rmse"}
    )
    return chosen if len(chosen) else None


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program."""
    parser = argparse.ArgumentParser(prog="results.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of such")
    parser.add_argument(
        "--csv", type=Path, default=Path("results.csv"), help="the table of all rows"
    )
    parser.add_argument("--figure", type=Path, help="error against time and steps, over all runs")
    parser.add_argument(
        "--network", help="published curves of this network, e.g. 2-64-1, are drawn along"
    )
    options = parser.parse_args(arguments)
    if options.network and not options.figure:
        raise UserError("--network has no effect without --figure.")
    with files_told():
        return _show(options)


def _show(options: argparse.Namespace) -> ExitCode:
    table = gather(options.runs)
    if table.empty:
        raise UserError(f"No run folder below {', '.join(map(str, options.runs))} has metrics.")
    table.to_csv(options.csv, index=False, errors="backslashreplace")
    columns = [
        *("problem", "optimizer", "seed", "step", "seconds"),
        *("loss", "held_out_loss", "held_out_ratio", "rmse"),
    ]
    last = with_ratio(last_rows(table)).assign(
        run=lambda rows: rows["run"].map(lambda run: Path(run).name)
    )
    print(last[["run", *columns]].to_string(index=False, float_format="{:.3g}".format))
    for line in held_out_warnings(table):
        print(line)
    print(f"table: {options.csv}")
    if options.figure is not None:
        problems = table["problem"].unique()
        if len(problems) > 1:
            raise UserError(
                f"--figure shows one problem, and there are {', '.join(problems)}. Name fewer runs."
            )
        curves = published_curves(problems[0], options.network) if options.network else None
        with mpl.rc_context(figures.STYLE):
            figure = Figure(figsize=(9.5, 4.2), layout="constrained")
            figures.draw_curves(figure, curves_of(table), curves)
            figure.suptitle(problems[0])
            print(f"figure: {figures.save(figure, options.figure)}")
    return ExitCode.SUCCESS


if __name__ == "__main__":
    main_of(main)
