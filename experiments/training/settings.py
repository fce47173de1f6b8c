"""What can be set: everything that defines a run, and nothing else."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from experiments.training.errors import UserError
from experiments.training.names import ActivationName, OptimizerName, ProblemName
from experiments.training.optimizers import Presets
from experiments.training.problems import Sizes, resolve_sizes

DTYPES = {"float64": torch.float64, "float32": torch.float32}

# Of the run that the README's first command makes: three optimizers in about a minute.
_DEFAULT_SECONDS = 16.0

# What must agree for a checkpoint to be continued, next to the optimizer's own settings.
_IDENTITY = (
    *("problem", "n_interior", "n_boundary", "dimension"),
    *("hidden", "activation", "dtype", "resample_every", "seeds"),
)

_POSITIVE = (
    *("seconds", "steps", "threads", "chunk_size"),
    *("checkpoint_seconds", "checkpoint_steps"),
)

# Of every optimizer that has them; torch checks these too late, or not at all.
_POSITIVE_OF_OPTIMIZERS = ("lr", "max-iter", "max-eval", "history-size")

# More threads than cores are of no use, but a run may come from a larger machine.
_MOST_THREADS = max(os.cpu_count() or 1, 256)


@dataclass(frozen=True)
class Seeds:
    """Seeds of everything random."""

    initialization: int = 1
    """Of the network's parameters."""
    points: int = 0
    """Of the training points."""
    evaluation: int = 2
    """Of the points at which the error is measured."""


@dataclass(frozen=True)
class ProblemSettings(Presets):
    """The settings that a training and a comparison share."""

    problem: ProblemName = "poisson2d"
    """The PDE."""
    n_interior: int | None = None
    """Number of points in the domain; None for the problem's default."""
    n_boundary: int | None = None
    """Number of points of the boundary or initial condition; None for the problem's default."""
    dimension: int | None = None
    """Dimension of space, for the Fokker-Planck problems; None for their default."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers; the problem determines input and output."""
    activation: ActivationName = "tanh"
    """The activation."""
    dtype: Literal["float64", "float32"] = "float64"
    """Type of parameters and points."""
    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, ..."""
    threads: int | None = None
    """Number of CPU threads; None for torch's default."""
    chunk_size: int | None = None
    """How many points to process at a time; None for all. Saves memory, same result."""


@dataclass(frozen=True)
class Settings(ProblemSettings):
    """The settings of a run."""

    optimizers: tuple[OptimizerName, ...] = ("kfac-star", "gauss-newton", "adam")
    """The optimizers to run, one after the other, each from the same initialization."""
    seconds: float | None = None
    """Budget of each optimizer in seconds of its steps alone; 16 if steps are not given either."""
    steps: int | None = None
    """Budget of each optimizer in steps; whichever budget is spent first ends its training."""
    resample_every: int = 0
    """Steps after which new points are drawn; 0 for one fixed batch."""
    record_every: int = 0
    """Steps between two rows of the metrics; 0 for at most 32 rows per doubling of the steps."""
    checkpoint_seconds: float | None = 30.0
    """Seconds between two checkpoints; None for none but the last, unless steps are given."""
    checkpoint_steps: int | None = None
    """Steps between two checkpoints."""
    seeds: Seeds = field(default_factory=Seeds)
    """Seeds."""

    @property
    def sizes(self) -> Sizes:
        """The sizes of the problem."""
        return Sizes(self.n_interior, self.n_boundary, self.dimension)

    def resolved(self) -> Settings:
        """Check the settings and fill in what follows from others.

        Raises:
            UserError: If a setting is out of range.
        """
        _check(self)
        sizes = resolve_sizes(self.problem, self.sizes)
        neither = self.seconds is None and self.steps is None
        return dataclasses.replace(
            self,
            **dataclasses.asdict(sizes),
            seconds=_DEFAULT_SECONDS if neither else self.seconds,
            threads=torch.get_num_threads() if self.threads is None else self.threads,
        )

    def identity(self, optimizer: str) -> dict[str, Any]:
        """Return all that must agree for a checkpoint of an optimizer to be continued."""
        tree = dataclasses.asdict(self)
        return {
            **{name: tree[name] for name in _IDENTITY},
            "optimizer": optimizer,
            optimizer: dataclasses.asdict(self.preset(optimizer)),
        }


def _check(settings: Settings) -> None:
    """Check what no part of the library checks, or checks too late."""
    for name, value in _leaves(dataclasses.asdict(settings)):
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"--{name} must be a finite number, got {value}.")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"--{name} must be an integer of 64 bits, got {value}.")
        positive = name.rpartition(".")[2] in _POSITIVE_OF_OPTIMIZERS
        if positive and value is not None and value <= 0:
            raise UserError(f"--{name} must be positive, got {value}.")
    for name in _POSITIVE:
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be positive or None, got {value}.")
    if settings.threads is not None and settings.threads > _MOST_THREADS:
        raise UserError(f"--threads must be at most {_MOST_THREADS}, got {settings.threads}.")
    for name in ("resample_every", "record_every"):
        if getattr(settings, name) < 0:
            value = getattr(settings, name)
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more steps, got {value}.")
    if min(settings.hidden, default=1) < 1:
        raise UserError(f"--hidden must be positive widths, got {settings.hidden}.")
    names = settings.optimizers
    if not names or len(set(names)) < len(names):
        raise UserError(f"--optimizers must be one or more different names, got {list(names)}.")


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the flag and the value of everything in nested dicts and sequences."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}".strip(".").replace("_", "-"))
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value, name)
    else:
        yield name, tree
