"""What the store says, in tables of numbers: a row of the paper, all rows, an ablation.

An error is the median over the seeds, with the smallest and the largest. Trainings that took no
step or were interrupted do not count; what became of them is in the column ``outcome``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.ablations import ABLATIONS, DEFAULT
from experiments.presets import PRESETS, ROWS
from experiments.reporting.published import at_steps, ends, interpolated
from experiments.reporting.typeset import Column, amount, count, text
from experiments.results import PAPERS_NAMES
from experiments.store import Store
from experiments.training import FINISHED, INTERRUPTED

NAMES = {
    **{label: name for name, label in PAPERS_NAMES.items()},
    "hessian_free": "Hessian-free",
    "lbfgs": "L-BFGS",
    "engd_w": "ENGD-W",
    "spring": "SPRING",
    "ekfac": "EKFAC",
    "gauss_newton_cg": "Gauss-Newton-CG",
    "levenberg_marquardt": "Levenberg-Marquardt",
    "subspace_gauss_newton": "subspace",
    "auto": "automatic",
}
FIRST_ORDER = ("sgd", "adam", "lbfgs")

NOT_TRAINED = "not trained"

_LEAST = 30.0  # seconds of a training that is one

_OURS = (
    Column("rmse", "RMSE", group="ours"),
    Column("rmse_min", "min", group="ours"),
    Column("rmse_max", "max", group="ours"),
)
_EFFORT = (
    Column("steps", "steps", count, "ours"),
    Column("seconds", "s", count, "ours"),
    Column("ms_per_step", "ms/step", amount, "ours"),
    Column("memory_mb", "MB", count, "ours"),
)
_ENDED = Column("short_outcome", "ended", text)

ROW = (
    Column("name", "optimizer", text),
    *_OURS,
    Column("relative_error", "relative", group="ours"),
    *_EFFORT,
    Column("published_rmse", "RMSE", group="published"),
    Column("published_steps", "steps", count, "published"),
    Column("published_seconds", "s", count, "published"),
    Column("equal_steps", "steps", count, "at equal steps"),
    Column("rmse_at_equal", "ours", group="at equal steps"),
    Column("published_at_equal", "published", group="at equal steps"),
    _ENDED,
)
SUMMARY = (
    Column("title", "row", text),
    Column("budget", "time", text),
    Column("best_name", "optimizer", text, "best, ours"),
    Column("best_rmse", "RMSE", group="best, ours"),
    Column("kfac_star", "ours", group="KFAC*"),
    Column("kfac_star_published", "published", group="KFAC*"),
    Column("first_order_name", "method", text, "best first-order, ours"),
    Column("first_order", "RMSE", group="best first-order, ours"),
    Column("published_name", "optimizer", text, "best, published"),
    Column("published_rmse", "RMSE", group="best, published"),
)
ABLATION = (
    Column("variant", "variant", text),
    *_OURS,
    Column("steps", "steps", count, "ours"),
    Column("ms_per_step", "ms/step", amount, "ours"),
    Column("equal_steps", "steps", count, "at equal steps"),
    Column("rmse_at_equal", "variant", group="at equal steps"),
    Column("default_at_equal", "default", group="at equal steps"),
    _ENDED,
)


def split_title(row: str) -> tuple[str, str]:
    """Return problem and number of parameters of a row of the paper."""
    problem, _, parameters = row.removesuffix("_bayes").rpartition("_")
    return problem, f"{int(parameters):,}"


def title_of(row: str) -> str:
    """Return the words for a row of the paper."""
    return ", ".join(split_title(row))


def time_budgets(store: Store, study: str) -> list[str]:
    """Return the times that a study was trained for, the most frequent one first.

    A few seconds say what a step takes, see ``cost_table``, not what a method reaches.
    """
    budgets = store.trainings.loc[store.trainings["study"] == study, "budget"].value_counts().index
    return [budget for budget in budgets if budget.endswith(" s") and not _is_short(budget)]


def _is_short(budget: str) -> bool:
    """Whether a budget is one of a few seconds."""
    number, _, unit = budget.partition(" ")
    return unit == "s" and float(number) < _LEAST


def medians(trainings: pd.DataFrame) -> dict[str, Any]:
    """Return what trainings that differ by their seeds alone reached, and at what cost."""
    whole = trainings[(trainings["step"] > 0) & (trainings["outcome"] != INTERRUPTED)]
    errors = whole["rmse"].fillna(np.inf)  # of a training that diverged
    outcomes = trainings.groupby("outcome")["seed"].agg(list).drop(FINISHED, errors="ignore")
    words = [f"{what} (seed {', '.join(map(str, seeds))})" for what, seeds in outcomes.items()]
    return {
        "seeds": len(whole),
        "rmse": errors.median(),
        "rmse_min": errors.min(),
        "rmse_max": errors.max(),
        "relative_error": whole["relative_error"].fillna(np.inf).median(),
        **{key: whole[key].median() for key in ("seconds", "ms_per_step")},
        "steps": whole["step"].median(),
        "fewest_steps": whole["step"].min(),
        "memory_mb": whole["memory_mb"].max(),
        "outcome": "; ".join(words) or (FINISHED if len(whole) else NOT_TRAINED),
        "short_outcome": " ".join(map(_short, outcomes.index)) or ("" if len(whole) else "not run"),
    }


def _short(outcome: str) -> str:
    """Return one word for how a training ended."""
    if "MemoryError" in outcome:
        return "memory"
    return "cut" if outcome == INTERRUPTED else "error"


def made_with(store: Store, study: str, budget: str) -> str:
    """Return what the trainings of a study were made with, in words."""
    rows = store.trainings
    return what_made(rows[(rows["study"] == study) & (rows["budget"] == budget)])


def what_made(rows: pd.DataFrame) -> str:
    """Return what trainings were made with, in words."""
    words = []
    for column, form in (
        ("device", "{}"),
        ("threads", "threads: {}"),
        ("dtype", "{}"),
        ("torch", "torch {}"),
        ("seed", "seeds {}"),
        ("commit", "commit {}"),
    ):
        if column in rows and rows[column].notna().any():
            values = sorted(rows[column].dropna().unique())
            shown = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
            words.append(form.format(", ".join(shown)))
    return "; ".join(words)


def chosen(table: pd.DataFrame, study: str, optimizer: str, budget: str) -> pd.DataFrame:
    """Return the rows of one optimizer of one study."""
    key = {"study": study, "optimizer": optimizer, "budget": budget}
    return table[np.logical_and.reduce([table[name] == value for name, value in key.items()])]


def error_at(store: Store, study: str, optimizer: str, budget: str, step: float) -> float:
    """Return the median error over the seeds at a number of steps."""
    curves = chosen(store.curves, study, optimizer, budget)
    errors = [interpolated(curve, step) for _, curve in curves.groupby("seed")]
    return float(np.median(errors)) if errors else np.nan


def row_table(store: Store, row: str, budget: str) -> pd.DataFrame:
    """Return all optimizers of a row of the paper, beside what was published.

    ``equal_steps`` is the largest number of steps that every seed of ours and the published run
    took, ``rmse_at_equal`` our median error there. See ``with_published_at_equal`` for the other.
    """
    published = ends(row)
    lines = []
    for label in (name for name in NAMES if name in PRESETS[row].labels):
        line: dict[str, Any] = {"row": row, "budget": budget}
        line |= {"optimizer": label, "name": NAMES[label]}
        line |= medians(chosen(store.trainings, row, label, budget))
        line |= {f"published_{key}": np.nan for key in ("rmse", "steps", "seconds")}
        line |= {"hardware": None, "source": None}
        if label in published.index:
            end = published.loc[label]
            line |= {f"published_{key}": end[key] for key in ("rmse", "steps", "seconds")}
            line |= {key: end[key] for key in ("hardware", "source")}
        line["equal_steps"] = np.minimum(line["fewest_steps"], line["published_steps"])
        line["rmse_at_equal"] = error_at(store, row, label, budget, line["equal_steps"])
        lines.append(line)
    return pd.DataFrame(lines)


def with_published_at_equal(tables: Sequence[pd.DataFrame], folder: Path) -> list[pd.DataFrame]:
    """Return tables of rows with the published errors at equal steps.

    Args:
        tables: Tables of ``row_table``.
        folder: The store, which keeps these errors.
    """
    if not tables:
        return []
    every = pd.concat(tables)[["row", "optimizer", "equal_steps"]].dropna()
    wanted = every.rename(columns={"equal_steps": "steps"}).drop_duplicates()
    known = at_steps(wanted, folder).rename(
        columns={"steps": "equal_steps", "rmse": "published_at_equal"}
    )
    return [table.merge(known, "left", on=["row", "optimizer", "equal_steps"]) for table in tables]


def other_tables(store: Store) -> list[pd.DataFrame]:
    """Return what was trained for other budgets than that of ``row_table``: steps, longer times."""
    tables = []
    for row in ROWS:
        budgets = store.trainings.loc[store.trainings["study"] == row, "budget"].unique()
        long = {budget for budget in budgets if not _is_short(budget)}
        for budget in sorted(long - set(time_budgets(store, row)[:1])):
            table = row_table(store, row, budget)
            tables.append(table[table["outcome"] != NOT_TRAINED])
    return tables


def short_trainings(store: Store) -> pd.DataFrame:
    """Return the trainings of a few seconds, of rows that have no others."""
    rows = [row for row in ROWS if not time_budgets(store, row)]
    short = store.trainings["budget"].map(_is_short).astype(bool)
    return store.trainings[short & store.trainings["study"].isin(rows)]


def cost_table(short: pd.DataFrame, key: str) -> tuple[pd.DataFrame, list[Column]]:
    """Return what a step takes, by optimizer and row; in place of a number why there is none.

    Args:
        short: See ``short_trainings``.
        key: ms_per_step or memory_mb.

    Returns:
        A line for each optimizer, and its columns.
    """
    table = pd.DataFrame({"optimizer": list(NAMES), "name": list(NAMES.values())})
    columns = [Column("name", "optimizer", text)]
    for row, of_row in ((row, short[short["study"] == row]) for row in ROWS):
        if len(of_row):
            reached = [medians(of_row[of_row["optimizer"] == label]) for label in NAMES]
            table[row] = [amount(line[key]) or line["short_outcome"] for line in reached]
            problem, parameters = split_title(row)
            columns.append(Column(row, parameters, text, problem))
    return table, columns


def summary_table(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return a line for each row of the paper."""
    lines = []
    for table in tables:
        row, ran = table["row"].iloc[0], table.dropna(subset="rmse").set_index("optimizer")
        published = ends(row)
        line: dict[str, Any] = {"row": row, "title": title_of(row)}
        line["budget"] = table["budget"].iloc[0]
        line |= _smallest("best", ran["rmse"], "best_rmse")
        line["kfac_star"] = ran["rmse"].get("kfac_star", np.nan)
        line["kfac_star_published"] = published["rmse"].get("kfac_star", np.nan)
        first = ran.loc[[name for name in FIRST_ORDER if name in ran.index], "rmse"]
        line |= _smallest("first_order", first, "first_order")
        line |= _smallest("published", published["rmse"], "published_rmse")
        lines.append(line)
    return pd.DataFrame(lines)


