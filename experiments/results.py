"""Gathers run folders into one tidy table, and draws their curves: ``results.py --help``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import figures
from experiments.command import ExitCode, main_of
from experiments.experiment import from_json
from experiments.folder import CONFIG, ENVIRONMENT, read_json
from experiments.objects import UserError, short
from experiments.training import METRICS

# Where published curves are found, if the reader has them; they are not part of the project.
PUBLISHED = Path(__file__).resolve().parents[2] / "shared/reference/kfac_pinns_2024_curves.csv.gz"

_NAMES = {
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


def run_folders(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the run folders among folders and below them."""
    for path in paths:
        if (path / CONFIG).is_file():
            yield path
        elif path.is_dir():
            yield from run_folders(sorted(p for p in path.iterdir() if p.is_dir()))
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
        except (UserError, TypeError):
            continue
        history = read_json(folder / ENVIRONMENT)
        last = (
            history[-1]
            if isinstance(history, list) and history and isinstance(history[-1], dict)
            else {}
        )
        for label, seed in (
            (label, seed) for label in experiment.labels for seed in experiment.seeds
        ):
            path = folder / label / f"seed{seed}" / METRICS
            try:
                table = pd.read_csv(path, on_bad_lines="skip")
            except (OSError, ValueError):
                continue
            about = {
                "run": str(folder),
                "problem": short(experiment.problem),
                "network": short(experiment.network),
                "optimizer": label,
                "seed": seed,
                "settings": json.dumps(experiment.only(label).settings)
                if _known(experiment, label)
                else "",
                "commit": last.get("commit"),
                "device": last.get("device_name"),
            }
            for k, (name, value) in enumerate(about.items()):
                table.insert(k, name, value)
            tables.append(table)
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _known(experiment: object, label: str) -> bool:
    return ".py" not in str(getattr(experiment, "labels", {}).get(label, ""))


def last_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Return the last row of every training."""
    return table.groupby(["run", "optimizer", "seed"], sort=False, as_index=False).tail(1)


def published_curves(problem: str, parameters: int | None = None) -> pd.DataFrame | None:
    """Return published curves of a problem, where the reference data is present."""
    if not PUBLISHED.is_file():
        return None
    curves = pd.read_csv(PUBLISHED)
    parts = curves["run"].str.split("/", expand=True)
    chosen = curves.assign(
        problem=parts[0], network=parts[1], optimizer=parts[2].map(_NAMES).fillna(parts[2])
    )
    chosen = chosen[chosen["problem"] == problem].rename(
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
    table = gather(options.runs)
    if table.empty:
        raise UserError(f"No run folder below {', '.join(map(str, options.runs))} has metrics.")
    table.to_csv(options.csv, index=False)
    columns = ["problem", "optimizer", "seed", "step", "seconds", "loss", "held_out_loss", "rmse"]
    print(last_rows(table)[columns].to_string(index=False, float_format="{:.3g}".format))
    print(f"table: {options.csv}")
    if options.figure is not None:
        problems = table["problem"].unique()
        if len(problems) > 1:
            raise UserError(
                f"--figure shows one problem, and there are {', '.join(problems)}. Name fewer runs."
            )
        curves = published_curves(problems[0]) if options.network else None
        if curves is not None:
            curves = curves[curves["network"] == options.network]
        with mpl.rc_context(figures.STYLE):
            figure = Figure(figsize=(9.5, 4.2), layout="constrained")
            figures.draw_curves(figure, table, curves)
            print(f"figure: {figures.save(figure, options.figure)}")
    return ExitCode.SUCCESS


if __name__ == "__main__":
    main_of(main)
