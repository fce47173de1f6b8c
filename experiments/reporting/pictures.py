"""The figures of the report: errors of the store against time and steps, with published ones."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments import figures
from experiments.reporting.published import curves as published_curves
from experiments.reporting.tables import FIRST_ORDER, NAMES
from experiments.store import Store

# What a figure of a row shows; of the last two kinds, the one that reached the smallest error.
_SHOWN = ("kfac_star", "kfac", "auto", "spring", "hessian_free")
_KINDS = {
    "better of ENGD (full) and ENGD-W": ("engd", "engd_w"),
    "best of SGD, Adam, L-BFGS": FIRST_ORDER,
}

_WIDTH = 9.5  # inches

# Of a page of panels, which is printed as large as it is drawn.
_PRINTED = 6.9
_COLUMNS = 3
_MOST_BYTES = 300_000
_MEDIAN = re.compile(r" \(median of \d+\)$")


@dataclass(frozen=True)
class Panel:
    """Curves that belong together.

    Args:
        title: What they are of.
        table: Columns run, optimizer, seed, step, seconds and rmse.
        order: The names of optimizers in the order of their styles.
        published: The same columns without run and seed, if there are published curves.
    """

    title: str
    table: pd.DataFrame
    order: Sequence[str]
    published: pd.DataFrame | None = None


def shown_names(table: pd.DataFrame, kinds: bool = False) -> dict[str, str]:
    """Return the optimizers of a row that are shown, and how they are called.

    Args:
        table: What they reached, see ``tables.row_table``.
        kinds: Whether the best of a kind is called by its kind, as over several rows.
    """
    errors = table.dropna(subset="rmse").set_index("optimizer")["rmse"]
    names = {label: NAMES[label] for label in _SHOWN}
    for kind, labels in _KINDS.items():
        if len(ran := errors.reindex(labels).dropna()):
            best = str(ran.idxmin())
            names[best] = kind if kinds else NAMES[best]
    return names


def panel(
    title: str,
    store: Store,
    study: str,
    budget: str,
    names: Mapping[str, str],
    published: pd.DataFrame | None = None,
) -> Panel:
    """Return the curves of some optimizers of a study.

    Args:
        title: The title.
        store: The store.
        study: The study.
        budget: The budget.
        names: What is shown for each label.
        published: Published curves by label, of which those that are shown are drawn along.
    """
    table = store.curves
    table = table[(table["study"] == study) & (table["budget"] == budget)]
    parts = [table[table["optimizer"] == label].assign(optimizer=names[label]) for label in names]
    shown = pd.concat(parts).rename(columns={"study": "run"})
    if published is not None:
        published = published.assign(optimizer=published["optimizer"].map(names))
        published = published.dropna(subset="optimizer")
    return Panel(title, shown, list(names.values()), published)


def row_panel(title: str, store: Store, table: pd.DataFrame, names: Mapping[str, str]) -> Panel:
    """Return the curves of some optimizers of a row, and KFAC*'s published one if present.

    Args:
        title: The title.
        store: The store.
        table: The row, see ``tables.row_table``.
        names: The optimizers, and how they are called.
    """
    row, budget = table["row"].iloc[0], table["budget"].iloc[0]
    published = published_curves(row)
    if published is not None:
        published = published[published["optimizer"] == "kfac_star"]
    return panel(title, store, row, budget, names, published)


def draw_panel(path: Path, shown: Panel) -> None:
    """Draw errors against time and steps, in a picture of their own."""
    with mpl.rc_context(figures.STYLE):
        figure = Figure(figsize=(_WIDTH, 4.2), layout="constrained")
        figures.draw_curves(figure, shown.table, shown.published, shown.order)
        _limit(figure.axes[0], shown)
        figure.suptitle(shown.title)
        figures.save_small(figure, path)


def _limit(axis: Axes, shown: Panel) -> None:
    """Leave out errors far above those of the start, which one seed may have on its way."""
    start = shown.table.loc[shown.table["step"] == 0, "rmse"].median()
    if axis.get_ylim()[1] > (top := 10 * start):
        axis.set_ylim(top=top)


def draw_page(path: Path, panels: Sequence[Panel], one_legend: bool = False) -> None:
    """Draw errors against time, a panel for each, as a page of the report.

    Args:
        path: Where to.
        panels: The panels.
        one_legend: Whether a style means the same in all panels.
    """
    lines = -(-len(panels) // _COLUMNS)
    with mpl.rc_context({**figures.STYLE, "font.size": 7, "lines.markersize": 3}):
        figure = Figure(figsize=(_PRINTED, 1.75 * lines + 0.6), layout="constrained")
        axes = figure.subplots(lines, _COLUMNS, squeeze=False).ravel()
        handles: dict[str, Any] = {}
        for axis, shown in zip(axes, panels, strict=False):
            figures.draw_optimizers(axis, shown.table, "seconds", "rmse", shown.order)
            if shown.published is not None:
                figures.draw_published(axis, shown.published, "seconds", shown.order)
            _limit(axis, shown)
            axis.set_title(shown.title, fontsize=8)
            axis.yaxis.set_minor_formatter(NullFormatter())
            own = {_MEDIAN.sub("", h.get_label()): h for h in axis.get_legend_handles_labels()[0]}
            if not one_legend:
                axis.legend(own.values(), own, fontsize=6, framealpha=0.6, handlelength=2)
            handles |= {name: h for name, h in own.items() if name not in handles}
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        if one_legend:
            figure.legend(handles.values(), list(handles), loc="outside upper center", ncols=4)
        figure.supxlabel("time of the optimizer's steps [s]")
        figure.supylabel("RMSE of u on fresh points")
        figures.save_small(figure, path, _MOST_BYTES)
