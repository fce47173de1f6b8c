"""Pictures of a comparison: medians and ranges over the trainings."""

from __future__ import annotations

import math
from collections.abc import Iterable
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

_MARKERS = "os^DvPX<>"
_MAPS_PER_ROW = 6
_LEAST_ERROR = 1e-2  # what is smaller is drawn there, to leave room for the others
_ROUNDING = 1e-16  # eigenvalues that far below the largest one are
_MANY = 1024  # more eigenvalues get a logarithmic axis, as the largest ones matter

# Of every panel: its heading, and whether its axis is logarithmic.
_PANELS = {
    "cosine": ("cosine with the exact matrix", False),
    "error": (f"relative error of the matrix, at least {_LEAST_ERROR:g}", True),
    "decrease": ("share of the exact model's decrease", False),
    "step_cosine": ("cosine with the exact step", False),
    "condition": ("condition number of (P+λI)⁻¹(G+λI)", True),
    "cg_iterations": ("iterations of preconditioned CG", True),
}


def draw(folder: Path, tables: Tables, job: Comparison, title: str) -> list[Path]:
    """Draw all pictures into a folder."""
    table = tables["table"]
    table["error"] = table["error"].clip(lower=_LEAST_ERROR)
    last = table[table["step"] == table["step"].max()]
    middle = table[table["damping"] == job.middle]
    looks = _looks(table["operator"].unique())
    steps = sorted({table["step"].min(), table["step"].max()})
    with mpl.rc_context(
        {**STYLE, "font.size": 9, "legend.frameon": False, "lines.markersize": 4.5}
    ):
        figures = {
            "overview": Figure(figsize=(12, 3.6), layout="constrained"),
            "training": Figure(figsize=(10, 6), layout="constrained"),
            "damping": Figure(figsize=(10, 6), layout="constrained"),
        }
        axes = figures["overview"].subplots(1, 3)
        _spectra(axes[0], tables["spectra"], steps[-1], job.dampings, looks)
        _curves(axes[1], middle, "step", "cosine", looks)
        _curves(axes[2], last, "damping", "decrease", looks)
        for name, rows, x, measures in (
            ("training", middle, "step", ("cosine", "error", "decrease", "condition")),
            ("damping", last, "damping", ("decrease", "step_cosine", "condition", "cg_iterations")),
        ):
            for axis, measure in zip(figures[name].subplots(2, 2).flat, measures, strict=True):
                _curves(axis, rows, x, measure, looks)
        figures["spectra"] = Figure(figsize=(4.6 * len(steps) + 1.6, 4.2), layout="constrained")
        for axis, step in zip(
            figures["spectra"].subplots(1, len(steps), squeeze=False)[0], steps, strict=True
        ):
            _spectra(axis, tables["spectra"], step, job.dampings, looks)
        if table["continued_loss"].notna().any():
            figures["prediction"] = _prediction(middle, looks)
        for figure in figures.values():
            handles = dict(
                pair[::-1]
                for axis in figure.axes
                for pair in zip(*axis.get_legend_handles_labels(), strict=True)
            )
            figure.legend(handles.values(), handles.keys(), loc="outside right upper")
        figures["layers"] = _layers(tables["layers"], steps)
        if len(tables["pairs"]):
            figures["pairs"] = _pairs(tables["pairs"], list(looks), job.middle)
        notes = {
            "training": f", λ = {job.middle:g}",
            "damping": f", {_after(steps[-1])}",
            "overview": f", λ = {job.middle:g}",
        }
        for name, figure in figures.items():
            figure.suptitle(title + notes.get(name, ""))
        return [save(figure, folder / f"{name}.png") for name, figure in figures.items()]


