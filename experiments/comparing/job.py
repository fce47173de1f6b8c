"""What can be set, and the trainings to compare along: its own, or those of earlier runs."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import typeguard

from experiments.command import (
    Interruption,
    Parser,
    experiment_of,
    refuse_own_code,
    set_up_device,
)
from experiments.comparing.operators import recipes
from experiments.experiment import Experiment, from_json
from experiments.folder import CONFIG, read_config
from experiments.objects import UserError, evaluate, is_own
from experiments.training import CURRENT, PREVIOUS, Trainer, check_identity, read_checkpoint
from pinncurv.optim import DampingRule

_OPERATORS = (
    *("exact", "exact_blocks", "exact_diagonal", "kfac_expand", "kfac_reduce"),
    *("ekfac", "kronecker", "subspace", "identity"),
)


def _option(default: Any, metavar: str, text: str) -> Any:
    return field(default=default, metadata={"metavar": metavar, "help": text})


@dataclass(frozen=True)
class Comparison:
    """All that defines a comparison: an experiment, which trains, and the options."""

    experiment: Experiment
    operators: tuple[str, ...] = _option(
        _OPERATORS, "C", "names (see --list), [LABEL=]EXPRESSION as a=KFAC(reduce), FILE.py:NAME"
    )
    runs: tuple[str, ...] = _option((), "F", "folders of train.py, for their checkpoints")
    steps: tuple[int, ...] = _option((0, 10, 50), "K", "compare after so many steps of training")
    dampings: tuple[float, ...] = _option((1e-2, 1e-5, 1e-8), "L", "λ; the middle one is shown")
    continued_steps: int = _option(0, "K", "train on from every point with every operator")
    continued_rule: str = _option("LevenbergMarquardt()", "R", "how λ changes then")
    dense_limit: int = _option(1024, "D", "most parameters for exact numbers; above, estimates")
    probes: int = _option(32, "K", "random vectors of each of these")
    lanczos_steps: int = _option(60, "K", "for spectra and condition numbers above")
    cg_tolerance: float = _option(1e-3, "T", "relative residual for conjugate gradients to reach")
    cg_limit: int = _option(500, "K", "most iterations of these")

    @classmethod
    def add_options(cls, parser: Parser) -> None:
        """Add an option for every field but the experiment."""
        for item in fields(cls)[1:]:
            several = isinstance(item.default, tuple)
            default: Any = item.default
            kind = type((*default, "")[0] if several else default)
            nargs = "+" if several else None
            flag = f"--{item.name.replace('_', '-')}"
            parser.add_argument(flag, type=kind, nargs=nargs, **item.metadata)

    @property
    def middle(self) -> float:
        """The damping that is shown where there is room for one."""
        return self.dampings[len(self.dampings) // 2]

    def checked(self) -> Comparison:
        """Check everything but the experiment, and sort steps and dampings.

        Raises:
            UserError: If something is out of range.
        """
        for name, hint in get_type_hints(Comparison).items():
            try:
                typeguard.check_type(getattr(self, name), hint)
            except typeguard.TypeCheckError as error:
                raise UserError(f"{name} cannot be {getattr(self, name)!r}: {error}.") from None
        rule = evaluate(self.continued_rule)
        several = {n: getattr(self, n) for n in ("operators", "steps", "dampings")}
        for name, fine, wanted in (
            *((n, 0 < len(set(v)) == len(v), "one or more, different") for n, v in several.items()),
            ("dampings", all(0 < d < math.inf for d in self.dampings), "finite numbers > 0"),
            ("steps", all(step >= 0 for step in self.steps), "0 or more"),
            ("continued_steps", self.continued_steps >= 0, "0 or more"),
            ("continued_rule", isinstance(rule, DampingRule), "a rule such as ConstantDamping()"),
            *((n, getattr(self, n) > 0, "positive") for n in ("dense_limit", "lanczos_steps")),
            ("probes", self.probes > 1, "at least 2"),
            ("cg_tolerance", 0 < self.cg_tolerance < 1, "in (0, 1)"),
            ("cg_limit", self.cg_limit > 0, "positive"),
        ):
            if not fine:
                flag = name.replace("_", "-")
                raise UserError(f"--{flag} must be {wanted}, got {getattr(self, name)}.")
        recipes(self.operators)
        steps, dampings = sorted(self.steps), sorted(self.dampings, reverse=True)
        return replace(self, steps=tuple(steps), dampings=tuple(dampings))


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
    stored, names = None, [item.name for item in fields(Comparison)]
    values: dict[str, Any] = {}
    if options.config is not None:
        tree = read_config(options.config, "--config")
        if isinstance(tree, dict) and "experiment" in tree:  # of a comparison
            stored = from_json(tree.pop("experiment"), str(options.config))
            values, options.config = tree, None
            named = tree.get("operators")
            named = [n for n in named if isinstance(n, str)] if isinstance(named, list) else []
            if options.operators is None and any(map(is_own, named)):
                refuse_own_code(["--operators", *named])
    values |= {n: v for n in names if (v := getattr(options, n, None)) is not None}
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    if unknown := set(values) - set(names):
        raise UserError(f"--config must have the settings of a comparison, got {sorted(unknown)}.")
    if len(options.optimizers or "1") > 1:
        raise UserError(f"--optimizers must be one, which trains, got {options.optimizers}.")
    job = Comparison(Experiment(), **values).checked()
    if job.runs:
        if options.steps is not None:
            raise UserError("--steps has no effect with --runs, which is at all checkpoints.")
        if stored is not None and options.optimizers is None:
            options.optimizers = list(stored.labels)
        trainings = [training for run in job.runs for training in _of_run(parser, options, run)]
        if len(known := {training.trainer.describe() for training in trainings}) > 1:
            raise UserError(f"--runs must be of one problem and network, got {sorted(known)}.")
        return replace(job, experiment=trainings[0].trainer.experiment), trainings
    if stored is None and options.config is None and options.preset is None:
        options.optimizers = options.optimizers or ["kfac_star"]
        options.seeds = options.seeds or [1, 2, 3]
    experiment = experiment_of(parser, options, stored)
    label = next(iter(experiment.labels))
    experiment = replace(experiment, steps=max(job.steps) or 1, seconds=None)  # for time windows
    experiment, device = experiment.only(label), set_up_device(experiment)
    trainers = [Trainer(experiment, label, seed, device) for seed in experiment.seeds]
    trainings = [Training(f"seed{t.seed}", t, dict.fromkeys(job.steps)) for t in trainers]
    return replace(job, experiment=experiment), trainings


def _of_run(parser: Parser, options: argparse.Namespace, run: str) -> Iterator[Training]:
    """Yield the trainings of a run of train.py by one of its optimizers, the first by default."""
    folder, options = Path(run), argparse.Namespace(**vars(options))
    stored = from_json(read_config(folder / CONFIG, "--runs"), str(folder / CONFIG))
    found = [label for label in stored.labels if any((folder / label).glob(f"seed*/{CURRENT}"))]
    label = next(iter(found), "any optimizer")
    if options.optimizers is not None:
        label = next(iter(Experiment(optimizers=tuple(options.optimizers)).labels))
        name = stored.labels.get(label, "")
        if name and not is_own(name):  # whoever names a file of their own lets it be run
            options.optimizers = [f"{label}={name}"]
    if label not in found:
        has = ", ".join(found) or "none"
        raise UserError(f"--runs: {folder} has no checkpoint of {label}. It has some of: {has}.")
    experiment = experiment_of(parser, options, stored).only(label)
    device = set_up_device(experiment)
    for seed in experiment.seeds:
        place, states = folder / label / f"seed{seed}", {0: None}
        trainer = Trainer(experiment, label, seed, device)
        for path in (place / PREVIOUS, place / CURRENT):
            with suppress(OSError):
                checkpoint = read_checkpoint(path)
                check_identity(path, checkpoint["identity"], experiment.identity(label, seed))
                states[int(checkpoint["state"]["step"])] = checkpoint["state"]
        yield Training(str(place), trainer, states)
