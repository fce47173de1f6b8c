"""The results that are kept: a row for every training, and its curve, in two files of ``paper``.

``trainings.csv`` has what a training reached, with all that is needed to repeat it; ``curves.csv``
its errors along the way. Both are made of run folders by ``collect``; with ``reproduced.csv``, made
by ``reproduce.py``, they are all of ours that tables and figures of the paper are made of.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock
from pandas.api.types import is_numeric_dtype

from experiments.experiment import Experiment, from_json
from experiments.folder import (
    CONFIG,
    ENVIRONMENT,
    LOCK,
    SUMMARY,
    read_config,
    read_json,
)
from experiments.objects import UserError
from experiments.presets import PRESETS
from experiments.results import gather, last_rows, write_table
from experiments.training import INTERRUPTED, NOT_STARTED, check_identity

STORE = Path(__file__).resolve().parents[1] / "paper/results"
TRAININGS, CURVES = "trainings.csv", "curves.csv"

# What tells a training from others: preset, label, budget and seed.
KEY = ["study", "optimizer", "budget", "seed"]

# What tables are made of.
_REACHED = ["step", "seconds", "rmse", "relative_error", "ms_per_step", "memory_mb", "outcome"]

# The curve of a training is kept at this many steps, at equal distances of their logarithms.
_POINTS = 40
_QUANTITIES = ["step", "seconds", "loss", "rmse"]

# Eight digits of a commit may look like a number, such as 1234e567.
_WORDS = dict.fromkeys(("study", "row", "optimizer", "budget", "commit", "torch", "python"), str)

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
        for name, columns, unique in (
            (TRAININGS, [*KEY, *_REACHED], KEY),
            (CURVES, [*KEY, *_QUANTITIES], [*KEY, "step"]),
        ):
            tables.append(read_table(folder / name, columns, unique))
        return cls(*tables)

    def merged(self, newer: Store) -> Store:
        """Return the store with newer trainings in the place of those of the same key.

        One that was interrupted takes the place of no other.
        """
        if self.trainings.empty or newer.trainings.empty:
            return newer if self.trainings.empty else self
        ended = self.trainings[self.trainings["outcome"] != INTERRUPTED]
        cut = newer.trainings[newer.trainings["outcome"] == INTERRUPTED]
        lost = _keys(cut).intersection(_keys(ended))
        tables = []
        for old, every in ((self.trainings, newer.trainings), (self.curves, newer.curves)):
            new = every[~_keys(every).isin(lost)]
            both = pd.concat([old[~_keys(old).isin(_keys(new))], new], ignore_index=True)
            tables.append(both.sort_values(KEY, kind="stable", ignore_index=True))
        return Store(*tables)

    def current(self) -> tuple[Store, list[str]]:
        """Return the trainings that today's presets would repeat, and which optimizers have others.

        Returns:
            The store of the former; STUDY/OPTIMIZER of what had another problem, network, optimizer
            or settings, or is no longer trained.
        """
        if "settings" not in self.trainings:
            return self, []
        wanted = {
            (study, label): identity(experiment, label)
            for study in set(self.trainings["study"]) & set(PRESETS)
            for experiment in [PRESETS[study].checked()]
            for label in experiment.labels
        }
        had = self.trainings[[*KEY[:2], "settings"]].itertuples(index=False)
        stale = np.array([wanted.get((study, label)) != text for study, label, text in had], bool)
        others = self.trainings.loc[stale, KEY[:2]].itertuples(index=False)
        curves = self.curves[~_keys(self.curves).isin(_keys(self.trainings[stale]))]
        kept = self.trainings[~stale].reset_index(drop=True)
        return Store(kept, curves.reset_index(drop=True)), sorted({"/".join(key) for key in others})

    def write(self, folder: Path = STORE) -> None:
        """Write both files, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in ((TRAININGS, self.trainings), (CURVES, self.curves)):
            write_table(folder / name, table)

    def add_to(self, folder: Path = STORE) -> None:
        """Merge these trainings into the store of a folder, which other programs may do, too."""
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / LOCK):
            Store.read(folder).merged(self).write(folder)


def read_table(path: Path, columns: Sequence[str], unique: Sequence[str]) -> pd.DataFrame:
    """Read a table of results; an empty one if there is none.

    Args:
        path: The file.
        columns: Those that it must have, beside others.
        unique: Those whose values no two rows share, and none lacks.

    Raises:
        UserError: If it cannot be read, or is no such table.
    """
    try:
        empty = pd.DataFrame(columns=list(columns))
        table = pd.read_csv(path, dtype=_WORDS) if path.exists() else empty
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no table of results ({error}).") from error
    if missing := set(columns) - set(table.columns):
        raise UserError(f"{path} must have the columns {', '.join(sorted(missing))}.")
    for name in (name for name in columns if name not in _WORDS and name != "outcome"):
        if len(table) and not is_numeric_dtype(table[name]):
            raise UserError(f"{path} must have numbers in the column {name}.")
    for name in unique:
        if table[name].isna().any():
            raise UserError(f"{path} must have no row without {name}.")
    if (twice := table.duplicated(list(unique))).any():
        row = ", ".join(map(str, table.loc[twice, list(unique)].iloc[0]))
        raise UserError(f"{path} must have every row once, got two of {row}.")
    return table


