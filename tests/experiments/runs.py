"""A tiny run for every test of the training job, and what it left behind."""

import csv
from pathlib import Path
from typing import Any

import torch

from experiments.training.checkpoint import CURRENT, read
from experiments.training.main import main

TINY = ["--n-interior", "12", "--n-boundary", "6", "--hidden", "5", "--threads", "1"]

ALL = [
    *("kfac-star", "gauss-newton", "adam", "kfac", "engd", "engd-per-layer", "engd-diagonal"),
    *("sgd", "lbfgs"),
]


_SEARCHING = ("kfac", "engd", "engd-per-layer", "engd-diagonal")

# All of them, with few evaluations of the loss in each step.
EVERY = ["--optimizers", *ALL, "--lbfgs.max-iter", "3"]
for _name in _SEARCHING:
    EVERY += [f"--{_name}.line-search-exponents", "-3", "0"]


def start(folder: Path, *arguments: str) -> int:
    """Start a tiny run in a folder, in this process."""
    return main(["--run-folder", str(folder), *TINY, *arguments])


def resume(folder: Path, *arguments: str) -> int:
    """Resume a run in this process."""
    return main(["--resume", str(folder), *arguments])


def state(folder: Path, optimizer: str) -> dict[str, Any]:
    """Return the state in the newest checkpoint of an optimizer."""
    return read(folder / optimizer / CURRENT)["state"]


def rows(folder: Path, optimizer: str) -> list[dict[str, str]]:
    """Return the metrics of an optimizer, without the clock's."""
    with (folder / optimizer / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in table]


def same(a: Any, b: Any) -> bool:
    """Return whether two nested states are the same bit for bit, but for the clock."""
    if isinstance(a, dict):
        keys = a.keys() - {"seconds"}
        return keys == b.keys() - {"seconds"} and all(same(a[key], b[key]) for key in keys)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b
