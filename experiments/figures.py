"""Pictures: error against time and steps over seeds; in two dimensions, solution and errors."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import NullFormatter
from PIL import Image
from torch import nn

from experiments.folder import write_atomically
from experiments.objects import UserError
from pinncurv.problems import Interior, Problem

# Okabe and Ito's colours, which remain distinct for the colour-blind; the line styles help in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 10,
}

# A figure is drawn with ever fewer dots and colours until it fits.
MOST_BYTES = 60_000
_SIZES = ((120, 256), (110, 128), (90, 96), (70, 64), (50, 32))

_FEW = 10  # curves of fewer points show them
_RESOLUTION = 200  # points of the maps along each axis

# The colours of the errors reach from the largest error of all networks down to this part of the
# smallest network's root mean square, over two decades at least: below, errors change their sign.
_SMALLEST_SHOWN = 0.1


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomically(path, buffer.getvalue())
    return path


def save_small(figure: Figure, path: Path, most: int | None = None) -> None:
    """Write a figure with as many dots and colours as its size allows.

    Args:
        figure: The figure.
        path: Where to write it.
        most: Its largest size in bytes; ``MOST_BYTES`` by default.

    Raises:
        UserError: If even the smallest is larger.
    """
    most = most or MOST_BYTES
    for dpi, colours in _SIZES:
        buffer, small = io.BytesIO(), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi)
        Image.open(buffer).convert("RGB").quantize(colours).save(small, "png", optimize=True)
        if len(small.getvalue()) <= most:
            write_atomically(path, small.getvalue())
            return
    raise UserError(f"{path} must have at most {most} bytes, got {len(small.getvalue())}.")


def style_of(i: int) -> dict[str, Any]:
    """Return colour and line of the i-th curve."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "linestyle": LINES[i % len(LINES)],
        "linewidth": 1.8,
    }


def _style_among(i: int, name: Any, order: Sequence[str]) -> dict[str, Any]:
    """Return the style of a curve: by its place in an order that names it, else of the i-th."""
    return style_of(order.index(name) if name in order else i)


def draw_run(
    path: Path, table: pd.DataFrame, problem: Problem, models: Mapping[str, nn.Module], title: str
) -> Path:
    """Draw the picture of a run.

    Args:
        path: Where to write it.
        table: The metrics of all optimizers and seeds, see ``results.gather``.
        problem: The problem.
        models: The network of each optimizer, of the first seed.
        title: What was trained.
    """
    grid = _grid_of(problem, next(iter(models.values()))) if models else None
    with mpl.rc_context(STYLE):
        columns = len(models) + 1
        size = (9.5, 4.2) if grid is None else (max(9.5, 2.9 * columns), 7.6)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title)
        if grid is None:
            draw_curves(figure, table)
        else:
            upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.15, 1)).flat
            draw_curves(upper, table)
            _draw_maps(lower, problem, models, grid)
        return save(figure, path)


def draw_curves(
    figure: Figure | SubFigure,
    table: pd.DataFrame,
    published: pd.DataFrame | None = None,
    order: Sequence[str] = (),
) -> None:
    """Draw the error against time and steps, the median and the quartiles over the seeds.

    Args:
        figure: Where to.
        table: The metrics, with columns run, optimizer, seed, step, seconds, rmse and
            held_out_loss.
        published: Published curves, with columns optimizer, step, seconds and rmse.
        order: Names of optimizers, whose i-th has the i-th style; those of the table by default.
    """
    by_time, by_step = figure.subplots(1, 2, sharey=True)
    known = bool(table["rmse"].notna().any())
    quantity = "rmse" if known else "held_out_loss"
    for axis, x in ((by_time, "seconds"), (by_step, "step")):
        draw_optimizers(axis, table, x, quantity, order)
        if published is not None:
            draw_published(axis, published, x, order)
    by_time.set(xlabel="time of the optimizer's steps [s]")
    by_time.set(ylabel="RMSE of u on fresh points" if known else "loss on held-out points")
    by_step.set(xlabel="steps")
    by_time.legend(loc="best", fontsize=8, framealpha=0.6)


def draw_optimizers(
    axis: Axes, table: pd.DataFrame, x: str, quantity: str, order: Sequence[str] = ()
) -> None:
    """Draw one column of the metrics against another, a curve or bundle for each optimizer."""
    for i, (name, rows) in enumerate(table.groupby("optimizer", sort=False)):
        # the start, at no time and no steps, has no place on a logarithmic axis
        trainings = rows[rows["step"] > 0].groupby(["run", "seed"])
        curves = [c[[x, quantity]].dropna() for _, c in trainings]
        style = _style_among(i, name, order)
        _draw_bundle(axis, [c for c in curves if len(c)], str(name), style)
    axis.set(xscale="log", yscale="log")
    axis.xaxis.set_minor_formatter(NullFormatter())  # labels of less than a decade overlap


def draw_published(axis: Axes, published: pd.DataFrame, x: str, order: Sequence[str] = ()) -> None:
    """Draw published curves, thin and pale, in the colours of the same optimizers of ours."""
    later = published[published["step"] > 0]
    for i, (name, rows) in enumerate(later.groupby("optimizer", sort=False)):
        colour = _style_among(i, name, order)["color"]
        label = f"published: {name}"
        axis.plot(rows[x], rows["rmse"], color=colour, alpha=0.45, linewidth=1, label=label)


