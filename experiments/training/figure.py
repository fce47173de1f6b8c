"""The picture of a run: error against time and steps; in two dimensions, solution and errors."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from torch import Tensor, nn

from experiments.training.files import write_atomically
from experiments.training.metrics import read_metrics
from pinncurv.problems import Interior, Problem

if TYPE_CHECKING:  # older matplotlibs that this runs with have no such name
    from matplotlib.typing import RcKeyType

FIGURE = "figure.png"

# Okabe and Ito's colours, which remain distinct for the colour-blind; the line styles help in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", "--", "-.", ":")

# Curves of fewer points show them.
_FEW = 10
_STYLE: dict[RcKeyType, Any] = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.titlesize": 10,
}

# Points of the maps along each axis.
_RESOLUTION = 200

# The colours of the errors reach from the largest error of all networks down to this part of the
# smallest network's root mean square: below it, errors change their sign.
_SMALLEST_SHOWN = 0.1


@dataclass(frozen=True)
class Grid:
    """A grid on a rectangle.

    Args:
        extent: Left, right, bottom, top.
        points: The points, [n², 2], the second coordinate running fastest.
    """

    extent: tuple[float, float, float, float]
    points: Tensor

    def image(self, values: Tensor) -> Tensor:
        """Return values at the points, [n², 1], as an image [n, n]."""
        n = _RESOLUTION
        return values.reshape(n, n).T.cpu()


def grid_of(problem: Problem, dtype: torch.dtype, device: torch.device) -> Grid | None:
    """Return a grid on a problem's domain; None if it is no rectangle or u* is not known."""
    sampler = problem.evaluation
    if problem.solution is None or not (isinstance(sampler, Interior) and sampler.dim == 2):
        return None
    (left, bottom), (right, top) = sampler.box.lower, sampler.box.upper
    axes = [
        torch.linspace(low, high, _RESOLUTION, dtype=dtype)
        for low, high in ((left, right), (bottom, top))
    ]
    return Grid((left, right, bottom, top), torch.cartesian_prod(*axes).to(device))


def draw(
    folder: Path,
    problem: Problem,
    models: Mapping[str, nn.Module],
    coordinates: Sequence[str],
    title: str,
) -> Path:
    """Draw the picture of a run.

    Args:
        folder: The run folder; the optimizers' metrics are read from it.
        problem: The problem.
        models: The network of each optimizer.
        coordinates: Names of the first two coordinates.
        title: What was trained.

    Returns:
        Where the picture is.
    """
    parameter = next(next(iter(models.values())).parameters())
    grid = grid_of(problem, parameter.dtype, parameter.device)
    with mpl.rc_context(_STYLE):
        columns = len(models) + 1
        width = 9.5 if grid is None else max(9.5, 2.9 * columns)
        figure = Figure(figsize=(width, 4.2 if grid is None else 7.6), layout="constrained")
        figure.suptitle(title)
        if grid is None:
            _draw_curves(figure, folder, tuple(models))
        else:
            upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.15, 1)).flat
            _draw_curves(upper, folder, tuple(models))
            _draw_maps(lower, problem, models, grid, coordinates)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    write_atomically(folder / FIGURE, buffer.getvalue())
    return folder / FIGURE


def _draw_curves(figure: Figure | SubFigure, folder: Path, names: Sequence[str]) -> None:
    """Draw the error, or the loss where there is no solution, against time and against steps."""
    by_time, by_step = figure.subplots(1, 2, sharey=True)
    metrics = {name: read_metrics(folder / name) for name in names}
    known = any(math.isfinite(rmse) for table in metrics.values() for rmse in table["rmse"])
    for i, (name, table) in enumerate(metrics.items()):
        style = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _LINES[i % len(_LINES)],
            "linewidth": 1.8,
            "marker": "o" if len(table["step"]) < _FEW else None,
            "label": name,
        }
        # The start, at no time and no steps, has no place on a logarithmic axis.
        values = table["rmse" if known else "loss"][1:]
        by_time.loglog(table["seconds"][1:], values, **style)
        by_step.loglog(table["step"][1:], values, **style)
    by_time.set(xlabel="time of the optimizer's steps [s]")
    by_time.set(ylabel="RMSE of u on fresh points" if known else "loss")
    by_step.set(xlabel="steps")
    by_time.legend(loc="lower left")


def _draw_maps(
    figure: SubFigure,
    problem: Problem,
    models: Mapping[str, nn.Module],
    grid: Grid,
    coordinates: Sequence[str],
) -> None:
    """Draw the solution, and the absolute error of each network."""
    assert problem.solution is not None
    axes = figure.subplots(1, len(models) + 1, squeeze=False)[0]
    solution = problem.solution(grid.points)
    image = _draw_image(axes[0], grid, solution, "viridis", None)
    figure.colorbar(image, ax=axes[0], location="bottom", label="solution u*")
    with torch.no_grad():
        errors = {name: (model(grid.points) - solution).abs() for name, model in models.items()}
    norm = _common_scale(list(errors.values()))
    for axis, (name, error) in zip(axes[1:], errors.items(), strict=True):
        image = _draw_image(axis, grid, error, "magma", norm)
        axis.set_title(name)
    figure.colorbar(image, ax=list(axes[1:]), location="bottom", aspect=60, label="error |u − u*|")
    for axis in axes:
        axis.set_xlabel(coordinates[0])
    axes[0].set_ylabel(coordinates[1])


def _common_scale(errors: Sequence[Tensor]) -> LogNorm:
    """Return one logarithmic scale for the errors of all networks, so that colours compare."""
    finite = [error[error.isfinite()] for error in errors]
    shown = [(error, float(error.max())) for error in finite if error.any()]
    # divided by the largest one, as the squares of a diverged network's errors overflow
    sizes = [float((error / top).square().mean().sqrt()) * top for error, top in shown]
    largest = max((top for _, top in shown), default=1.0)
    return LogNorm(_SMALLEST_SHOWN * min(sizes, default=1.0), largest, clip=True)


def _draw_image(
    axis: Axes, grid: Grid, values: Tensor, colours: str, norm: LogNorm | None
) -> AxesImage:
    """Draw values at the points of the grid."""
    axis.grid(False)
    axis.set_box_aspect(1)
    return axis.imshow(
        grid.image(values).numpy(),
        origin="lower",
        extent=grid.extent,
        aspect="auto",
        cmap=colours,
        norm=norm,
        interpolation="nearest",
    )
