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
    **{"decrease": 1, "step_cosine": 1, "condition": -1, "cg_iterations": -1},
    **{"cosine": 1, "error": -1, "block_cosine": 1, "block_error": -1},
}
# Fewer operators than that have no ranking worth the name.
_FEWEST = 4

_LEGEND = """
P is the operator, G the exact Gauss-Newton matrix; medians over {trainings}. `±` is a standard error
of random probes, `≥` a lower bound, `>` that conjugate gradients did not converge.

- `cosine`, `error`: ⟨P, G⟩ / (‖P‖ ‖G‖) and ‖P − G‖ / ‖G‖; `block_`: of the layers' diagonal blocks.
- `decrease`: decrease of the damped exact quadratic model along the step of (P + λI)⁻¹, with the
  best step length, over that of the exact step; `step_length`, `step_cosine`: against the exact one.
- `condition`: of (P + λI)⁻¹(G + λI); inf for a singular inverse, empty if the inverse is no matrix.
- `cg_iterations`: for the exact step to {tolerance:g}, preconditioned by (P + λI)⁻¹.
- `continued_loss`: after {continued} further steps with it; inf if they failed.
- `build_seconds`, `invert_seconds`: to build P, to invert and compute one step; noisy, and less
  where a factorization is reused.
"""


class Tables:
    """The rows of all points so far.

    Attributes:
        rows: For each file: the table, pairs of operators, eigenvalues, pairs of layers.
        failures: What could not be measured, and why.
    """

    def __init__(self) -> None:
        self.rows: dict[str, list[dict[str, Any]]] = {
            name: [] for name in ("table", "pairs", "spectra", "layers")
        }
        self.failures: list[str] = []

    def __getitem__(self, name: str) -> pd.DataFrame:
        return pd.DataFrame(self.rows[name])

    def save(self, folder: Path, job: Comparison, title: str) -> None:
        """Write all of them as CSV, and medians as Markdown."""
        found = predictors(self["table"])
        for name, table in [*((name, self[name]) for name in self.rows), ("predictors", found)]:
            if len(table):
                buffer = io.StringIO()
                table.to_csv(buffer, index=False)
                write_atomically(folder / f"{name}.csv", buffer.getvalue().encode())
        table = self["table"]
        legend = _LEGEND.format(
            trainings=", ".join(table["training"].unique()),
            tolerance=job.cg_tolerance,
            continued=job.continued_steps,
        )
        text = f"# Curvature operators: {title}\n{legend}\n{_markdown(shown(table))}\n"
        if len(found):
            ranks = found.pivot_table("correlation", ["measure", "damping"], "step", "median")
            text += (
                "\n## What predicts the further training\n\nSpearman's rank correlation, over the "
                "operators, of each measure (the better the larger) with −continued_loss; medians "
                f"by step.\n\n{_markdown(ranks.reset_index().round(2).astype(str))}\n"
            )
        write_atomically(folder / "table.md", text.encode())


def predictors(table: pd.DataFrame) -> pd.DataFrame:
    """Return how well each measure ranks the operators as the further training does."""
    found = []
    for point, rows in table.groupby(["training", "step", "damping"], sort=False):
        for measure, sign in MEASURES.items():
            both = rows[[measure, "continued_loss"]].astype(float)
            both = both[both[measure].abs() < float("inf")].dropna().rank()
            if len(both) >= _FEWEST and (both.nunique() > 1).all():
                correlation = -sign * both.corr().iloc[0, 1]
                names = ("training", "step", "damping", "measure", "correlation", "operators")
                cells = (*point, measure, correlation, len(both))
                found.append(dict(zip(names, cells, strict=True)))
    return pd.DataFrame(found)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Return medians over the trainings, as text."""
    keys = ["step", "damping", "operator"]
    numbers = table.drop(columns=["training", "note"]).infer_objects()
    numbers = numbers.astype({c: float for c in numbers.columns if c not in keys})
    medians = numbers.groupby(keys, sort=False, as_index=False).median()
    medians = medians.sort_values(["step", "damping"], ascending=[True, False], kind="stable")
    text = medians.drop(columns=[c for c in medians if c.endswith(("_se", "_bound", "verged"))])
    for name in text.columns.drop("operator"):
        style = "{:.3g}" if name in (*MEASURES, "step_length", "step", "damping") else "{:.1e}"
        text[name] = [style.format(cell) if cell == cell else "" for cell in text[name]]
        if f"{name}_se" in medians:
            errors = medians[f"{name}_se"]
            text[name] += [f" ± {error:.0e}" if error > 0 else "" for error in errors]
    text["condition"] = medians["condition_is_bound"].eq(1).map({True: "≥", False: ""}) + text.pop("condition")
    text["cg_iterations"] = medians["cg_converged"].eq(0).map({True: ">", False: ""}) + text.pop("cg_iterations")
    return text.loc[:, (text != "").any()]


def _markdown(table: pd.DataFrame) -> str:
    rows = [list(map(str, table.columns)), ["---"] * table.shape[1], *table.values.tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
