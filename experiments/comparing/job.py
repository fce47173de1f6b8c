"""What can be set, and the trainings to compare along: its own, or those of earlier runs."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.command import Interruption, Parser, experiment_of, set_up_device
from experiments.comparing.operators import recipes
from experiments.experiment import Experiment, from_json
from experiments.folder import CONFIG, read_config
from experiments.objects import UserError, evaluate, is_own
from experiments.training import CURRENT, PREVIOUS, Trainer, check_identity, read_checkpoint
from pinncurv.optim import DampingRule

# The smallest values of the numbers.
_LEAST = {"continued_steps": 0, "dense_limit": 1, "block_limit": 1, "probes": 2, "lanczos_steps": 1}


@dataclass(frozen=True)
class Comparison:
    """All that defines a comparison.

    Args:
        experiment: What trains what, from which seeds.
        operators: What is compared, see ``operators.recipes``.
        runs: Folders of train.py, at whose checkpoints to compare instead.
        steps: After which steps of training to compare.
        dampings: λ > 0, descending.
        continued_steps: How long to train on from every point with every operator.
        continued_rule: How λ changes then.
        dense_limit: Most parameters for which matrices are formed; above, numbers are estimates.
        block_limit: Most parameters of a layer for which its block is formed.
        probes: Random vectors per estimate, and half as many in its sketch.
        lanczos_steps: For condition numbers and spectra above the limit.
        cg_tolerance: Relative residual norm that conjugate gradients must reach.
        cg_limit: Most iterations of conjugate gradients.
    """

    experiment: Experiment
    operators: tuple[str, ...] = (
        *("exact", "exact_blocks", "exact_diagonal", "kfac_expand", "kfac_reduce"),
        *("ekfac", "kronecker", "subspace", "identity"),
    )
    runs: tuple[str, ...] = ()
    steps: tuple[int, ...] = (0, 10, 50)
    dampings: tuple[float, ...] = (1e-2, 1e-5, 1e-8)
    continued_steps: int = 0
    continued_rule: str = "LevenbergMarquardt()"
    dense_limit: int = 1024
    block_limit: int = 4200
    probes: int = 32
    lanczos_steps: int = 60
    cg_tolerance: float = 1e-3
    cg_limit: int = 500

    @property
    def middle(self) -> float:
        """The damping that is shown where there is room for one."""
        return self.dampings[len(self.dampings) // 2]

    def rule(self) -> DampingRule:
        """Return how λ changes in the further training.

        Raises:
            UserError: If that is no damping rule.
        """
        rule = evaluate(self.continued_rule)
        if not isinstance(rule, DampingRule):
            raise UserError(
                "--continued-rule must be a damping rule of the library, such as "
                f"ConstantDamping(), got {self.continued_rule}."
            )
        return rule

    def checked(self) -> Comparison:
        """Check everything but the experiment, and sort steps and dampings.

        Raises:
            UserError: If something is out of range.
        """
        for name in ("operators", "dampings", "steps"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise UserError(
                    f"--{name} must be one or more different values, got {list(values)}."
                )
        for damping in self.dampings:
            if not (math.isfinite(damping) and damping > 0):
                raise UserError(f"--dampings must be finite numbers > 0, got {damping}.")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be at least {least}, got {getattr(self, name)}.")
        if min(self.steps) < 0:
            raise UserError(f"--steps must be 0 or more, got {list(self.steps)}.")
        if not 0 < self.cg_tolerance < 1:
            raise UserError(f"--cg-tolerance must be in (0, 1), got {self.cg_tolerance}.")
        recipes(self.operators)
        self.rule()
        steps, dampings = sorted(self.steps), sorted(self.dampings, reverse=True)
        return dataclasses.replace(self, steps=tuple(steps), dampings=tuple(dampings))


@dataclass(frozen=True)
class Training:
    """A training, and the steps at which to compare.

    Args:
        name: Its seed, or the folder of the earlier one.
        trainer: The training.
        states: The steps; with the state of a checkpoint, or None where training leads there.
    """

    name: str
    trainer: Trainer
    states: Mapping[int, Any]

    def points(self, interruption: Interruption) -> Iterator[int]:
        """Yield step by step, with the trainer there, until it is interrupted.

        Raises:
            FloatingPointError: If the training diverges.
        """
        for step, state in sorted(self.states.items()):
            if state is not None:
                self.trainer.load_state_dict(state)
            while self.trainer.step < step and not interruption.requested:
                self.trainer.advance()
            if interruption.requested:
                return
            self.trainer.check_finite()
            yield step


def job_of(parser: Parser, options: argparse.Namespace) -> tuple[Comparison, list[Training]]:
    """Return the comparison that options ask for, and its trainings, ready to start.

    Raises:
        UserError: If it is not possible.
    """
    stored, fields = None, [field.name for field in dataclasses.fields(Comparison)]
    values: dict[str, Any] = {}
    if options.config is not None:
        tree = read_config(options.config, "--config")
        if isinstance(tree, dict) and "experiment" in tree:  # of a comparison
            stored = from_json(tree.pop("experiment"), str(options.config))
            values, options.config = tree, None
    values |= {n: v for n in fields if (v := getattr(options, n, None)) is not None}
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    if unknown := set(values) - set(fields):
        raise UserError(f"--config must have the settings of a comparison, got {sorted(unknown)}.")
    if options.optimizers is not None and len(options.optimizers) > 1:
        raise UserError(f"--optimizers must be one, which trains, got {options.optimizers}.")
    if values.get("runs"):
        if options.steps is not None:
            raise UserError("--steps has no effect with --runs, which is at all checkpoints.")
        job = Comparison(Experiment(), **values).checked()
        if stored is not None and options.optimizers is None:
            options.optimizers = list(stored.labels)
        trainings = [t for run in job.runs for t in _of_run(parser, options, Path(run))]
        _check_agreement(trainings)
        return dataclasses.replace(job, experiment=trainings[0].trainer.experiment), trainings
    if stored is None and options.config is None and options.preset is None:
        options.optimizers = options.optimizers or ["kfac_star"]
        options.seeds = options.seeds or [1, 2, 3]
    experiment = experiment_of(parser, options, stored)
    label = next(iter(experiment.labels))
    experiment = experiment.only(label)
    job = Comparison(experiment, **values).checked()
    device, states = set_up_device(experiment), dict.fromkeys(job.steps)
    trainers = [Trainer(experiment, label, seed, device) for seed in experiment.seeds]
    return job, [Training(f"seed{trainer.seed}", trainer, states) for trainer in trainers]


def _of_run(parser: Parser, options: argparse.Namespace, folder: Path) -> Iterator[Training]:
    """Yield the trainings of a run of train.py by one of its optimizers, the first by default."""
    stored = from_json(read_config(folder / CONFIG, "--runs"), str(folder / CONFIG))
    found = [label for label in stored.labels if any((folder / label).glob(f"seed*/{CURRENT}"))]
    options = argparse.Namespace(**vars(options))
    label = found[0] if found else ""
    if options.optimizers is not None:
        label = next(iter(Experiment(optimizers=tuple(options.optimizers)).labels))
        name = stored.labels.get(label, "")
        if name and not is_own(name):  # whoever names a file of their own lets it be run
            options.optimizers = [f"{label}={name}"]
    if label not in found:
        raise UserError(
            f"--runs: {folder} has no checkpoint{f' of {label}' if label else ''}. It has some of: "
            f"{', '.join(found) or 'none of its optimizers'}."
        )
    experiment = experiment_of(parser, options, stored).only(label)
    device = set_up_device(experiment)
    for seed in experiment.seeds:
        place, states = folder / label / f"seed{seed}", {0: None}
        trainer = Trainer(experiment, label, seed, device)
        for path in (place / PREVIOUS, place / CURRENT):
            with suppress(OSError):
                checkpoint = read_checkpoint(path)
                identity = trainer.experiment.identity(label, seed)
                check_identity(path, checkpoint["identity"], identity)
                states[int(checkpoint["state"]["step"])] = checkpoint["state"]
        yield Training(str(place), trainer, states)


def _check_agreement(trainings: list[Training]) -> None:
    """Check that medians over the trainings make sense."""
    known = [
        (e.problem, e.network, {**e.of("problem"), **e.of("network")}, e.dtype)
        for e in (training.trainer.experiment for training in trainings)
    ]
    for training, about in zip(trainings, known, strict=True):
        if about != known[0]:
            raise UserError(
                "--runs must agree in problem, network, their settings and dtype, but "
                f"{trainings[0].name} has {known[0]} and {training.name} has {about}."
            )