def _draw_bundle(
    axis: Axes, curves: Sequence[pd.DataFrame], label: str, style: Mapping[str, Any]
) -> None:
    """Draw one curve, or the median and the quartiles of several on common abscissae."""
    low = max((c.iloc[0, 0] for c in curves), default=0)
    high = min((c.iloc[-1, 0] for c in curves), default=0)
    if len(curves) < 2 or not 0 < low < high:  # one curve, or several that never meet
        for c in curves:
            x, y = (c.iloc[:, k].to_numpy() for k in (0, 1))
            axis.plot(x, y, label=label, marker="o" if len(x) < _FEW else None, **style)
            label = "_"  # which the legend leaves out
        return
    x = np.geomspace(low, high, 200)
    logs = [
        np.interp(np.log(x), np.log(c.iloc[:, 0]), np.log(np.maximum(c.iloc[:, 1], 1e-300)))
        for c in curves
    ]
    lower, median, upper = np.exp(np.quantile(np.stack(logs), (0.25, 0.5, 0.75), axis=0))
    axis.plot(x, median, label=f"{label} (median of {len(curves)})", **style)
    axis.fill_between(x, lower, upper, color=style["color"], alpha=0.2, linewidth=0)


# --- maps -----------------------------------------------------------------------------------------


def _grid_of(problem: Problem, model: nn.Module) -> tuple[tuple[float, ...], torch.Tensor] | None:
    """Return extent and points of a grid on a rectangle; None without one or a solution."""
    sampler = problem.evaluation
    if problem.solution is None or not (isinstance(sampler, Interior) and sampler.dim == 2):
        return None
    return grid_of(sampler.box.lower, sampler.box.upper, next(model.parameters()))


def grid_of(
    lower: Sequence[float],
    upper: Sequence[float],
    like: torch.Tensor,
    axes: tuple[int, int] = (0, 1),
) -> tuple[tuple[float, ...], torch.Tensor]:
    """Return extent and points of a grid over two coordinates of a box.

    Args:
        lower: The lower bounds of the box.
        upper: Its upper bounds.
        like: A tensor of the type and on the device that the points shall be of.
        axes: The two coordinates; the others are at the middle of their range.
    """
    low, high = (torch.tensor(bound, dtype=torch.float64) for bound in (lower, upper))
    plane = [torch.linspace(low[i], high[i], _RESOLUTION, dtype=low.dtype) for i in axes]
    points = (low + high).div(2).repeat(_RESOLUTION**2, 1)
    points[:, list(axes)] = torch.cartesian_prod(*plane)
    extent = [float(bound[i]) for i in axes for bound in (low, high)]
    return tuple(extent), points.to(like)


@torch.no_grad()
def _draw_maps(
    figure: SubFigure, problem: Problem, models: Mapping[str, nn.Module], grid: Any
) -> None:
    """Draw the solution, and the absolute error of each network."""
    extent, points = grid
    assert problem.solution is not None
    axes = figure.subplots(1, len(models) + 1, squeeze=False)[0]
    solution = problem.solution(points)[:, :1]
    images = [model(points)[:, :1].sub(solution).abs() for model in models.values()]
    image = draw_image(axes[0], extent, solution, "viridis", None)
    figure.colorbar(image, ax=axes[0], location="bottom", label="solution u*")
    norm = common_scale(images)
    for axis, name, error in zip(axes[1:], models, images, strict=True):
        image = draw_image(axis, extent, error, "magma", norm)
        axis.set_title(name)
    figure.colorbar(image, ax=list(axes[1:]), location="bottom", aspect=60, label="error |u − u*|")
    first, second = (
        (*problem.coordinates, "$x_1$", "$x_2$")[:2] if problem.coordinates else ("$x_1$", "$x_2$")
    )
    for axis in axes:
        axis.set_xlabel(first)
    axes[0].set_ylabel(second)


def common_scale(errors: Sequence[torch.Tensor]) -> LogNorm:
    """Return one logarithmic scale for the errors of all networks, so that colours compare."""
    finite = [error[error.isfinite()] for error in errors]
    shown = [(error, float(error.max())) for error in finite if error.any()]
    # divided by the largest one, as the squares of a diverged network's errors overflow
    sizes = [float((error / top).square().mean().sqrt()) * top for error, top in shown]
    largest = max((top for _, top in shown), default=1.0)
    smallest = min(_SMALLEST_SHOWN * min(sizes, default=1.0), largest / 100)
    return LogNorm(smallest, largest, clip=True)


def draw_image(
    axis: Axes, extent: Any, values: torch.Tensor, colours: str, norm: LogNorm | None
) -> Any:
    """Draw the values at the points of ``grid_of``; what is NaN stays white."""
    axis.grid(False)
    axis.set_box_aspect(1)
    image = values.reshape(_RESOLUTION, _RESOLUTION).T.cpu().numpy()
    return axis.imshow(
        image,
        origin="lower",
        extent=extent,
        aspect="auto",
        cmap=colours,
        norm=norm,
        interpolation="nearest",
    )
