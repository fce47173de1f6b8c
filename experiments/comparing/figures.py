"""The pictures of a comparison, each composed of a few panels."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from experiments.comparing.measure import DampedResult, OperatorResult
from experiments.comparing.operators import EXACT
from experiments.comparing.panels import (
    curves_along_training,
    curves_over_damping,
    draw_curves,
    draw_map,
    draw_spectra,
    names,
    styles,
    use_logarithms,
)
from experiments.training.files import write_atomically

if TYPE_CHECKING:  # older matplotlibs that this runs with have no such name
    from matplotlib.typing import RcKeyType

_STYLE: dict[RcKeyType, Any] = {
    **{"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 9},
    **{"lines.linewidth": 1.4, "legend.frameon": False, "figure.titlesize": 10},
}
_DPI = 110
_MAPS_PER_ROW = 6
_LEAST_ERROR = 1e-2


def draw(
    results: Sequence[OperatorResult], dampings: Sequence[float], title: str, folder: Path
) -> list[Path]:
    """Draw all pictures.

    Args:
        results: All results.
        dampings: λ, descending.
        title: What is compared.
        folder: Where to.

    Returns:
        Where the pictures are.
    """
    pictures: dict[str, Callable[..., Figure]] = {
        "spectra": _spectra,
        "layers": _layers,
        "training": _training,
        "damping": _damping,
        "overview": _overview,
    }
    if any(damped.step_cosines for result in results for damped in result.damped):
        pictures["pairs"] = _pairs
    if any(math.isfinite(d.continued_loss) for result in results for d in result.damped):
        pictures["prediction"] = _prediction
    paths = []
    with mpl.rc_context(_STYLE):
        for name, compose in pictures.items():
            paths.append(folder / f"{name}.png")
            write_atomically(paths[-1], _png(compose(results, dampings, title)))
    return paths


def _png(figure: Figure) -> bytes:
    """Return a picture in a palette of its own colours, a third of the size."""
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(_DPI)
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba())
    buffer = io.BytesIO()
    image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
        buffer, format="png", optimize=True
    )
    return buffer.getvalue()


def _spectra(results: Sequence[OperatorResult], dampings: Sequence[float], title: str) -> Figure:
    """Sorted eigenvalues, one panel for the first step and one for the last."""
    steps = _ends(results)
    figure = Figure(figsize=(4.6 * len(steps) + 1.6, 4.2), layout="constrained")
    axes = figure.subplots(1, len(steps), sharey=True, squeeze=False)[0]
    for axis, step in zip(axes, steps, strict=True):
        draw_spectra(axis, _at(results, step), dampings, styles(results))
        axis.set_title(_after(step))
        axis.label_outer()
    figure.suptitle(f"{title}: eigenvalues; dotted lines: λ")
    _legend(figure, axes[0])
    return figure


def _layers(results: Sequence[OperatorResult], dampings: Sequence[float], title: str) -> Figure:
    """Maps over pairs of layers, for the first and the last step."""
    steps = _ends(results)
    compared = names([r for r in results if r.operator != EXACT and r.matrices is not None])
    per_step = 1 + len(compared)
    columns = min(per_step, _MAPS_PER_ROW)
    rows = math.ceil(per_step / columns)
    figure = Figure(figsize=(1.75 * columns + 1.2, 2.0 * rows * len(steps) + 0.6))
    figure.set_layout_engine("constrained")
    figure.suptitle(f"{title}: cosine with the exact block of each pair of layers")
    parts = figure.subfigures(len(steps), 1, squeeze=False)[:, 0]
    for part, step in zip(parts, steps, strict=True):
        part.suptitle(_after(step))
        axes = part.subplots(rows, columns, squeeze=False)
        here, image = _at(results, step), None
        values = _median([result.mass for result in here])
        draw_map(axes.flat[0], values, "Greys", 0, values.max().item())
        axes.flat[0].set_title("mass of exact")
        for axis, name in zip(axes.flat[1:], compared, strict=False):
            maps = [r.matrices.layer_cosines for r in here if r.operator == name and r.matrices]
            axis.set_title(name)
            if maps:
                image = draw_map(axis, _median(maps), "PuOr", -1, 1)
        for axis in axes.flat[per_step:]:
            axis.set_axis_off()
        if image is not None:
            part.colorbar(image, ax=list(axes.flat), label="cosine", shrink=0.8)
    return figure


def _training(results: Sequence[OperatorResult], dampings: Sequence[float], title: str) -> Figure:
    """Similarity and quality of the step along training, for the middle damping."""
    looks = styles(results)
    damping = _middle(dampings)
    figure = Figure(figsize=(10, 6), layout="constrained")
    cosine, error, decrease, condition = figure.subplots(2, 2, sharex=True).flat
    _cosine_along_training(cosine, results)
    draw_curves(error, curves_along_training(_approximate(results), _error), looks)
    error.set(title=f"relative error of the matrix, at least {_LEAST_ERROR:g}")
    draw_curves(
        decrease, curves_along_training(results, _inverse("decrease_fraction", damping)), looks
    )
    decrease.set(title=f"share of the exact model's decrease, λ = {damping:g}", ylim=(-0.03, 1.03))
    draw_curves(
        condition, curves_along_training(results, _inverse("condition_number", damping)), looks
    )
    condition.set(title=f"condition number of (P+λI)⁻¹(G+λI), λ = {damping:g}")
    use_logarithms(error, "y")
    use_logarithms(condition, "y")
    for axis in (cosine, error, decrease, condition):
        _steps(axis, results)
    for axis in (cosine, error):
        axis.set_xlabel("")
    figure.suptitle(f"{title}: along training")
    _legend(figure, decrease)
    return figure


def _damping(results: Sequence[OperatorResult], dampings: Sequence[float], title: str) -> Figure:
    """Quality of the step over the damping, at the last step."""
    looks = styles(results)
    last = _at(results, _ends(results)[-1])
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = list(figure.subplots(2, 2, sharex=True).flat)
    panels = {
        "decrease_fraction": "share of the exact model's decrease",
        "step_cosine": "cosine with the exact step",
        "condition_number": "condition number of (P+λI)⁻¹(G+λI)",
        "cg_iterations": "iterations of preconditioned CG",
    }
    for axis, (field, heading) in zip(axes, panels.items(), strict=True):
        draw_curves(axis, curves_over_damping(last, attrgetter(field)), looks)
        axis.set(xscale="log", title=heading)
    axes[0].set_ylim(-0.03, 1.03)
    for axis in axes[2:]:
        axis.set_xlabel("damping λ")
        use_logarithms(axis, "y")
    figure.suptitle(f"{title}: {_after(_ends(results)[-1])}")
    _legend(figure, axes[0])
    return figure


def _pairs(results: Sequence[OperatorResult], dampings: Sequence[float], title: str) -> Figure:
    """Cosines of the matrices and of the steps of every two approximations, at the last step."""
    last = _at(results, _ends(results)[-1])
    order, damping = names(results), _middle(dampings)
    figure = Figure(figsize=(1.6 + 0.9 * len(order), 1.4 + 0.45 * len(order)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    cosines = {
        "matrices": lambda result: result.cosines,
        f"steps, λ = {damping:g}": lambda result: _damped(result, damping).step_cosines,
    }
    for axis, (heading, of) in zip(axes, cosines.items(), strict=True):
        values = _median([_pair_map(rows, order, of) for rows in _by_training(last)])
        image = draw_map(axis, values, "PuOr", -1, 1)
        axis.set_xticks(range(len(order)), order, rotation=90)
        axis.set_yticks(range(len(order)), order)
        axis.set_title(heading)
    figure.colorbar(image, ax=list(axes), label="cosine", shrink=0.8)
    figure.suptitle(f"{title}: {_after(_ends(results)[-1])}")
    return figure


def _pair_map(
    results: Sequence[OperatorResult],
    order: Sequence[str],
    cosines: Callable[[OperatorResult], Mapping[str, float]],
) -> Tensor:
    """Return a symmetric matrix of cosines, NaN where there is none."""
    values = torch.full((len(order), len(order)), math.nan)
    for result in results:
        j = order.index(result.operator)
        for other, cosine in cosines(result).items():
            i = order.index(other)
            values[i, j] = values[j, i] = cosine
    known = ~values.isnan().all(0)
    values.diagonal()[known] = 1.0
    return values


def _prediction(results: Sequence[OperatorResult], dampings: Sequence[float], title: str) -> Figure:
    """What further training makes of the loss, over four measures, for the middle damping."""
    looks = styles(results)
    damping = _middle(dampings)
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = list(figure.subplots(2, 2, sharey=True).flat)
    measures: dict[str, Callable[[OperatorResult], float]] = {
        "share of the exact model's decrease": _inverse("decrease_fraction", damping),
        "cosine with the exact step": _inverse("step_cosine", damping),
        "condition number of (P+λI)⁻¹(G+λI)": _inverse("condition_number", damping),
        "relative error of the matrix": _error,
    }
    for axis, (heading, measure) in zip(axes, measures.items(), strict=True):
        for name in names(results):
            own = [result for result in results if result.operator == name]
            after = [_damped(result, damping).continued_loss / result.loss for result in own]
            look = {**looks[name], "linestyle": "none", "marker": looks[name]["marker"] or "*"}
            axis.plot([measure(result) for result in own], after, label=name, **look)
        axis.set_title(heading)
        use_logarithms(axis, "y")
    for axis in axes[2:]:
        use_logarithms(axis, "x")
    for axis in (axes[0], axes[2]):
        axis.set_ylabel("loss after further steps / before")
    figure.suptitle(f"{title}, λ = {damping:g}, all points")
    _legend(figure, axes[0])
    return figure


def _overview(results: Sequence[OperatorResult], dampings: Sequence[float], title: str) -> Figure:
    """The spectra, the cosine along training, and the decrease over the damping."""
    looks = styles(results)
    step = _ends(results)[-1]
    last = _at(results, step)
    figure = Figure(figsize=(11.5, 3.5), layout="constrained")
    spectra, cosine, decrease = figure.subplots(1, 3)
    draw_spectra(spectra, last, dampings, styles(results))
    spectra.set_title(f"eigenvalues {_after(step)}; dotted: λ")
    _cosine_along_training(cosine, results)
    _steps(cosine, results)
    draw_curves(decrease, curves_over_damping(last, lambda i: i.decrease_fraction), looks)
    decrease.set(xscale="log", xlabel="damping λ", ylim=(-0.03, 1.03))
    decrease.set_title(f"share of the exact decrease {_after(step)}")
    figure.suptitle(title)
    _legend(figure, spectra)
    return figure


def _cosine_along_training(axis: Axes, results: Sequence[OperatorResult]) -> None:
    looks = styles(results)
    draw_curves(axis, curves_along_training(_approximate(results), _cosine), looks)
    axis.set(title="cosine with the exact matrix", ylim=(-0.03, 1.03))


def _approximate(results: Sequence[OperatorResult]) -> list[OperatorResult]:
    """Leave out the exact matrix, which equals itself."""
    return [result for result in results if result.operator != EXACT] or list(results)


def _cosine(result: OperatorResult) -> float:
    return math.nan if result.matrices is None else result.matrices.whole.cosine


def _error(result: OperatorResult) -> float:
    """Return the error, or what is small enough to leave room for the others."""
    if result.matrices is None:
        return math.nan
    return max(result.matrices.whole.error, _LEAST_ERROR)


def _inverse(field: str, damping: float) -> Callable[[OperatorResult], float]:
    def value(result: OperatorResult) -> float:
        return float(getattr(_damped(result, damping).inverse, field))

    return value


def _damped(result: OperatorResult, damping: float) -> DampedResult:
    return next(damped for damped in result.damped if damped.damping == damping)


def _by_training(results: Sequence[OperatorResult]) -> list[list[OperatorResult]]:
    trainings = dict.fromkeys(result.trajectory for result in results)
    return [[result for result in results if result.trajectory == name] for name in trainings]


def _at(results: Sequence[OperatorResult], step: int) -> list[OperatorResult]:
    return [result for result in results if result.step == step]


def _ends(results: Sequence[OperatorResult]) -> list[int]:
    """Return the first and the last step."""
    steps = {result.step for result in results}
    return sorted({min(steps), max(steps)})


def _after(step: int) -> str:
    return "at initialization" if step == 0 else f"after {step} steps"


def _middle(dampings: Sequence[float]) -> float:
    return dampings[len(dampings) // 2]


def _median(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).nanmedian(0).values


def _steps(axis: Axes, results: Sequence[OperatorResult]) -> None:
    """Put the steps on an axis that has room for the early ones."""
    steps = sorted({result.step for result in results})
    positive = [step for step in steps if step > 0]
    if positive:
        axis.set_xscale("symlog", linthresh=positive[0])
    if len(steps) <= 8:
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
    axis.set_xlabel("training step")


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
