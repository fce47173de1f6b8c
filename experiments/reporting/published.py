"""The published figures that ours stand next to, and their errors at as many steps as ours took.

``published.csv`` has the end of every published run. What it had reached at fewer steps is read off
its curve where the reader has the curves, and kept in ``published_at_steps.csv`` of the store for
those who have not.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from experiments import catalog
from experiments.objects import evaluate, resolve
from experiments.presets import PRESETS
from experiments.results import published_curves, write_table

ENDS = Path(__file__).parents[1] / "published.csv"
AT_STEPS = "published_at_steps.csv"
_KEY = ["row", "optimizer", "steps"]


def interpolated(curve: pd.DataFrame, step: float) -> float:
    """Return the error of a curve at a number of steps, linear in the logarithms of both.

    Args:
        curve: Columns step and rmse, in the order of the steps.
        step: Where; NaN is returned before the first and after the last step of the curve.
    """
    known = curve[(curve["step"] > 0) & (curve["rmse"] > 0)]
    steps, errors = (np.log(known[name].to_numpy(float)) for name in ("step", "rmse"))
    if not len(steps):
        return np.nan
    return float(np.exp(np.interp(np.log(step), steps, errors, left=np.nan, right=np.nan)))


def ends(row: str) -> pd.DataFrame:
    """Return where the published runs of a row ended: by optimizer, rmse, steps, seconds, ...

    Steps are counted as updates, one more than the number of the last step in ``published.csv``.
    """
    table = pd.read_csv(ENDS)
    table = table.assign(steps=table["steps"] + 1)
    return table[table["row"] == row].set_index("optimizer")


def curves(row: str) -> pd.DataFrame | None:
    """Return the published curves of a row of the paper, where the reference data is present.

    A step is that after as many updates, the error the one after it, the loss the one before it.

    Returns:
        Columns optimizer, step, seconds, loss, rmse; each curve ends where ``ends`` says.
    """
    experiment = PRESETS[row]
    widths = evaluate(experiment.settings["network.widths"])
    d_in = resolve(experiment.problem, catalog.PROBLEMS, "problem")().d_in
    found = published_curves(experiment.problem, "-".join(map(str, (d_in, *widths, 1))))
    if found is None:
        return None
    search = "bayes" if row.endswith("_bayes") else "random"
    columns = ["optimizer", "step", "seconds", "loss", "rmse"]
    found = found.loc[found["search"] == search, columns]
    last = ends(row).dropna(subset="steps").rename(columns={"steps": "step"}).reset_index()
    last = last[last["optimizer"].isin(found["optimizer"])].reindex(columns=columns)
    both = pd.concat([found, last]).drop_duplicates(["optimizer", "step"])
    return both.sort_values(["optimizer", "step"], ignore_index=True)


def at_steps(wanted: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return published errors at some numbers of steps, and keep those that are new.

    Args:
        wanted: Columns row, optimizer and steps.
        folder: The store.

    Returns:
        The error of each; NaN where it is neither kept nor to be read off a curve.
    """
    path = folder / AT_STEPS
    known = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=[*_KEY, "rmse"])
    known = known.astype({"steps": float, "rmse": float})
    found = wanted.merge(known, "left", on=_KEY)
    missing = found["rmse"].isna()
    for row in found.loc[missing, "row"].unique():
        table = curves(row)
        if table is None:
            continue
        for i in found.index[missing & (found["row"] == row)]:
            curve = table[table["optimizer"] == found.at[i, "optimizer"]]
            found.at[i, "rmse"] = interpolated(curve, found.at[i, "steps"])
    kept = found.dropna(subset="rmse").astype({"steps": int}).sort_values(_KEY)
    if found["rmse"][missing].notna().any():
        write_table(path, kept)
    return found