def _looks(operators: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return how each operator is drawn, the same in all pictures."""
    looks: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(operators):
        looks[name] = {
            "color": COLOURS[i % 6],
            "linestyle": LINES[i // 6 % 4],
            "marker": _MARKERS[i % 9],
        }
    looks |= {
        n: look
        for n, look in {
            "exact": {"color": "black", "linewidth": 2.2, "marker": ""},
            "identity": {"color": "0.55", "linestyle": ":", "marker": "x"},
        }.items()
        if n in looks
    }
    return looks


def _after(step: int) -> str:
    return "at initialization" if step == 0 else f"after {step} steps"


def _curves(axis: Axes, table: pd.DataFrame, x: str, measure: str, looks: dict[str, Any]) -> None:
    """Draw the median and the range over the trainings of one column, by operator."""
    heading, logarithmic = _PANELS[measure]
    rows = table.assign(y=table[measure].astype(float)).replace([np.inf], np.nan).dropna(subset="y")
    if measure in ("cosine", "error"):  # of the exact matrix, they are known
        rows = rows[rows["operator"] != "exact"]
    for name, own in rows.groupby("operator", sort=False):
        line = own.groupby(x)["y"].agg(["median", "min", "max"])
        axis.plot(line.index, line["median"], label=name, **looks[name])
        axis.fill_between(
            line.index, line["min"], line["max"], color=looks[name]["color"], alpha=0.15
        )
    axis.set(title=heading, xlabel="damping λ" if x == "damping" else "training step")
    if logarithmic and len(rows):
        axis.set_yscale("log")
    elif not logarithmic:
        axis.set_ylim(-0.03, 1.03)
    if x == "damping":
        axis.set_xscale("log")
        return
    steps = sorted(table["step"].unique())
    if steps[-1] > 0:
        axis.set_xscale("symlog", linthresh=next(step for step in steps if step > 0))
    axis.set_xticks(steps, list(map(str, steps)))
    axis.minorticks_off()


def _spectra(
    axis: Axes, spectra: pd.DataFrame, step: int, dampings: Iterable[float], looks: dict[str, Any]
) -> None:
    """Draw sorted eigenvalues at one step, medians over the trainings, and the dampings."""
    axis.set(title=f"eigenvalues {_after(step)}; dotted: λ", xlabel="rank")
    if not len(spectra):
        return
    rows = spectra[spectra["step"] == step]
    top = rows["eigenvalue"].max()
    for name, own in rows.groupby("operator", sort=False):
        trainings = [t for _, t in own.groupby("training", sort=False)]
        ranks = trainings[0]["rank"].to_numpy()
        # estimates have other ranks in every training: interpolated on the logarithmic axis
        logs = [
            np.interp(ranks, t["rank"], np.log(t["eigenvalue"].clip(lower=1e-300)))
            for t in trainings
        ]
        low, median, high = np.exp(np.quantile(logs, (0, 0.5, 1), axis=0))
        axis.plot(ranks, median, label=name, markevery=max(1, len(ranks) // 8), **looks[name])
        axis.fill_between(ranks, low, high, color=looks[name]["color"], alpha=0.12)
    for damping in dampings:
        axis.axhline(damping, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
    axis.set(yscale="log", ylim=(_ROUNDING * top, 10 * top))
    if rows["rank"].max() > _MANY:
        axis.set_xscale("log")


def _prediction(table: pd.DataFrame, looks: dict[str, Any]) -> Figure:
    """Draw what further training makes of the loss, over four measures."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharey=True).flat
    for axis, measure in zip(axes, ("decrease", "step_cosine", "condition", "error"), strict=True):
        heading, logarithmic = _PANELS[measure]
        for name, own in table.groupby("operator", sort=False):
            look = {**looks[name], "linestyle": "none", "marker": looks[name]["marker"] or "*"}
            axis.plot(own[measure], own["continued_loss"] / own["loss"], label=name, **look)
        axis.set(title=heading, yscale="log", xscale="log" if logarithmic else "linear")
        axis.set_ylabel("loss after further steps / before")
        axis.label_outer()
    return figure


def _map(axis: Axes, values: np.ndarray, ticks: list[str], colours: str, low: float) -> Any:
    """Draw a number per pair, and write it where there is room."""
    image = axis.imshow(values, cmap=colours, vmin=low, vmax=1)
    axis.grid(False)
    axis.set_xticks(range(len(ticks)), ticks, rotation=90 if len(ticks[0]) > 2 else 0)
    axis.set_yticks(range(len(ticks)), ticks)
    for (i, j), value in np.ndenumerate(values):
        if len(ticks) <= 10 and abs(value) >= 0.005:
            colour = "white" if abs(value) > 0.7 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
    return image


def _layers(layers: pd.DataFrame, steps: list[int]) -> Figure:
    """Draw maps over the pairs of layers, at the first and the last step."""
    figure = Figure(layout="constrained")
    if not len(layers):
        return figure
    names = [name for name in layers["operator"].unique() if name != "exact"]
    columns = min(1 + len(names), _MAPS_PER_ROW)
    rows = math.ceil((1 + len(names)) / columns)
    figure.set_size_inches(1.75 * columns + 1.2, 2.0 * rows * len(steps) + 0.6)
    for part, step in zip(
        figure.subfigures(len(steps), 1, squeeze=False)[:, 0], steps, strict=True
    ):
        part.suptitle(f"cosine with the exact block of each pair of layers, {_after(step)}")
        axes, here = part.subplots(rows, columns, squeeze=False), layers[layers["step"] == step]
        for axis, name in zip(axes.flat, [None, *names], strict=False):
            own = here if name is None else here[here["operator"] == name]
            values = own.pivot_table(
                "mass" if name is None else "cosine", "row", "column", "median"
            )
            ticks = [str(i + 1) for i in range(len(values))]
            image = _map(
                axis, values.to_numpy(), ticks, *(("Greys", 0) if name is None else ("PuOr", -1))
            )
            axis.set_title(name or "mass of exact")
        for axis in axes.flat[1 + len(names) :]:
            axis.set_axis_off()
        part.colorbar(image, ax=list(axes.flat), label="cosine", shrink=0.8)
    return figure


def _pairs(pairs: pd.DataFrame, order: list[str], damping: float) -> Figure:
    """Draw the cosines of the matrices and of the steps of every two operators, at the last step."""
    rows = pairs[(pairs["step"] == pairs["step"].max()) & (pairs["damping"] == damping)]
    both = pd.concat([rows, rows.rename(columns={"first": "second", "second": "first"})])
    figure = Figure(figsize=(3 + 0.9 * len(order), 2 + 0.45 * len(order)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, heading) in zip(
        axes, (("cosine", "matrices"), ("step_cosine", f"steps, λ = {damping:g}")), strict=True
    ):
        values = both.pivot_table(name, "first", "second", "median").reindex(
            index=order, columns=order
        )
        numbers = values.to_numpy(copy=True)
        np.fill_diagonal(numbers, np.where(np.isnan(numbers).all(0), np.nan, 1.0))
        image = _map(axis, numbers, order, "PuOr", -1)
        axis.set_title(f"cosines of {heading}")
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.8)
    return figure
