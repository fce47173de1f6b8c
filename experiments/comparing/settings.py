"""What can be set: everything that defines a comparison, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch

from experiments.comparing.operators import OperatorName
from experiments.training.errors import UserError
from experiments.training.names import OptimizerName
from experiments.training.optimizers import Presets
from experiments.training.settings import ProblemSettings, Seeds, Settings as TrainingSettings

# What is read from the run folders instead, if there are any.
_OF_THE_RUN = (
    *("problem", "n_interior", "n_boundary", "dimension", "hidden", "activation", "dtype"),
    *("steps", "seeds"),
)
_POSITIVE = ("dense_limit", "block_limit", "lanczos_steps", "cg_limit", "repeats")
_DEFAULT_OPTIMIZER = "kfac-star"


@dataclass(frozen=True)
class Settings(ProblemSettings):
    """The settings of a comparison."""

    runs: tuple[str, ...] = ()
    """Folders that train.py wrote: compare at their initializations and checkpoints."""
    optimizer: OptimizerName | None = None
    """What trains, or whose checkpoints to take; None for kfac-star or the run's first."""
    steps: tuple[int, ...] = (0, 10, 50)
    """After which training steps to compare, without --runs."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of initialization and points, one training for each, without --runs."""
    operators: tuple[OperatorName, ...] = (
        *("exact", "exact-blocks", "exact-diagonal", "kfac-expand", "kfac-reduce"),
        *("ekfac", "kronecker", "subspace", "identity"),
    )
    """What to compare with the exact Gauss-Newton matrix, in the order of table and figures."""
    dampings: tuple[float, ...] = (1e-2, 1e-5, 1e-8)
    """λ > 0 of the inverses; figures along training show the middle one."""
    dense_limit: int = 1024
    """Most parameters for which matrices are compared entry by entry; above, by random probes."""
    block_limit: int = 4200
    """Most parameters of a layer for which its exact block is formed (D² numbers per block)."""
    probes: int = 32
    """Random probes per estimate, and half as many vectors in its sketch."""
    lanczos_steps: int = 60
    """Lanczos steps for condition numbers and spectra above the limit."""
    cg_tolerance: float = 1e-3
    """Relative residual norm that preconditioned conjugate gradients must reach."""
    cg_limit: int = 500
    """Most iterations of conjugate gradients."""
    pairs: bool = True
    """Whether to compare every two approximations, too."""
    continued_steps: int = 0
    """Train on from every point with every approximation, its step scaled by the exact quadratic
    model, for so many steps; 0 for none."""
    continued_rule: Literal["constant", "levenberg-marquardt"] = "levenberg-marquardt"
    """How λ changes in these steps."""
    repeats: int = 3
    """How often to time a construction or an inversion, as long as it takes below a second."""

    def resolved(self) -> Settings:
        """Check the settings and fill in what follows from others.

        Raises:
            UserError: If a setting is out of range.
        """
        _check(self)
        steps, dampings = tuple(sorted(self.steps)), tuple(sorted(self.dampings, reverse=True))
        if self.runs:
            return dataclasses.replace(self, dampings=dampings, threads=self._threads)
        optimizer = self.optimizer or _DEFAULT_OPTIMIZER
        plain = dataclasses.replace(self, optimizer=optimizer, steps=steps, dampings=dampings)
        training = plain.training(self.seeds[0]).resolved()
        sizes = {
            name: getattr(training, name) for name in ("n_interior", "n_boundary", "dimension")
        }
        return dataclasses.replace(plain, **sizes, threads=self._threads)

    @property
    def _threads(self) -> int:
        return torch.get_num_threads() if self.threads is None else self.threads

    def training(self, seed: int) -> TrainingSettings:
        """Return the settings of the training of one seed."""
        names = {field.name for field in fields(TrainingSettings)} - {"steps", "seeds"}
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in names}
        return TrainingSettings(
            **shared,
            optimizers=(self.optimizer or _DEFAULT_OPTIMIZER,),
            steps=max(1, *self.steps) if self.steps else 1,
            seeds=Seeds(initialization=seed, points=seed),
        )


def _check(settings: Settings) -> None:
    """Check what the settings of a training do not cover."""
    runs = [str(Path(folder).resolve()) for folder in settings.runs]
    if len(set(runs)) < len(runs):
        raise UserError(f"--runs must be different folders, got {list(settings.runs)}.")
    for name in ("operators", "dampings", "steps", "seeds"):
        values = getattr(settings, name)
        if not values or len(set(values)) < len(values):
            raise UserError(f"--{name} must be one or more different values, got {list(values)}.")
    for damping in settings.dampings:
        if not (math.isfinite(damping) and damping > 0):
            raise UserError(f"--dampings must be finite numbers > 0, got {damping}.")
    if min(settings.steps) < 0:
        raise UserError(f"--steps must be 0 or more, got {list(settings.steps)}.")
    for name in _POSITIVE:
        if getattr(settings, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 1, got {getattr(settings, name)}.")
    if settings.continued_steps < 0:
        raise UserError(f"--continued-steps must be 0 or more, got {settings.continued_steps}.")
    if settings.probes < 2:
        raise UserError(f"--probes must be at least 2, got {settings.probes}.")
    if not 0 < settings.cg_tolerance < 1:
        raise UserError(f"--cg-tolerance must be in (0, 1), got {settings.cg_tolerance}.")
    if settings.threads is not None and settings.threads < 1:
        raise UserError(f"--threads must be positive or None, got {settings.threads}.")
    _check_effect(settings)


def _check_effect(settings: Settings) -> None:
    """Refuse settings that would silently do nothing."""
    if not settings.continued_steps and settings.continued_rule != Settings.continued_rule:
        raise UserError("--continued-rule has no effect without --continued-steps. Add it.")
    if settings.runs:
        ignored = [*_OF_THE_RUN, *(field.name for field in fields(Presets))]
        reason = "with --runs, which fixes it. Drop one of the two"
    else:
        name = (settings.optimizer or _DEFAULT_OPTIMIZER).replace("-", "_")
        ignored = [field.name for field in fields(Presets) if field.name != name]
        reason = f"for the optimizer {name.replace('_', '-')}. Drop it, or choose --optimizer"
    for field in fields(settings):
        if field.name in ignored and getattr(settings, field.name) != field.default:
            flag = f"--{field.name.replace('_', '-')}"
            raise UserError(f"{flag} has no effect {reason}.")
