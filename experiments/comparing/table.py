"""The table of a comparison: one row per training, step, operator and damping."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from experiments.comparing.matrices import MatrixComparison
from experiments.comparing.measure import OperatorResult
from experiments.comparing.predictors import Prediction, medians, predictions
from experiments.comparing.settings import Settings
from experiments.training.files import write_atomically

TABLE, MARKDOWN, SPECTRA, LAYERS = "table.csv", "table.md", "spectra.csv", "layers.csv"
PAIRS, PREDICTORS = "pairs.csv", "predictors.csv"

Cell = str | int | float
Rows = list[dict[str, Cell]]

# What each column says, for the head of the Markdown table.
COLUMNS = {
    "training": "the seed, or the run folder",
    "step": "steps of training before",
    "operator": "the approximation P",
    "damping": "λ",
    "loss": "L",
    "rmse": "root mean square of u − u* on fresh points",
    "cosine": "⟨P, G⟩ / (‖P‖ ‖G‖) with the exact Gauss-Newton matrix G",
    "cosine_se": "its standard error, 0 where exact",
    "error": "‖P − G‖ / ‖G‖",
    "error_se": "its standard error, 0 where exact",
    "block_cosine": "the same cosine with the per-layer diagonal blocks of both",
    "block_cosine_se": "its standard error, 0 where exact",
    "block_error": "the same error with the per-layer diagonal blocks of both",
    "block_error_se": "its standard error, 0 where exact",
    "decrease": "decrease of the damped exact quadratic model along the step of (P + λI)⁻¹, with "
    "the best step length, over that of the exact step",
    "step_length": "length of that step over that of the exact one",
    "step_cosine": "cosine between the two steps",
    "condition": "condition number of (P + λI)⁻¹(G + λI); inf if the inverse is singular, empty if "
    "it is no matrix",
    "condition_is_bound": "whether that is a lower bound, from Lanczos",
    "cg_iterations": "of conjugate gradients for the exact step, preconditioned by (P + λI)⁻¹",
    "cg_converged": "whether they reached the tolerance",
    "continued_loss": "L after --continued-steps further steps with (P + λI)⁻¹ and everything else "
    "the same; empty if there are none, inf if they failed",
    "build_seconds": "to build P; noisy, the median of a few",
    "invert_seconds": "to invert and to compute one step; noisy, the median of a few; empty where "
    "a factorization of another damping was reused",
    "note": "what went wrong",
}
# The columns on the terminal, and their headings.
_PRINTED = {
    "cosine": "cosine",
    "error": "error",
    "block_cosine": "blocks",
    "decrease": "decrease",
    "step_cosine": "step",
    "condition": "condition",
    "cg_iterations": "CG",
}

# Numbers around one have three digits behind the point, smaller ones an exponent.
_SMALL = 1e-2

_SHOWN = (
    *("training", "step", "operator", "damping", "loss", "rmse", "cosine", "error"),
    *("block_cosine", "block_error", "decrease", "step_length", "step_cosine"),
    *("condition", "cg_iterations"),
    *("continued_loss", "build_seconds", "invert_seconds", "note"),
)


def rows_of(results: Sequence[OperatorResult]) -> Rows:
    """Return the rows of the table.

    Args:
        results: The results so far.
    """
    return [row for result in results for row in _rows(result)]


def _rows(result: OperatorResult) -> Iterator[dict[str, Cell]]:
    for damped in result.damped:
        inverse = damped.inverse
        cells: tuple[Cell, ...] = (
            *(result.trajectory, result.step, result.operator, damped.damping),
            *(result.loss, result.rmse, *_similarities(result.matrices)),
            *(inverse.decrease_fraction, inverse.step_length, inverse.step_cosine),
            *(inverse.condition_number, inverse.condition_is_bound),
            *(inverse.cg_iterations, inverse.cg_converged, damped.continued_loss),
            *(result.build_seconds, damped.seconds, damped.note),
        )
        yield dict(zip(COLUMNS, cells, strict=True))


def _similarities(matrices: MatrixComparison | None) -> tuple[float, ...]:
    if matrices is None:
        return (math.nan,) * 8
    return tuple(
        number
        for part in (matrices.whole, matrices.blocks)
        for number in (part.cosine, part.cosine_se, part.error, part.error_se)
    )


def save(results: Sequence[OperatorResult], settings: Settings, title: str, folder: Path) -> None:
    """Write the tables of all results so far.

    Args:
        results: The results so far.
        settings: The resolved settings.
        title: What is compared.
        folder: The run folder.
    """
    rows = rows_of(results)
    _write_csv(folder / TABLE, rows)
    _write_csv(folder / SPECTRA, _spectra(results))
    _write_csv(folder / LAYERS, _layers(results))
    _write_csv(folder / PAIRS, _pairs(results))
    found = list(predictions(results))
    if found:
        _write_csv(folder / PREDICTORS, [vars(prediction) for prediction in found])
    text = "\n".join([*_markdown(rows, settings, title), *_predictors(found, settings)])
    write_atomically(folder / MARKDOWN, text.encode())


def _write_csv(path: Path, rows: Rows) -> None:
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(
        {name: "" if cell != cell else cell for name, cell in row.items()} for row in rows
    )
    write_atomically(path, buffer.getvalue().encode())


def _spectra(results: Sequence[OperatorResult]) -> Rows:
    return [
        {
            "training": result.trajectory,
            "step": result.step,
            "operator": result.operator,
            "rank": rank,
            "eigenvalue": value,
        }
        for result in results
        if result.matrices is not None
        for rank, value in zip(
            result.matrices.spectrum.ranks.tolist(),
            result.matrices.spectrum.values.tolist(),
            strict=True,
        )
    ]


def _layers(results: Sequence[OperatorResult]) -> Rows:
    return [
        {
            "training": result.trajectory,
            "step": result.step,
            "operator": result.operator,
            "row": i,
            "column": j,
            "cosine": result.matrices.layer_cosines[i, j].item(),
            "mass": result.mass[i, j].item(),
        }
        for result in results
        if result.matrices is not None
        for i in range(len(result.mass))
        for j in range(len(result.mass))
    ]


def _pairs(results: Sequence[OperatorResult]) -> Rows:
    """Return the cosines of the steps and of the matrices of every two approximations."""
    return [
        {
            "training": result.trajectory,
            "step": result.step,
            "damping": damped.damping,
            "first": other,
            "second": result.operator,
            "step_cosine": step_cosine,
            "cosine": result.cosines.get(other, math.nan),
        }
        for result in results
        for damped in result.damped
        for other, step_cosine in damped.step_cosines.items()
    ]


def _predictors(found: Sequence[Prediction], settings: Settings) -> Iterator[str]:
    """Yield the lines that say which measure predicts the further training."""
    if not found:
        return
    steps = sorted({prediction.step for prediction in found})
    yield "## What predicts the further training\n"
    yield (
        "Spearman's rank correlation, over the approximations, of each measure (its sign such that "
        f"more is better) with -L after {settings.continued_steps} further steps; medians over the "
        "trainings.\n"
    )
    yield "| measure | damping | " + " | ".join(f"step {step}" for step in steps) + " |"
    yield "|---" * (2 + len(steps)) + "|"
    for damping, measure, by_step in medians(found):
        cells = [f"{by_step[step]:.2f}" if step in by_step else "" for step in steps]
        yield f"| {measure} | {damping:.0e} | " + " | ".join(cells) + " |"
    yield ""


def _markdown(rows: Rows, settings: Settings, title: str) -> Iterator[str]:
    yield f"# Curvature approximations: {title}\n"
    rare = {name for name in ("note", "continued_loss") if not any(_known(r[name]) for r in rows)}
    shown = [name for name in _SHOWN if name not in rare]
    for name in shown:
        yield f"- `{name}`: {COLUMNS[name]}."
    yield (
        f"\nConjugate gradients stop at a relative residual of {settings.cg_tolerance:g} or after "
        f"{settings.cg_limit} iterations (`>`). `±` is a standard error of random probes, `≥` a "
        "lower bound.\n"
    )
    yield "| " + " | ".join(shown) + " |"
    yield "|" + "---|" * len(shown)
    for row in rows:
        yield "| " + " | ".join(format_cell(row, name) for name in shown) + " |"
    yield ""


def _known(cell: Cell) -> bool:
    """Whether a cell says something: no empty text, not NaN."""
    return cell == cell and cell != ""


def format_cell(row: dict[str, Cell], name: str) -> str:
    """Return a cell as text, with its standard error or bound.

    Args:
        row: A row of the table.
        name: The column.
    """
    cell = row[name]
    if isinstance(cell, str):
        return cell.replace("|", "\\|")
    if cell != cell:
        return ""
    if name == "cg_iterations":
        return f"{cell:.0f}" if row["cg_converged"] else f">{cell:.0f}"
    if name == "condition":
        return f"{'≥' if row['condition_is_bound'] else ''}{cell:.1e}"
    if name in ("loss", "rmse", "damping", "continued_loss", "build_seconds", "invert_seconds"):
        return f"{cell:.1e}"
    if isinstance(cell, int):
        return str(cell)
    text = f"{cell:.3f}" if abs(cell) >= _SMALL or cell == 0 else f"{cell:.0e}"
    se = row.get(f"{name}_se", 0.0)
    return f"{text} ± {se:.0e}" if se else text


def show(results: Sequence[OperatorResult], damping: float, console: Console) -> None:
    """Print medians over the trainings, at the last step and one damping.

    Args:
        results: All results.
        damping: λ.
        console: Where to print.
    """
    rows = [row for row in rows_of(results) if row["damping"] == damping]
    step = max(int(row["step"]) for row in rows)
    last = [row for row in rows if row["step"] == step]
    title = f"after {step} steps, λ = {damping:g}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("operator", no_wrap=True)
    for heading in _PRINTED.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for operator in dict.fromkeys(str(row["operator"]) for row in last):
        own = [row for row in last if row["operator"] == operator]
        table.add_row(operator, *(_printed(own, name) for name in _PRINTED))
    console.print(table)
    console.print(
        "Compared with the exact Gauss-Newton matrix: cosine and relative error of the matrix, "
        "cosine of its diagonal blocks; share of the exact model's decrease, cosine of the step; "
        "condition number and iterations of CG with the inverse as preconditioner.",
        highlight=False,
    )


def _printed(rows: Rows, name: str) -> str:
    """Return the lower median of a column, with its bound but without its standard error."""
    known = [row for row in rows if row[name] == row[name]] or rows
    middle = statistics.median_low([float(row[name]) for row in known])
    row = next((row for row in known if row[name] == middle), known[0])
    return format_cell({**row, f"{name}_se": 0.0}, name)