def _keys(table: pd.DataFrame) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(table[KEY])


def origin(folder: Path) -> Experiment:
    """Return the experiment of a run folder .../STUDY/OPTIMIZER.

    Raises:
        UserError: If it is not what the study trains.
    """
    study, label, path = folder.parent.name, folder.name, folder / CONFIG
    experiment = from_json(read_config(path, "--runs"), str(path))
    if study not in PRESETS or list(experiment.labels) != [label]:
        raise UserError(f"{path} must be of the one optimizer {label} of a preset {study}.")
    check_identity(path, _identity(experiment, label), _identity(PRESETS[study].checked(), label))
    return experiment


def identity(experiment: Experiment, label: str) -> str:
    """Return, as a store keeps it, what makes the numbers of an optimizer, but for its budget."""
    return json.dumps(_identity(experiment, label), sort_keys=True)


def _identity(experiment: Experiment, label: str) -> dict[str, Any]:
    """Return what makes the numbers of an optimizer, but for its budget; no file is read."""
    names = ("problem", "network", "dtype", "resample_every", "candidates", "windows")
    return {
        **{name: getattr(experiment, name) for name in names},
        "optimizer": experiment.labels.get(label),
        "settings": {target: experiment.of(target) for target in ("problem", "network", label)},
    }


def collect(folders: Iterable[Path]) -> Store:
    """Return what run folders hold, each of one optimizer, in a folder of its study's name.

    What is not of its study is left out, and named.

    Args:
        folders: Folders .../STUDY/OPTIMIZER.
    """
    trainings: list[dict[str, Any]] = []
    curves: list[pd.DataFrame] = []
    for folder in folders:
        try:
            experiment = origin(folder)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        table = gather([folder])
        if table.empty:
            continue
        about, ended = _about(folder, experiment), outcomes(folder)
        by_steps = experiment.steps is not None
        budget = f"{experiment.steps} steps" if by_steps else f"{experiment.seconds:g} s"
        for seed, rows in table.astype({"step": int}).groupby("seed"):
            last = last_rows(rows).iloc[0]
            key = {"study": folder.parent.name, "optimizer": folder.name}
            key |= {"budget": budget, "seed": seed}
            steps, seconds = last["step"], last["seconds"]
            trainings.append(
                {
                    **key,
                    **{name: last[name] for name in ("step", "seconds", "loss", "held_out_loss")},
                    **{name: last[name] for name in ("rmse", "relative_error")},
                    "best_rmse": rows["rmse"].min(),
                    "ms_per_step": 1e3 * seconds / steps if steps else np.nan,
                    "rejected": last.get("rejected"),
                    "outcome": ended.get(int(seed), INTERRUPTED),
                    **about,
                }
            )
            curves.append(thinned(rows).assign(**key)[[*KEY, *_QUANTITIES]])
    if not trainings:
        return Store(
            pd.DataFrame(columns=[*KEY, *_REACHED]), pd.DataFrame(columns=[*KEY, *_QUANTITIES])
        )
    return Store(pd.DataFrame(trainings), pd.concat(curves, ignore_index=True))


def thinned(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the first and the last row, and some between them."""
    wanted = np.geomspace(1, max(1.0, float(rows["step"].max())), _POINTS - 1)
    nearest = [int((rows["step"] - step).abs().argmin()) for step in wanted]
    return rows.iloc[sorted({0, *nearest})]


def outcomes(folder: Path) -> dict[int, str]:
    """Return how the trainings of a run folder of one optimizer ended, by their seeds.

    One that was not begun again before the run was interrupted was interrupted, too.
    """
    try:
        summary = pd.read_csv(folder / SUMMARY)
        ended = summary["outcome"].replace(NOT_STARTED, INTERRUPTED)
        return dict(zip(summary["seed"].astype(int), ended, strict=True))
    except (OSError, ValueError, KeyError):
        return {}


def _about(folder: Path, experiment: Experiment) -> dict[str, Any]:
    """Return what a run folder says of all its trainings."""
    history, label = read_json(folder / ENVIRONMENT), folder.name
    last = history[-1] if isinstance(history, list) and history else {}
    packages, resources = last.get("packages") or {}, read_json(folder / RESOURCES) or {}
    resampled = experiment.of(label).get("resample_every", experiment.resample_every)
    return {
        "memory_mb": resources.get("peak_memory_mb"),
        "settings": identity(experiment, label),
        "resample_every": resampled,
        "dtype": experiment.dtype,
        "device": last.get("device_name"),
        "threads": last.get("threads"),
        "torch": packages.get("torch"),
        "python": last.get("python"),
        "commit": str(last.get("commit"))[:8],
        "changed": last.get("uncommitted_changes"),
        "started": last.get("started"),
        "command": " ".join(map(str, last.get("command", []))),
    }
