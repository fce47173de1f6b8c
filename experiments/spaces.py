"""Search spaces as data: what ``sweep.py`` varies, and within which bounds."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from experiments import catalog
from experiments.experiment import Experiment
from experiments.objects import UserError, hints_of, near_misses, resolve

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Float:
    """Numbers between two bounds, both included.

    Args:
        low: The smallest.
        high: The largest.
        log: Whether all orders of magnitude are as likely, instead of all numbers.
    """

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        if not (self.low < self.high and math.isfinite(self.low) and math.isfinite(self.high)):
            raise UserError(f"bounds must be finite, LOW below HIGH, got {self}.")
        if self.log and self.low <= 0:
            raise UserError(f"with :log, LOW must be positive, got {self}.")

    def __str__(self) -> str:
        return f"{self.low!r}:{self.high!r}" + ":log" * self.log

    def suggest(self, trial: optuna.Trial, name: str) -> str:
        """Draw a value, as text for ``--set``; for a trial that has one, return that."""
        return repr(trial.suggest_float(name, self.low, self.high, log=self.log))

    def ends(self) -> tuple[str, ...]:
        """Return values that must be possible for all to be."""
        return repr(self.low), repr(self.high)


@dataclass(frozen=True)
class Int(Float):
    """The same for whole numbers."""

    low: int
    high: int

    def suggest(self, trial: optuna.Trial, name: str) -> str:
        return repr(trial.suggest_int(name, self.low, self.high, log=self.log))


@dataclass(frozen=True)
class Choice:
    """One of several values, as text for ``--set``.

    Args:
        options: The values.
    """

    options: tuple[str, ...]

    def __str__(self) -> str:
        return ",".join(self.options)

    def suggest(self, trial: optuna.Trial, name: str) -> str:
        return str(trial.suggest_categorical(name, self.options))

    def ends(self) -> tuple[str, ...]:
        return self.options


Space = Mapping[str, Float | Choice]

_DAMPING = Float(1e-15, 1e-2, log=True)
_LR = Float(1e-6, 1e-1, log=True)
_AVERAGE: dict[str, Float | Choice] = {
    "decay": Float(0.0, 0.99),
    "start": Choice(("from_zero", "from_identity")),
}

# By the name of an optimizer, what is varied unless --space says otherwise; others are for --space
# alone. `damping` is an argument of the optimizer, `problem.n_interior` one of the problem. Bounds
# of damping and of the average (decay) are those of arXiv 2405.15603.
SPACES: dict[str, dict[str, Float | Choice]] = {
    "kfac_star": {"damping": _DAMPING, **_AVERAGE},
    "kfac": {"damping": _DAMPING, **_AVERAGE, "momentum": Float(0.0, 0.99)},
    "ekfac": {"damping": _DAMPING},
    "engd": {"damping": _DAMPING, **_AVERAGE},
    "engd_per_layer": {"damping": _DAMPING, **_AVERAGE},
    "engd_diagonal": {"damping": _DAMPING, **_AVERAGE},
    "gauss_newton": {"damping": _DAMPING},
    "levenberg_marquardt": {"damping": Float(1e-8, 1e2, log=True)},
    "subspace_gauss_newton": {"damping": _DAMPING, "points": Int(50, 1000, log=True)},
    "gauss_newton_cg": {"damping": _DAMPING, "max_iterations": Int(5, 500, log=True)},
    "hessian_free": {
        "damping": Float(1e-15, 1e2, log=True),
        "decay": Float(0.0, 0.99),
        "max_iterations": Int(5, 500, log=True),
    },
    "engd_w": {"damping": _DAMPING},
    "spring": {"damping": _DAMPING, "momentum": Float(0.0, 0.999)},
    "adam": {"lr": _LR},
    "nadam": {"lr": _LR},
    "adamw": {"lr": _LR, "weight_decay": Float(1e-8, 1e-1, log=True)},
    "sgd": {"lr": _LR, "momentum": Float(0.0, 0.99)},
    "lbfgs": {"lr": Float(1e-2, 1.0, log=True), "history_size": Int(5, 500, log=True)},
    "points": {
        "problem.n_interior": Int(100, 10_000, log=True),
        "problem.n_boundary": Int(50, 5_000, log=True),
    },
    "resampling": {"resample_every": Int(1, 10_000, log=True)},
}


def parse(text: str, real: bool = False) -> Float | Choice:
    """Read ``LOW:HIGH``, ``LOW:HIGH:log`` or ``A,B,...``.

    Args:
        text: The text.
        real: Whether bounds without a decimal point are for real numbers all the same.
    """
    if bounds := re.fullmatch(r"([^:,(]+):([^:,(]+)(:log)?", text):
        low, high, log = bounds.groups()
        if not real:
            with suppress(ValueError):
                return Int(int(low), int(high), bool(log))
        with suppress(ValueError):
            return Float(float(low), float(high), bool(log))
    options = [part.strip() for part in re.split(r",(?![^(\[]*[)\]])", text)]  # (8,),(8,8) are two
    if bounds or len(options) < 2 or len({*options, ""}) <= len(options):
        raise UserError(f"a range must be LOW:HIGH, LOW:HIGH:log or A,B,..., got {text!r}.")
    return Choice(tuple(options))


def space_of(experiment: Experiment, words: Sequence[str], fixed: Iterable[str]) -> Space:
    """Return what is varied, by the names that settings have.

    Args:
        experiment: The checked experiment, with one optimizer.
        words: Names of ``SPACES`` and ``TARGET.ARGUMENT=RANGE``; without any, the optimizer's own.
        fixed: What ``--set`` gives; spaces by name leave it out.

    Raises:
        UserError: If there is no such space or argument, or a range does not suit it.
    """
    ((label, name),) = experiment.labels.items()
    space: dict[str, Float | Choice] = {}
    fixed = {_key(experiment, key) for key in fixed}
    for word in words or (name.replace("-", "_"),):
        key, explicit, text = word.partition("=")
        if not explicit and key not in SPACES:
            near = near_misses(key, SPACES) or f" There are {', '.join(SPACES)}."
            raise UserError(
                f"--space: there is no space {key!r}.{near} Or declare one: "
                f"--space {label}.ARGUMENT=LOW:HIGH:log."
            )
        if not explicit:
            named = {k if "." in k else f"{label}.{k}": r for k, r in SPACES[key].items()}
            space |= {k: r for k, r in named.items() if k not in fixed}
            continue
        key = _key(experiment, key)
        if key in fixed:
            raise UserError(f"{key} is fixed by --set and varied by --space; drop one.")
        try:
            space[key] = parse(text, _is_real(experiment, key))
        except UserError as error:
            raise UserError(f"--space {key}: {error}") from None
    if not space:
        raise UserError(f"--set leaves nothing to vary: it fixes {', '.join(sorted(fixed))}.")
    return space


def _key(experiment: Experiment, key: str) -> str:
    """Return the one name that a setting has."""
    try:
        return next(iter(dataclasses.replace(experiment, settings={key: ""}).checked().settings))
    except UserError as error:
        raise UserError(str(error).replace("--set", "--space", 1)) from None


def _is_real(experiment: Experiment, key: str) -> bool:
    """Whether an argument takes real numbers, so that 0:1 is not just 0 and 1."""
    target, _, argument = key.partition(".")
    found = {
        "problem": (experiment.problem, catalog.PROBLEMS, "problem"),
        "network": (experiment.network, catalog.NETWORKS, "network"),
    }.get(target) or (experiment.labels[target], catalog.OPTIMIZERS, "optimizer")
    hint = hints_of(resolve(*found)).get(argument)
    return hint is float or float in get_args(hint)
