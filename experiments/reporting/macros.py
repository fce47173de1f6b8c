r"""The numbers in the text of the report: macros of LaTeX that are made from the tables.

``\val{rmse/poisson2d_9873/kfac_star}`` in ``report.tex`` is what ``numbers.tex`` has under this
key, and a bold n/a, with a warning, where the store has no such number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from experiments.presets import ROWS
from experiments.reporting.published import ends
from experiments.reporting.quotes import QUOTES
from experiments.reporting.tables import NAMES, made_with
from experiments.reporting.typeset import amount, count, in_formula, latex
from experiments.store import Store

_HEAD = r"""% Made by experiments/report.py; do not edit.
\makeatletter
\newcommand{\val}[1]{\ifcsname val@#1\endcsname\csname val@#1\endcsname\else
  \GenericWarning{}{No number #1}\textbf{n/a}\fi}
\makeatother
"""
_LINE = r"\expandafter\def\csname val@{}\endcsname{{{}}}"

# Of every optimizer of a row: the key, and the column.
_ERRORS = {
    "rmse": "rmse",
    "relative": "relative_error",
    "equal": "rmse_at_equal",
    "published-equal": "published_at_equal",
}
_COUNTS = {"steps": "steps", "equal-steps": "equal_steps"}


def numbers(
    store: Store,
    tables: Sequence[pd.DataFrame],
    others: Sequence[pd.DataFrame],
    ablations: Sequence[pd.DataFrame],
) -> dict[str, str]:
    """Return all numbers, as LaTeX, by their keys.

    Args:
        store: The store.
        tables: The rows of the paper, see ``tables.row_table``.
        others: The same for other budgets.
        ablations: The ablations.
    """
    found = _tallies(store, tables, others)
    for row in ROWS:
        for label, end in ends(row).iterrows():
            found[f"published/{row}/{label}"] = f"${in_formula(end['rmse'])}$"
            if pd.notna(end["steps"]):
                found[f"published-steps/{row}/{label}"] = count(end["steps"])
    for table in tables:
        for _, line in table.iterrows():
            place = f"{line['row']}/{line['optimizer']}"
            for key, name in _ERRORS.items():
                if pd.notna(line[name]):
                    found[f"{key}/{place}"] = f"${in_formula(line[name])}$"
            for key, name in _COUNTS.items():
                if pd.notna(line[name]):
                    found[f"{key}/{place}"] = count(line[name])
            if pd.notna(line["ms_per_step"]):
                found[f"ms/{place}"] = amount(line["ms_per_step"])
    for _, line in _as_published(others).iterrows():
        found[f"final/{line['row']}/{line['optimizer']}"] = f"${in_formula(line['rmse'])}$"
    made = {made_with(store, *table[["study", "budget"]].iloc[0]): None for table in ablations}
    if made:
        found["made/ablations"] = latex("; and ".join(made))
    for table in ablations:
        for _, line in table.dropna(subset="rmse").iterrows():
            found[f"ablation/{line['optimizer']}"] = f"${in_formula(line['rmse'])}$"
            if pd.notna(factor := line["rmse_at_equal"] / line["default_at_equal"]):
                found[f"ablation-factor/{line['optimizer']}"] = f"${in_formula(factor)}$"
    for quote in QUOTES:
        shown = quote.table().data
        for line, row in shown.iterrows():
            for column in shown.columns[1:]:
                if row[column]:
                    key = f"{quote.name}/{_plain(str(line))}/{_plain(column)}"
                    found[key] = latex(row[column])
    return found


def _plain(words: str) -> str:
    """Return words without what may not be in the name of a macro."""
    return re.sub(r"[^\w ,.*-]", "", words)


def as_macros(found: dict[str, str]) -> str:
    """Return ``numbers.tex``."""
    return _HEAD + "\n".join(_LINE.format(key, value) for key, value in found.items()) + "\n"


def used(source: Path) -> set[str]:
    """Return the keys of the numbers in the text of the report."""
    return set(re.findall(r"\\val\{([^}]*)\}", source.read_text()))


def _tallies(
    store: Store, tables: Sequence[pd.DataFrame], others: Sequence[pd.DataFrame]
) -> dict[str, str]:
    """Return what is counted over all rows."""
    whole = {"rows": len(ROWS), "optimizers": len(NAMES), "trainings": len(store.trainings)}
    whole["rows-trained"] = len(tables)
    full = [(table["seeds"] >= 3) | (table["short_outcome"] == "memory") for table in tables]
    whole["rows-full"] = sum(bool(line.all()) for line in full)
    found = {f"tally/{key}": str(value) for key, value in whole.items()}
    for key, column in (("commits", "commit"), ("devices", "device"), ("torch", "torch")):
        if column in store.trainings:
            values = sorted(store.trainings[column].dropna().astype(str).unique())
            found[f"tally/{key}"] = latex(", ".join(values))
    if len(steps := _as_published(others)):
        found |= _compared("steps", steps, "rmse", "published_rmse")
    if not tables:
        return found
    every = pd.concat(tables, ignore_index=True)
    found |= _compared("equal", every, "rmse_at_equal", "published_at_equal")
    kfac = every[every["optimizer"] == "kfac_star"]
    found |= _compared("equal-kfac-star", kfac, "rmse_at_equal", "published_at_equal")
    errors = every.pivot_table(index="row", columns="optimizer", values="rmse")
    winners = errors.idxmin(axis=1).map(NAMES).value_counts()
    found["tally/winners"] = latex(", ".join(f"{name} ({k})" for name, k in winners.items()))
    first = errors[[name for name in ("adam", "sgd", "lbfgs") if name in errors]].min(axis=1)
    for key, worse, better in (
        ("first-order-over-kfac-star", first, errors.get("kfac_star")),
        ("kfac-star-over-auto", errors.get("kfac_star"), errors.get("auto")),
    ):
        if worse is None or better is None or not len(ratio := (worse / better).dropna()):
            continue
        found[f"tally/{key}-least"] = f"${in_formula(ratio.min())}$"
        found[f"tally/{key}-most"] = f"${in_formula(ratio.max())}$"
    return found


def _as_published(others: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return what was trained for the published number of steps."""
    if not others:
        return pd.DataFrame()
    every = pd.concat(others, ignore_index=True).dropna(subset=["rmse", "published_steps"])
    return every[every["budget"] == every["published_steps"].map("{:.0f} steps".format)]


def _compared(kind: str, table: pd.DataFrame, ours: str, published: str) -> dict[str, str]:
    """Return in how many pairs ours is at most the published error, of how many, and the ratio."""
    pairs = table.dropna(subset=[ours, published])
    ratio = pairs[ours] / pairs[published]
    found = {f"tally/{kind}-compared": str(len(pairs))}
    found[f"tally/{kind}-met"] = str((ratio <= 1).sum())
    if len(pairs):
        found[f"tally/{kind}-median"] = f"${in_formula(ratio.median())}$"
        found[f"tally/{kind}-worst"] = f"${in_formula(ratio.max())}$"
    return found
