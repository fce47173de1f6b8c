"""Pictures of a comparison: medians and ranges over the trainings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.comparing.job import Comparison
from experiments.comparing.tables import Tables
from experiments.figures import COLOURS, LINES, STYLE, save

_STYLE = {**STYLE, "font.size": 9, "legend.frameon": False, "lines.markersize": 4.5}
_COLOURS = (*COLOURS[:6], "#8C564B", "#6A3D9A")
_MARKERS = "os^DvPX<>"
_MAPS_PER_ROW = 6
_LEAST_ERROR = 1e-2  # what is smaller is drawn there, to leave room for the others
_ROUNDING = 1e-16  # eigenvalues that far below the largest one are rounding errors
_MANY = 1024  # more eigenvalues get a logarithmic axis, as the largest ones matter

# The heading of a panel of each measure; those of numbers in [0, 1] are not logarithmic.
_HEADINGS = {
    "cosine": "cosine with the exact matrix",
    "error": f"relative error of the matrix, at least {_LEAST_ERROR:g}",
    "decrease": "share of the exact model's decrease",
    "step_cosine": "cosine with the exact step",
    "condition": "condition number of (P+λI)⁻¹(G+λI)",
    "cg_iterations": "iterations of preconditioned CG",
}
_LINEAR = ("cosine", "decrease", "step_cosine")

Looks = dict[str, dict[str, Any]]
_Panel = Callable[[Axes], None]


def draw(folder: Path, tables: Tables, job: Comparison, title: str) -> list[Path]:
    """Draw all pictures of some tables into a folder."""
    table = tables["table"].replace(math.inf, math.nan)
    table["error"] = table["error"].clip(lower=_LEAST_ERROR)
    steps = sorted({int(table["step"].min()), int(table["step"].max())})
    last, middle = table[table["step"] == steps[-1]], table[table["damping"] == job.middle]
    looks = _looks(table["operator"].unique())

    def spectra(*at: int) -> list[_Panel]:
        eigenvalues = tables["spectra"]
        return [partial(_spectra, eigenvalues, step, job.dampings, looks) for step in at]

    def curves(rows: pd.DataFrame, x: str, *measures: str) -> list[_Panel]:
        return [partial(_curves, rows, x, measure, looks) for measure in measures]

    at, after = f"λ = {job.middle:g}", _after(steps[-1])
    along, over = ("cosine", "error", "decrease", "condition"), list(_HEADINGS)[2:]
    ends = [*curves(middle, "step", "cosine"), *curves(last, "damping", "decrease")]
    panels: dict[str, tuple[str, int, list[_Panel]]] = {
        "overview": (after, 3, [*spectra(steps[-1]), *ends]),
        "training": (at, 2, curves(middle, "step", *along)),
        "damping": (after, 2, curves(last, "damping", *over)),
        "spectra": ("eigenvalues", len(steps), spectra(*steps)),
    }
    if table["continued_loss"].notna().any():
        measures = ("decrease", "step_cosine", "condition", "error")
        predictions: list[_Panel] = [partial(_prediction, middle, m, looks) for m in measures]
        panels["prediction"] = (f"{at}, all points", 2, predictions)
    figures = {}
    with mpl.rc_context(_STYLE):
        for name, (note, columns, parts) in panels.items():
            rows = len(parts) // columns
            size = (4 * columns + 1.6, 0.4 + (2.8 if rows > 1 else 3.4) * rows)
            figures[name] = figure = Figure(figsize=size, layout="constrained")
            figure.suptitle(f"{title}, {note}")
            handles: dict[str, Any] = {}
            axes = figure.subplots(rows, columns, squeeze=False).flat
            for axis, part in zip(axes, parts, strict=True):
                part(axis)
                handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
            shown = [name for name in looks if name in handles]
            figure.legend([handles[name] for name in shown], shown, loc="outside right upper")
        if tables.rows["layers"]:
            figures["layers"] = _layers(tables["layers"], steps, title)
        if tables.rows["pairs"]:
            figures["pairs"] = _pairs(tables["pairs"], list(looks), job.middle, title)
        return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _looks(operators: Iterable[str]) -> Looks:
    """Return how each operator is drawn: the same in all pictures."""
    looks: Looks = {
        "exact": {"color": "black", "linewidth": 2.2, "marker": ""},
        "identity": {"color": "0.55", "linestyle": ":", "marker": "x"},
    }
    for i, name in enumerate(n for n in operators if n not in looks):
        line = LINES[i // len(_COLOURS) % len(LINES)]
        marker = _MARKERS[i % len(_MARKERS)]
        looks[name] = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": line, "marker": marker}
    return {name: looks[name] for name in operators}


def _after(step: int) -> str:
    return "at initialization" if step == 0 else f"after {step} steps"


def _curves(table: pd.DataFrame, x: str, measure: str, looks: Looks, axis: Axes) -> None:
    """Draw the median and the range over the trainings of one column, by operator."""
    rows = table.assign(y=table[measure].astype(float)).dropna(subset="y")
    if measure in ("cosine", "error"):  # of the exact matrix, they are known
        rows = rows[rows["operator"] != "exact"]
    for name, own in rows.groupby("operator", sort=False):
        line = own.groupby(x)["y"].agg(["median", "min", "max"])
        axis.plot(line.index, line["median"], label=name, **looks[str(name)])
        colour = looks[str(name)]["color"]
        axis.fill_between(line.index, line["min"], line["max"], color=colour, alpha=0.15)
    axis.set_title(_HEADINGS[measure])
    if measure in _LINEAR:
        axis.set_ylim(min(-0.03, rows["y"].min() - 0.03), 1.03)
    elif (rows["y"] > 0).any():
        axis.set_yscale("log")
    if x == "damping":
        axis.set(xscale="log", xlabel="damping λ")
        return
    steps = sorted(table["step"].unique())
    if steps[-1] > 0:
        axis.set_xscale("symlog", linthresh=next(step for step in steps if step > 0))
    axis.set_xticks(steps, list(map(str, steps)))
    axis.minorticks_off()
    axis.set_xlabel("training step")


def _prediction(table: pd.DataFrame, measure: str, looks: Looks, axis: Axes) -> None:
    """Draw what further training makes of the loss over one measure, a point per training."""
    rows = table.dropna(subset=[measure, "continued_loss"])
    for name, own in rows.groupby("operator", sort=False):
        look = {**looks[str(name)], "linestyle": "none"}
        look["marker"] = look["marker"] or "*"
        axis.plot(own[measure], own["continued_loss"] / own["loss"], label=name, **look)
    axis.set(title=_HEADINGS[measure], ylabel="loss after further steps / before")
    if len(rows):
        axis.set(yscale="log", xscale="linear" if measure in _LINEAR else "log")


def _spectra(
    table: pd.DataFrame, step: int, dampings: Iterable[float], looks: Looks, axis: Axes
) -> None:
    """Draw sorted eigenvalues at one step, medians over the trainings, and the dampings."""
    axis.set(title=f"eigenvalues {_after(step)}; dotted: λ", xlabel="rank")
    rows = table[table["step"] == step] if len(table) else table
    for name, own in rows.groupby("operator", sort=False) if len(rows) else ():
        logs = own.assign(eigenvalue=np.log(own["eigenvalue"].clip(lower=1e-300)))
        trainings = [part for _, part in logs.groupby("training", sort=False)]
        ranks = trainings[0]["rank"]  # estimates have others in every training
        curves = [np.interp(ranks, part["rank"], part["eigenvalue"]) for part in trainings]
        low, median, high = np.exp(np.quantile(curves, (0, 0.5, 1), axis=0))
        axis.plot(ranks, median, label=name, markevery=max(1, len(ranks) // 8), **looks[str(name)])
        axis.fill_between(ranks, low, high, color=looks[str(name)]["color"], alpha=0.12)
    for damping in dampings:
        axis.axhline(damping, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
    if len(rows) and (top := rows["eigenvalue"].max()) > 0:
        axis.set(yscale="log", ylim=(_ROUNDING * top, 10 * top))
        axis.set_xscale("log" if rows["rank"].max() > _MANY else "linear")


def _map(axis: Axes, values: pd.DataFrame, title: str, colours: str = "PuOr") -> Any:
    """Draw a number in [-1, 1] per pair, and write it where there is room."""
    image = axis.imshow(values, cmap=colours, vmin=0 if colours == "Greys" else -1, vmax=1)
    axis.grid(False)
    axis.set_title(title)
    axis.set_xticks(
        range(len(values)),
        values.columns,
        rotation=90 * (len("".join(map(str, values.columns))) > 24),
    )
    axis.set_yticks(range(len(values)), values.index)
    for (i, j), value in np.ndenumerate(values.to_numpy()):
        if len(values) <= 10 and abs(value) >= 0.005:
            colour = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    return image


def _layers(table: pd.DataFrame, steps: Sequence[int], title: str) -> Figure:
    """Draw maps over the pairs of layers, at the first and the last step."""
    table = table.assign(row=table["row"] + 1, column=table["column"] + 1)
    names = ["exact's mass", *(name for name in table["operator"].unique() if name != "exact")]
    columns = min(len(names), _MAPS_PER_ROW)
    rows = math.ceil(len(names) / columns)
    size = (1.75 * columns + 1.2, 2.0 * rows * len(steps) + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{title}: cosine with the exact block of each pair of layers")
    parts = figure.subfigures(len(steps), 1, squeeze=False)[:, 0]
    for part, step in zip(parts, steps, strict=True):
        part.suptitle(_after(step))
        axes = list(part.subplots(rows, columns, squeeze=False).flat)
        here = table[table["step"] == step]
        for axis, name in zip(axes, names, strict=False):
            own = here if name == names[0] else here[here["operator"] == name]
            what, colours = ("mass", "Greys") if name == names[0] else ("cosine", "PuOr")
            image = _map(axis, own.pivot_table(what, "row", "column", "median"), name, colours)
        for axis in axes[len(names) :]:
            axis.set_axis_off()
        part.colorbar(image, ax=axes, label="cosine", shrink=0.8)
    return figure


def _pairs(table: pd.DataFrame, order: list[str], damping: float, title: str) -> Figure:
    """Draw the cosines of matrices and of steps of every two operators, at the last step."""
    step = table["step"].max()
    rows = table[(table["step"] == step) & (table["damping"] == damping)]
    both = pd.concat([rows, rows.rename(columns={"first": "second", "second": "first"})])
    size = (3 + 0.9 * len(order), 2 + 0.45 * len(order))
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{title}: cosines of every two operators, {_after(step)}")
    axes = figure.subplots(1, 2, sharey=True)
    titles = {"cosine": "matrices", "step_cosine": f"steps, λ = {damping:g}"}
    for axis, (name, heading) in zip(axes, titles.items(), strict=True):
        values = both.pivot_table(name, "first", "second", "median", dropna=False)
        values = values.reindex(index=order, columns=order)
        values = values.mask(np.eye(len(order), dtype=bool) & values.notna().any().to_numpy(), 1.0)
        image = _map(axis, values, heading)
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.8)
    return figure
