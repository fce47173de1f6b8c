"""The results that are kept: a row for every training, and its curve, in two files of ``paper``.

``trainings.csv`` has what a training reached, with all that is needed to repeat it; ``curves.csv``
its errors along the way. Both are made of run folders by ``collect``, and are all that tables and
figures of the paper are made of.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.folder import CONFIG, ENVIRONMENT, read_json, write_atomically
from experiments.objects import UserError
from experiments.results import gather, last_rows

STORE = Path(__file__).resolve().parents[1] / "paper/results"
TRAININGS, CURVES = "trainings.csv", "curves.csv"

# What tells a training from others: preset, label, budget and seed.
KEY = ["study", "optimizer", "budget", "seed"]

# The curve of a training is kept at this many steps, at equal distances of their logarithms.
_POINTS = 40
_QUANTITIES = ["step", "seconds", "loss", "rmse"]

# Beside a run folder's own files: what its process needed, see ``paper.py``.
RESOURCES = "resources.json"


@dataclass(frozen=True)
class Store:
    """All trainings that are kept.

    Args:
        trainings: A row for each: ``KEY``, settings, where it ended, and what it was made with.
        curves: ``KEY``, and a row for every step of its curve that is kept.
    """

    trainings: pd.DataFrame
    curves: pd.DataFrame

    @classmethod
    def read(cls, folder: Path = STORE) -> Store:
        """Read a store; an empty one if there is none.

        Raises:
            UserError: If a file of it cannot be read.
        """
        tables = []
        for name, columns in ((TRAININGS, KEY), (CURVES, [*KEY, *_QUANTITIES])):
            path = folder / name
            try:
                tables.append(pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} is no table of results ({error}).") from error
            if missing := set(columns) - set(tables[-1].columns):
                raise UserError(f"{path} must have the columns {', '.join(sorted(missing))}.")
        return cls(*tables)

    def merged(self, newer: Store) -> Store:
        """Return the store with newer trainings in the place of those of the same key."""
        tables = []
        for old, new in ((self.trainings, newer.trainings), (self.curves, newer.curves)):
            if old.empty or new.empty:
                tables.append(new if old.empty else old)
                continue
            replaced = old.set_index(KEY).index.isin(new.set_index(KEY).index)
            both = pd.concat([old[~replaced], new], ignore_index=True)
            tables.append(both.sort_values(KEY, kind="stable", ignore_index=True))
        return Store(*tables)

    def write(self, folder: Path = STORE) -> None:
        """Write both files, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in ((TRAININGS, self.trainings), (CURVES, self.curves)):
            buffer = io.StringIO()
            table.to_csv(buffer, index=False, float_format="%.4g")
            write_atomically(folder / name, buffer.getvalue().encode())


def collect(folders: Iterable[Path]) -> Store:
    """Return what run folders hold, each of one optimizer, in a folder of its study's name.

    Args:
        folders: Folders .../STUDY/OPTIMIZER.
    """
    trainings: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    for folder in folders:
        table = gather([folder])
        if table.empty:
            continue
        about = _about(folder)
        for seed, rows in table.groupby("seed"):
            last = last_rows(rows).iloc[0]
            key = {"study": folder.parent.name, "optimizer": folder.name}
            key |= {"budget": about["budget"], "seed": seed}
            steps, seconds = last["step"], last["seconds"]
            trainings.append(
                {
                    **key,
                    **{name: last[name] for name in ("step", "seconds", "loss", "held_out_loss")},
                    **{name: last[name] for name in ("rmse", "relative_error")},
                    "best_rmse": rows["rmse"].min(),
                    "ms_per_step": 1e3 * seconds / steps if steps else np.nan,
                    "rejected": last.get("rejected"),
                    "outcome": about["outcomes"].get(int(seed), "interrupted"),
                    **about["columns"],
                }
            )
            curves.append(thinned(rows).assign(**key)[[*KEY, *_QUANTITIES]])
    empty = Store(pd.DataFrame(columns=KEY), pd.DataFrame(columns=[*KEY, *_QUANTITIES]))
    if not trainings:
        return empty
    return empty.merged(Store(pd.DataFrame(trainings), pd.concat(curves, ignore_index=True)))


def thinned(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the first and the last row, and some between them."""
    wanted = np.geomspace(1, max(1.0, float(rows["step"].max())), _POINTS - 1)
    nearest = [int((rows["step"] - step).abs().argmin()) for step in wanted]
    return rows.iloc[sorted({0, *nearest})]


def outcomes(folder: Path) -> dict[int, str]:
    """Return how the trainings of a run folder of one optimizer ended, by their seeds."""
    if not (path := folder / "summary.csv").is_file():
        return {}
    summary = pd.read_csv(path)
    return dict(zip(summary["seed"].astype(int), summary["outcome"], strict=True))


def _about(folder: Path) -> dict[str, Any]:
    """Return what a run folder says of all its trainings."""
    config, history = read_json(folder / CONFIG), read_json(folder / ENVIRONMENT)
    last = history[-1] if isinstance(history, list) and history else {}
    packages, resources = last.get("packages") or {}, read_json(folder / RESOURCES) or {}
    by_steps = config["steps"] is not None
    budget = f"{config['steps']} steps" if by_steps else f"{config['seconds']:g} s"
    own = {k: v for k, v in config["settings"].items() if k.startswith(f"{folder.name}.")}
    return {
        "budget": budget,
        "outcomes": outcomes(folder),
        "columns": {
            "memory_mb": resources.get("peak_memory_mb"),
            "settings": json.dumps(own),
            "resample_every": own.get(f"{folder.name}.resample_every", config["resample_every"]),
            "dtype": config["dtype"],
            "device": last.get("device_name"),
            "threads": last.get("threads"),
            "torch": packages.get("torch"),
            "python": last.get("python"),
            "commit": str(last.get("commit"))[:8],
            "changed": last.get("uncommitted_changes"),
            "started": last.get("started"),
            "command": " ".join(map(str, last.get("command", []))),
        },
    }