def _smallest(kind: str, errors: pd.Series, key: str) -> dict[str, Any]:
    label = errors.idxmin() if len(errors) else None
    return {
        f"{kind}_optimizer": label,
        f"{kind}_name": NAMES.get(str(label)),
        key: errors.min() if len(errors) else np.nan,
    }


def ablation_study(store: Store, name: str) -> str | None:
    """Return the study with an ablation: its own one, or the one of all; None if there is none."""
    studies = set(store.trainings["study"])
    if (own := f"ablation_{name}") in studies:
        return own
    trained = store.trainings.loc[store.trainings["study"] == "ablations", "optimizer"]
    return "ablations" if set(ABLATIONS[name].variants) & set(trained) else None


def ablation_tables(store: Store) -> Iterator[pd.DataFrame]:
    """Yield a table of each ablation that was trained: the default, and the variants.

    ``equal_steps`` is the largest number of steps that every seed of variant and default took, the
    errors ``rmse_at_equal`` and ``default_at_equal`` are those of both there.
    """
    for name, ablation in ABLATIONS.items():
        if (study := ablation_study(store, name)) is None or not time_budgets(store, study):
            continue
        budget = time_budgets(store, study)[0]
        default = medians(chosen(store.trainings, study, DEFAULT, budget))
        lines = []
        for label in (DEFAULT, *ablation.variants):
            line: dict[str, Any] = {
                "ablation": name,
                "question": ablation.question,
                "budget": budget,
            }
            changes = ablation.variants.get(label, {})
            line |= {"variant": label.replace("_", " "), "optimizer": label, "study": study}
            line["changes"] = ", ".join(f"{key}={value}" for key, value in changes.items())
            line |= medians(chosen(store.trainings, study, label, budget))
            equal = np.minimum(line["fewest_steps"], default["fewest_steps"])
            line["equal_steps"] = equal
            line["rmse_at_equal"] = error_at(store, study, label, budget, equal)
            line["default_at_equal"] = error_at(store, study, DEFAULT, budget, equal)
            lines.append(line)
        yield pd.DataFrame(lines)
