"""The rows of a comparison as CSV, as Markdown and on the terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.comparing.job import Comparison
from experiments.folder import write_atomically

COLUMNS = [
    *("training", "step", "operator", "damping", "loss", "rmse"),
    *("cosine", "cosine_se", "error", "error_se"),
    *("block_cosine", "block_cosine_se", "block_error", "block_error_se"),
    *("decrease", "step_length", "step_cosine", "condition", "condition_is_bound"),
    *("cg_iterations", "cg_converged", "continued_loss", "build_seconds", "invert_seconds", "note"),
]
# What predicts the further training, and whether more of it is better.
MEASURES = {
    **{"cosine": 1, "error": -1, "block_cosine": 1, "block_error": -1},
    **{"decrease": 1, "step_cosine": 1, "condition": -1, "cg_iterations": -1},
}
PRINTED = [n for n in ("operator", *MEASURES, "continued_loss") if n != "block_error"]
_FEWEST = 4  # fewer operators have no ranking worth the name

_LEGEND = """# Curvature operators: {title}

P is the operator, G the exact Gauss-Newton matrix; medians over {trainings}. ± is a standard
error of random probes, ≥ a lower bound, > says that conjugate gradients did not converge.

- cosine, error: ⟨P, G⟩ / (‖P‖ ‖G‖) and ‖P − G‖ / ‖G‖; block: of the layers' diagonal blocks.
- decrease: decrease of the damped exact quadratic model along the step of (P + λI)⁻¹, with the best
  step length, over that of the exact step; step_length, step_cosine: against the exact step.
- condition: of (P + λI)⁻¹(G + λI); inf for a singular inverse, empty if the inverse is no matrix.
- cg_iterations: for the exact step to {tolerance:g}, preconditioned by (P + λI)⁻¹.
- continued_loss: after {continued} further steps with it; inf if they failed.
- build_seconds, invert_seconds: to build P, to invert and compute one step; noisy, and less where a
  factorization is reused.
"""
_RANKS = """
## What predicts the further training

Spearman's rank correlation, over the operators, of each measure (the better the larger) with
−continued_loss; medians over the trainings, by step.
"""


class Tables:
    """The rows of all points so far.

    Attributes:
        rows: For each file: the table, pairs of operators, eigenvalues, pairs of layers.
        failures: What could not be measured, and why.
    """

    def __init__(self) -> None:
        names = ("table", "pairs", "spectra", "layers")
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.failures: list[str] = []

    def __getitem__(self, name: str) -> pd.DataFrame:
        return pd.DataFrame(self.rows[name])

    def save(self, folder: Path, job: Comparison, title: str) -> None:
        """Write all of them as CSV, and medians as Markdown."""
        table = self["table"]
        found = predictors(table)
        for name in (*self.rows, "predictors"):
            content = found if name == "predictors" else self[name]
            if len(content):
                buffer = io.StringIO()
                content.to_csv(buffer, index=False)
                write_atomically(folder / f"{name}.csv", buffer.getvalue().encode())
        text = _LEGEND.format(
            title=title,
            trainings=", ".join(table["training"].unique()),
            tolerance=job.cg_tolerance,
            continued=job.continued_steps,
        )
        text += _markdown(shown(table))
        if len(found):
            ranks = found.pivot_table("correlation", ["measure", "damping"], "step", "median")
            text += _RANKS + _markdown(ranks.round(2).reset_index().astype(str))
        write_atomically(folder / "table.md", text.encode())


def predictors(table: pd.DataFrame) -> pd.DataFrame:
    """Return how well each measure ranks the operators as the further training does."""
    found = []
    keys = ["training", "step", "damping"]
    for point, rows in table.groupby(keys, sort=False):
        for measure, sign in MEASURES.items():
            both = rows[[measure, "continued_loss"]].astype(float)
            both = both[both[measure].abs() < float("inf")].dropna().rank()
            if len(both) >= _FEWEST and (both.nunique() > 1).all():
                correlation = -sign * both.corr().iloc[0, 1]
                about = {"measure": measure, "correlation": correlation, "operators": len(both)}
                found.append({**dict(zip(keys, point, strict=True)), **about})
    return pd.DataFrame(found)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return medians over the trainings, as text."""
    keys = ["step", "damping", "operator"]
    numbers = dict.fromkeys(COLUMNS[3:-1], float)
    medians = table.astype(numbers).groupby(keys, sort=False)[COLUMNS[4:-1]].median().reset_index()
    medians = medians.sort_values(["step", "damping"], ascending=[True, False], kind="stable")
    text = medians[keys].astype(str)
    signs = {"condition": ("condition_is_bound", 1, "≥"), "cg_iterations": ("cg_converged", 0, ">")}
    for name in medians.columns.drop(keys):
        if not name.endswith(("_se", "_is_bound", "_converged")):
            style = "{:.3g}" if name in (*MEASURES, "step_length") else "{:.1e}"
            cells = pd.Series([style.format(x) if x == x else "" for x in medians[name]])
            if name in signs:
                column, value, sign = signs[name]
                cells = cells.mask(medians[column].eq(value) & cells.ne(""), sign + cells)
            if f"{name}_se" in medians:
                cells += [f" ± {se:.0e}" if se > 0 else "" for se in medians[f"{name}_se"]]
            if (cells != "").any():
                text[name] = cells.to_numpy()
    return text


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
