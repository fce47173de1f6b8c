"""The gallery: every problem with picture, error map, error against time, and published figure.

``python experiments/gallery.py`` trains, and makes the page of what it has trained; ``--from``
makes the page anew from run folders.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.spatial import KDTree

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments import catalog, figures
from experiments.command import ExitCode, main_of, own_names, refuse_own_code, resumed
from experiments.exhibits import EXHIBITS, Exhibit
from experiments.folder import CONFIG, ENVIRONMENT, SUMMARY, read_json, write_atomically
from experiments.objects import UserError, near_misses, short
from experiments.results import gather, held_out_warnings, last_rows, with_ratio
from experiments.train import run
from experiments.training import FINISHED, Trainer, restore
from pinncurv.problems import Interior, Problem

OPTIMIZERS = ("auto", "kfac_star", "levenberg_marquardt", "subspace_gauss_newton", "adam")
SECONDS = 60.0

_LABELS = {
    "rmse": "RMSE of u",
    "relative_error": "relative L2 error of u",
    "mean_error": "mean of the relative L2 errors",
}


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if every optimizer finished on every problem, 1 if one failed, 2 if the
        request was wrong, 130 if interrupted.
    """
    parser = argparse.ArgumentParser(prog="gallery.py", description=__doc__)
    parser.add_argument("--problems", metavar="P", nargs="+", default=list(EXHIBITS))
    parser.add_argument("--optimizers", metavar="O", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--seconds", metavar="S", type=float, help="of each optimizer, 60 as such")
    parser.add_argument("--steps", metavar="K", type=int, help="the same in steps")
    parser.add_argument("--seeds", metavar="I", type=int, nargs="+", default=[1])
    parser.add_argument("--runs", metavar="F", type=Path, default=Path("runs/gallery"))
    parser.add_argument("--from", dest="source", metavar="F", type=Path, help="do not train")
    parser.add_argument("--output", metavar="F", type=Path, help="the page; page.md in the runs")
    options = parser.parse_args(arguments)
    for name in options.problems:
        if name not in EXHIBITS:
            near = near_misses(name, EXHIBITS) or f" It has {', '.join(EXHIBITS)}."
            raise UserError(f"--problems: the gallery has no {name!r}.{near}")
    code = ExitCode.SUCCESS
    if options.source is None:
        code = _train(options)
    folder = options.source or options.runs
    output = options.output or folder / "page.md"
    write_page(options.problems, folder, output)
    print(f"page: {output}")
    return code


def _train(options: argparse.Namespace) -> ExitCode:
    """Train what is asked for, each problem in a run folder of its own, or go on with it."""
    seconds = SECONDS if options.seconds is None and options.steps is None else options.seconds
    codes = {ExitCode.SUCCESS}
    for name in options.problems:
        path = options.runs / name
        known = (path / CONFIG).is_file()
        try:
            experiment = dataclasses.replace(
                EXHIBITS[name].experiment,
                optimizers=tuple(options.optimizers),
                seconds=seconds,
                steps=options.steps,
                seeds=tuple(options.seeds),
            ).checked()
            codes.add(run(experiment, None if known else path, path if known else None))
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            codes.add(ExitCode.FAILURE)
        if ExitCode.INTERRUPTED in codes:
            break
    return max(codes)


# --- the page -------------------------------------------------------------------------------------


def write_page(names: Sequence[str], runs: Path, output: Path) -> None:
    """Write the page of the problems that were trained, and their pictures.

    Args:
        names: Names of exhibits.
        runs: A folder with a run folder for each of them that is to be shown.
        output: The page; pictures go into the folder ``figures`` beside it.

    Raises:
        UserError: If there is no run folder, or the page cannot be written.
    """
    trained = [name for name in names if (runs / name / CONFIG).is_file()]
    if not trained:
        raise UserError(f"{runs} has no run folder of {', '.join(names)}. Train them first.")
    try:
        (output.parent / "figures").mkdir(parents=True, exist_ok=True)
        results = {name: Result(name, EXHIBITS[name], runs / name) for name in trained}
        sections = [result.section(output.parent) for result in results.values()]
        text = "\n".join([_INTRODUCTION, *overview(list(results.values())), "", *sections])
        write_atomically(output, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}.") from error


_INTRODUCTION = """# Gallery

Each problem with default settings of each optimizer, equal time of its steps on the same machine.
Errors are medians over the seeds at the end of the time, measured on points that are not trained
on. Published figures are for their own hardware, budget and points: compare with care. Made by
`tox run -e gallery`, and made anew from its run folders by `tox run -e gallery -- --from F`. Longer
trainings of the automatic optimizer are in [auto.md](auto.md).
"""


class Result:
    """What a run folder holds of one exhibit.

    Args:
        name: The name of the exhibit.
        exhibit: The exhibit.
        folder: Its run folder.
    """

    def __init__(self, name: str, exhibit: Exhibit, folder: Path) -> None:
        self.name, self.exhibit, self.folder = name, exhibit, folder
        experiment = resumed(folder)
        refuse_own_code([word for words in own_names(experiment).values() for word in words])
        self.experiment = experiment.checked()
        self.table = gather([folder])
        if self.table.empty:
            raise UserError(f"{folder} has no metrics yet. Train it, or leave it out.")
        self.label = str(self.table["optimizer"].iloc[0])
        self.seed = self.experiment.seeds[0]
        self.trainer = Trainer(self.experiment, self.label, self.seed, torch.device("cpu"))
        restore(folder / self.label / f"seed{self.seed}", self.trainer)

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(p.numel() for p in self.trainer.objective.parameters())

    def errors(self) -> pd.Series:
        """Return the median error of each optimizer at the end."""
        last = last_rows(self.table)
        return last.groupby("optimizer", sort=False)[self.exhibit.error].median()

    def section(self, where: Path) -> str:
        """Draw the picture and return the section of the page."""
        picture = where / "figures" / f"gallery_{self.name}.png"
        draw(picture, self)
        about = inspect.getdoc(catalog.PROBLEMS[self.experiment.problem]) or ""
        summary, _, rest = about.partition("\n\n")
        equation = rest.partition("\n\n")[0]
        lines = [f"## {self.name}", "", summary, ""]
        if equation and not equation.startswith(("Args", "Source")):
            lines += ["```", equation, "```", ""]
        lines += [f"![{self.name}]({picture.relative_to(where)})", "", *self._rows(), ""]
        if self.exhibit.note:
            lines += [self.exhibit.note, ""]
        for line in [*self._unfinished(), *held_out_warnings(self.table)]:
            lines += [line.removeprefix(f"warning: {self.folder.name}/"), ""]
        return "\n".join([*lines, self._made_with(), ""])

    def _rows(self) -> list[str]:
        """Return the table of the optimizers and of the published figure."""
        last = with_ratio(last_rows(self.table))
        lines = [
            "| | error | range over seeds | held-out / loss | steps | time |",
            "|---|---|---|---|---|---|",
        ]
        for label, rows in last.groupby("optimizer", sort=False):
            error, median = rows[self.exhibit.error], rows.median(numeric_only=True)
            span = f"{_short(error.min())} to {_short(error.max())}" if len(rows) > 1 else ""
            cells = [
                *(str(label), _short(error.median()), span, f"{median['held_out_ratio']:.3g}"),
                *(f"{median['step']:.0f}", f"{median['seconds']:.0f} s"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        if (best := self.exhibit.published) is not None:
            lines.append(
                f"| published ({best.source}), {best.network} | {_short(best.error)} | | | "
                f"| {best.effort} |"
            )
        return lines

    def _unfinished(self) -> list[str]:
        """Return what ended before its time, and why."""
        try:
            summary = pd.read_csv(self.folder / SUMMARY)
        except (OSError, ValueError):
            return []
        ended = summary[summary["outcome"] != FINISHED]
        return [f"{r.optimizer}/seed{r.seed} stopped: {r.outcome}" for r in ended.itertuples()]

    def _made_with(self) -> str:
        history = read_json(self.folder / ENVIRONMENT)
        last: dict[str, Any] = history[-1] if isinstance(history, list) and history else {}
        settings = {**self.experiment.of("problem"), **self.experiment.of("network")}
        chosen = ", ".join(f"{k}={v}" for k, v in settings.items())
        seeds = ", ".join(map(str, self.experiment.seeds))
        return (
            f"{short(self.experiment.network)}({chosen}), {self.parameters} parameters, "
            f"{self.experiment.dtype}, seeds {seeds}, threads {last.get('threads')}, torch "
            f"{(last.get('packages') or {}).get('torch')}, commit {str(last.get('commit'))[:8]}."
        )


def overview(results: Sequence[Result]) -> list[str]:
    """Return the table with a row for each problem; the smallest error of ours is bold."""
    labels = list(dict.fromkeys(label for r in results for label in r.errors().index))
    head = ["problem", "parameters", *labels, "best published"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for result in results:
        errors, best = result.errors(), result.exhibit.published
        shown = {label: _short(error) for label, error in errors.items()}
        if errors.notna().any():
            shown[errors.idxmin()] = f"**{_short(errors.min())}**"
        cells = [shown.get(label, "") for label in labels]
        published = f"{_short(best.error)} ({best.effort})" if best else ""
        row = [f"[{result.name}](#{result.name})", str(result.parameters), *cells, published]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def _short(number: float) -> str:
    """Return 1.2e-3, a dash for NaN."""
    if number != number:
        return "-"
    digits, _, exponent = f"{number:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


# --- pictures -------------------------------------------------------------------------------------


def draw(path: Path, result: Result) -> None:
    """Draw solution, error map of the first optimizer, and error against time of all."""
    exhibit, problem = result.exhibit, result.trainer.problem
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(9.5, 2.8), layout="constrained")
        if problem.solution is None:
            curves = figure.subplots()
        else:
            left, middle, curves = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
            _draw_maps(figure, (left, middle), result)
        figures.draw_optimizers(curves, result.table, "seconds", exhibit.error)
        curves.set(xlabel="time of the steps [s]", ylabel=_LABELS.get(exhibit.error, exhibit.error))
        if exhibit.published is not None:
            curves.axhline(exhibit.published.error, color="gray", ls=":", label="best published")
        curves.legend(loc="best", fontsize=7, framealpha=0.6)
        figures.save_small(figure, path)


@torch.no_grad()
def _draw_maps(figure: Figure, axes: Sequence[Any], result: Result) -> None:
    problem, model, k = result.trainer.problem, result.trainer.model, result.exhibit.component
    extent, points, outside = _plane(problem, next(model.parameters()), result.exhibit.axes)
    assert problem.solution is not None
    solution = problem.solution(points)[:, k : k + 1]
    error = (model(points)[:, k : k + 1] - solution).abs()
    solution[outside], error[outside] = torch.nan, torch.nan
    unknown = "u" if problem.d_out == 1 else f"$u_{k + 1}$"
    unknown += " (slice)" if problem.d_in > 2 else ""
    for axis, values, colours, norm, title in (
        (axes[0], solution, "viridis", None, f"solution {unknown}"),
        (axes[1], error, "magma", figures.common_scale([error]), f"error, {result.label}"),
    ):
        image = figures.draw_image(axis, extent, values, colours, norm)
        figure.colorbar(image, ax=axis, fraction=0.046)
        names = [*problem.coordinates, *(f"$x_{i + 1}$" for i in range(problem.d_in))]
        first, second = (names[i] for i in result.exhibit.axes)
        axis.set(title=title, xlabel=first)
        axis.set_ylabel(second, rotation=0, labelpad=8)
        axis.locator_params(nbins=4)


def _plane(problem: Problem, like: torch.Tensor, axes: tuple[int, int]) -> Any:
    """Return extent and points of a grid over the box around the domain, and which are outside.

    Of a domain of the plane that is no box, these are the points far from all that are drawn of it.
    """
    evaluation = problem.evaluation
    if isinstance(evaluation, Interior):
        extent, points = figures.grid_of(evaluation.box.lower, evaluation.box.upper, like, axes)
        return extent, points, torch.zeros(len(points), dtype=torch.bool)
    x = evaluation.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    lower, upper = x.amin(0), x.amax(0)
    extent, points = figures.grid_of(lower.tolist(), upper.tolist(), like, axes)
    if problem.d_in != 2:
        return extent, points, torch.zeros(len(points), dtype=torch.bool)
    spacing = float((upper - lower).prod() / len(x)) ** 0.5
    distances, _ = KDTree(x.numpy()).query(points.cpu().double().numpy())
    return extent, points, torch.from_numpy(distances > 2 * spacing)


if __name__ == "__main__":
    main_of(main)
