"""The parts of the figures: spectra, curves with their ranges, and maps over pairs of layers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage
from torch import Tensor

from experiments.comparing.matrices import Spectrum
from experiments.comparing.measure import OperatorResult
from experiments.comparing.operators import EXACT

# Okabe and Ito's colours and two more; line styles and markers tell apart what shares one.
_COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"),
    *("#8C564B", "#6A3D9A"),
)
_LINES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

# Eigenvalues that far below the largest one are rounding errors.
_ROUNDING = 1e-16

# Maps of more layers have no numbers.
_MOST_NUMBERS = 6
_FEW_LAYERS = 3
_TEXT_SIZES = (8, 6)
_VISIBLE = 0.005

# More eigenvalues than that are drawn on a logarithmic axis, as the largest ones matter.
_MANY = 1024

Curve = Mapping[float, Sequence[float]]
Looks = Mapping[str, Mapping[str, Any]]


def styles(results: Sequence[OperatorResult]) -> dict[str, dict[str, Any]]:
    """Return how each approximation is drawn: the same in all figures of a comparison."""
    looks: dict[str, dict[str, Any]] = {
        EXACT: {"color": "black", "linestyle": "-", "marker": None, "linewidth": 2.2},
        "identity": {"color": "0.55", "linestyle": ":", "marker": "x"},
    }
    for i, operator in enumerate(name for name in names(results) if name not in looks):
        looks[operator] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _LINES[(i // len(_COLOURS)) % len(_LINES)],
            "marker": _MARKERS[i % len(_MARKERS)],
        }
    return looks


@dataclass(frozen=True)
class Range:
    """Median and extremes over the trainings at several positions."""

    positions: list[float]
    medians: list[float]
    lowest: list[float]
    highest: list[float]

    @classmethod
    def of(cls, curve: Curve) -> Range:
        """Return the range of the finite values at each position."""
        finite = {x: [v for v in values if math.isfinite(v)] for x, values in curve.items()}
        kept = sorted((x, values) for x, values in finite.items() if values)
        return cls(
            [x for x, _ in kept],
            [statistics.median(values) for _, values in kept],
            [min(values) for _, values in kept],
            [max(values) for _, values in kept],
        )


def names(results: Sequence[OperatorResult]) -> list[str]:
    """Return the approximations, in the order of the results."""
    return list(dict.fromkeys(result.operator for result in results))


def draw_curves(axis: Axes, curves: Mapping[str, Curve], looks: Looks) -> None:
    """Draw the median of every approximation, and its range where there is one."""
    for operator, curve in curves.items():
        line = Range.of(curve)
        axis.plot(line.positions, line.medians, markersize=4.5, label=operator, **looks[operator])
        if line.lowest != line.highest:
            colour = looks[operator]["color"]
            axis.fill_between(line.positions, line.lowest, line.highest, color=colour, alpha=0.15)


def use_logarithms(axis: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, if there is anything on it."""
    smallest = axis.dataLim.minposx if which == "x" else axis.dataLim.minposy
    if math.isfinite(smallest):
        axis.set(**{f"{which}scale": "log"})


def curves_along_training(
    results: Sequence[OperatorResult], value: Callable[[OperatorResult], float]
) -> Mapping[str, Curve]:
    """Collect a number of every approximation by step."""
    curves: dict[str, dict[float, list[float]]] = {name: {} for name in names(results)}
    for result in results:
        curves[result.operator].setdefault(result.step, []).append(value(result))
    return curves


def curves_over_damping(
    results: Sequence[OperatorResult], value: Callable[[Any], float]
) -> Mapping[str, Curve]:
    """Collect a number of every approximation by damping."""
    curves: dict[str, dict[float, list[float]]] = {name: {} for name in names(results)}
    for result in results:
        for damped in result.damped:
            curves[result.operator].setdefault(damped.damping, []).append(value(damped.inverse))
    return curves


def draw_spectra(
    axis: Axes, results: Sequence[OperatorResult], dampings: Sequence[float], looks: Looks
) -> None:
    """Draw sorted eigenvalues at one step, the medians over trainings, and the dampings."""
    top = max(_largest(result) for result in results)
    for name in names(results):
        spectra = [r.matrices.spectrum for r in results if r.operator == name and r.matrices]
        if not spectra:
            continue
        ranks, values = spectra[0].ranks, _at_ranks_of_first(spectra)
        line = values.median(0).values.clamp(min=0)
        # as many markers on every curve, evenly spaced on the axis
        every = max(1, len(line) // 8)
        axis.plot(ranks, line, markersize=4, markevery=every, label=name, **looks[name])
        if len(spectra) > 1:
            low, high = values.min(0).values.clamp(min=0), values.max(0).values.clamp(min=0)
            axis.fill_between(ranks, low, high, color=looks[name]["color"], alpha=0.12)
    bottom = _ROUNDING * top
    for damping in dampings:
        if damping > bottom:
            axis.axhline(damping, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
    if top > 0:
        axis.set_yscale("log")
        axis.set_ylim(bottom, 10 * top)
    axis.set(xlabel="rank", ylabel="eigenvalue")
    if axis.dataLim.x1 > _MANY:
        axis.set_xscale("log")


def _largest(result: OperatorResult) -> float:
    if result.matrices is None:
        return 0.0
    return float(result.matrices.spectrum.values.max())


def _at_ranks_of_first(spectra: Sequence[Spectrum]) -> Tensor:
    """Stack spectra, between the ranks of estimates interpolated on the logarithmic axis."""
    ranks = spectra[0].ranks.cpu()
    tiny = torch.finfo(torch.float64).tiny
    logs = [np.interp(ranks, s.ranks.cpu(), s.values.cpu().clamp(min=tiny).log()) for s in spectra]
    return torch.tensor(np.stack(logs)).exp()


def draw_map(axis: Axes, values: Tensor, colours: str, low: float, high: float) -> AxesImage:
    """Draw a number per pair of layers."""
    norm = Normalize(low, high)
    image = axis.imshow(values.cpu().numpy(), cmap=colours, norm=norm)
    layers = len(values)
    axis.set_xticks(range(layers), [str(i + 1) for i in range(layers)])
    axis.set_yticks(range(layers), [str(i + 1) for i in range(layers)])
    axis.grid(False)
    if layers <= _MOST_NUMBERS:
        for i in range(layers):
            for j in range(layers):
                number = values[i, j].item()
                shade = image.cmap(norm(number))
                dark = 0.3 * shade[0] + 0.6 * shade[1] + 0.1 * shade[2] < 0.5
                colour = "white" if dark else "black"
                text = f"{number:.2f}" if abs(number) >= _VISIBLE else ""
                size = _TEXT_SIZES[layers > _FEW_LAYERS]
                axis.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    return image
