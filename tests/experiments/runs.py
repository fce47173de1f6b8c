"""A tiny run for every test of the training job, and what it left behind."""

import csv
from pathlib import Path
from typing import Any

import torch

from experiments.command import run_program
from experiments.train import main
from experiments.training import CURRENT, read_checkpoint

TINY = ["--threads", "1", "--set", "network.widths=(5,)", "problem.n_interior=12"]
BOUNDARY = ["problem.n_boundary=6"]

ALL = [
    *("kfac_star", "gauss_newton", "adam", "kfac", "engd", "engd_per_layer", "engd_diagonal"),
    *("sgd", "lbfgs", "spring", "hessian_free", "levenberg_marquardt", "ekfac"),
]

# All of them, with few evaluations of the loss in each step.
_SEARCHING = ("engd", "engd_per_layer", "engd_diagonal")
EVERY = ["--optimizers", *ALL, "--set", "lbfgs.max_iter=3", "sgd.lr=1e-3"]
EVERY += [f"{name}.step_size=GridLineSearch(-3, 0)" for name in _SEARCHING]


def program(*arguments: str) -> int:
    """Run the program in this process, as the script does."""
    return run_program(lambda: main(arguments))


def start(folder: Path, *arguments: str) -> int:
    """Start a tiny run in a folder."""
    return program("--run-folder", str(folder), *TINY, *BOUNDARY, *arguments)


def resume(folder: Path, *arguments: str) -> int:
    """Resume a run."""
    return program("--resume", str(folder), *arguments)


def part(folder: Path, optimizer: str, seed: int = 1) -> Path:
    """Return the folder of one training."""
    return folder / optimizer / f"seed{seed}"


def state(folder: Path, optimizer: str, seed: int = 1) -> dict[str, Any]:
    """Return the state in the newest checkpoint of an optimizer."""
    return read_checkpoint(part(folder, optimizer, seed) / CURRENT)["state"]


def rows(folder: Path, optimizer: str, seed: int = 1) -> list[dict[str, str]]:
    """Return the metrics of an optimizer, without the clock's."""
    with (part(folder, optimizer, seed) / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key != "seconds"} for row in table]


def column(folder: Path, optimizer: str, name: str, seed: int = 1) -> list[float]:
    """Return one column of the metrics."""
    with (part(folder, optimizer, seed) / "metrics.csv").open() as file:
        return [float(row[name] or "nan") for row in csv.DictReader(file)]


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
