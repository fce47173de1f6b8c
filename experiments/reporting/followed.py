"""Published runs that were followed from where they started: how far ours take the same steps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from experiments.presets import ROWS
from experiments.reporting.tables import NAMES, title_of
from experiments.reporting.typeset import Column, Table, text
from experiments.store import read_table

FOLLOWED = "reproduced.csv"
KEY = ["row", "optimizer", "step"]
_REACHED = ["loss", "rmse", "loss_differs", "rmse_differs"]

# Published are three digits, of runs with settings of which four digits are known.
TOLERANCE = 0.02

FIRST = 9  # steps, before rounding and what is left out of settings has grown


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return for each run how far it was followed, and up to which step it agrees.

    Args:
        table: ``KEY``, and by which share loss and error differ from the published ones, for every
            step that was compared.

    Returns:
        Columns row, optimizer, steps, agrees (the last step up to which loss and error differ by
        less than two percent, 0 if they never do), the greatest difference up to step 9, and the
        ratio of our error to the published one at the last step.
    """
    lines = []
    known = table.dropna(subset="loss_differs")  # the end of a published run has no loss
    for (row, label), run in known.groupby(KEY[:2], sort=False):
        differs = run[["loss_differs", "rmse_differs"]].abs().max(axis=1)
        good = (differs < TOLERANCE).cumprod().astype(bool)
        lines.append(
            {
                "row": row,
                "optimizer": label,
                "steps": run["step"].max(),
                "agrees": run.loc[good, "step"].max() if good.any() else 0,
                "differs": differs[run["step"] <= FIRST].max(),
                "ratio": 1 + run["rmse_differs"].iloc[-1],
            }
        )
    return pd.DataFrame(lines)


def read(store: Path) -> pd.DataFrame:
    """Return what a store has: ``KEY``, what was reached, and what it was made with.

    Raises:
        UserError: If its file cannot be read.
    """
    return read_table(store / FOLLOWED, [*KEY, *_REACHED], KEY)


def table(found: pd.DataFrame) -> Table:
    """Return a line for every row of the paper, with a column for every optimizer."""
    words = [
        f"{line.agrees}" if line.agrees == line.steps else f"{line.agrees} of {line.steps}"
        for line in found.itertuples()
    ]
    data = found.assign(words=words).pivot(index="row", columns="optimizer", values="words")
    data = data.reindex([row for row in ROWS if row in data.index]).reset_index()
    data.insert(1, "title", data["row"].map(title_of))
    shown = [Column(label, NAMES[label], text) for label in NAMES if label in data]
    columns = (Column("title", "row", text), *shown)
    return Table("followed", "Published runs, followed from where they started", data, columns)


def tallies(found: pd.DataFrame) -> dict[str, str]:
    """Return what is counted over all runs."""
    long, left = found[found["steps"] >= FIRST], found[found["agrees"] < found["steps"]]
    return {
        "tally/followed": str(len(found)),
        "tally/followed-long": str(len(long)),
        "tally/followed-whole": str((found["agrees"] == found["steps"]).sum()),
        "tally/followed-nine": str((long["differs"] < TOLERANCE).sum()),
        "tally/followed-left": str(len(left)),
        "tally/followed-left-ratio": f"{left['ratio'].median():.2f}",
        "tally/followed-left-met": str((left["ratio"] <= 1).sum()),
        "tally/followed-optimizers": str(found["optimizer"].nunique()),
    }
