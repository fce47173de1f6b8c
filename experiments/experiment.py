"""An experiment as data: problem, network, optimizers with settings, budget, seeds."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

import torch
import typeguard
from torch import nn

from experiments import catalog
from experiments.objects import (
    UserError,
    arguments,
    bind,
    digest,
    evaluate,
    is_own,
    near_misses,
    resolve,
    short,
    told,
)
from pinncurv.problems import Problem, Windows

DTYPES = {"float64": torch.float64, "float32": torch.float32}

# Of the run that the README's first command makes: three optimizers in about a minute.
DEFAULT_SECONDS = 16.0

# More threads than cores are of no use, but a run may come from a larger machine.
_MOST_THREADS = max(os.cpu_count() or 1, 256)

# Fields that a setting may change for one optimizer alone.
OF_ONE = ("seconds", "steps", "resample_every", "chunk_size", "compile")

# What a function of the user's own may ask for by these names.
_OF_NETWORKS = ("d_in", "d_out")


@dataclass(frozen=True)
class Experiment:
    """All that defines a run.

    Args:
        problem: A name of ``catalog.PROBLEMS`` or FILE.py:NAME, a ``Problem`` or a function that
            returns one.
        network: A name of ``catalog.NETWORKS`` or FILE.py:NAME, a function of ``d_in`` and
            ``d_out``, where it has such arguments, that returns a network.
        optimizers: Names of ``catalog.OPTIMIZERS`` or FILE.py:NAME, functions of the parameters.
            ``LABEL=NAME`` gives one a name of its own, so that it can be run with several settings.
        settings: Values by ``TARGET.ARGUMENT``, the target being ``problem``, ``network`` or the
            label of an optimizer. ``LABEL.problem.ARGUMENT`` is for this optimizer alone, and so is
            ``LABEL.FIELD`` for the fields of a run in ``OF_ONE``.
        seconds: Budget of each optimizer in seconds of its steps alone.
        steps: The same in steps; whichever is spent first ends the training.
        seeds: One training for each: s initializes the network, s − 1 draws the points.
        resample_every: Steps after which new points are drawn; 0 for one fixed batch.
        candidates: Points that are drawn for each one of the first term, which is kept by its
            residual, see ``pinncurv.problems.ResidualBased``; 1 for keeping all.
        windows: Times at which time windows begin and end, each with a network of its own that is
            trained for an equal share of the budget, see ``pinncurv.problems.Windows``; none for
            one network. The problem is a function of ``start``, ``end`` and ``initial``.
        dtype: ``float64`` or ``float32``.
        device: Where to compute: cpu, cuda, ...
        threads: Number of CPU threads; None for torch's default.
        chunk_size: How many points to process at a time; None for all, "auto" for what fits into
            the memory.
        compile: Whether passes are compiled, outside of the budget.
        record_every: Steps between two rows of the metrics; 0 for at most 32 per doubling.
        checkpoint_seconds: Seconds between two checkpoints.
        checkpoint_steps: Steps between two checkpoints; None for by time only.
    """

    problem: str = "poisson2d"
    network: str = "mlp"
    optimizers: tuple[str, ...] = ("kfac_star", "gauss_newton", "adam")
    settings: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None
    steps: int | None = None
    seeds: tuple[int, ...] = (1,)
    resample_every: int = 0
    candidates: int = 1
    windows: tuple[float, ...] = ()
    dtype: str = "float64"
    device: str = "cpu"
    threads: int | None = None
    chunk_size: int | Literal["auto"] | None = None
    compile: bool = False
    record_every: int = 0
    checkpoint_seconds: float = 30.0
    checkpoint_steps: int | None = None

    # --- names ---------------------------------------------------------------------------------

    @property
    def labels(self) -> dict[str, str]:
        """The names of the optimizers by their labels."""
        pairs = [text.partition("=") for text in self.optimizers]
        return {(label if sep else short(label)): (name or label) for label, sep, name in pairs}

    def _targets(self) -> dict[str, str]:
        """Return what settings may be about, by all its names."""
        own = {short(self.problem): "problem", short(self.network): "network"}
        labels = {label: label for label in self.labels}
        return {"problem": "problem", "network": "network", **own, **labels}

    def of(self, target: str) -> dict[str, str]:
        """Return the settings of a target, by argument."""
        found = {key.partition(".")[::2]: text for key, text in self.settings.items()}
        return {argument: text for (name, argument), text in found.items() if name == target}

    # --- checks --------------------------------------------------------------------------------

    def checked(self) -> Experiment:
        """Check everything that can be checked without building, and fill in what is left open.

        Raises:
            UserError: If something is wrong; names the field and what is allowed.
        """
        self.check_types()
        for name in get_type_hints(Experiment):
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and not math.isfinite(number):
                    raise UserError(f"{_flag(name)} must be finite, got {number}.")
                if isinstance(number, int) and abs(number) >= 2**63:
                    raise UserError(f"{_flag(name)} must be of 64 bits, got {number}.")
        for name in (
            "seconds",
            "steps",
            "threads",
            "chunk_size",
            "candidates",
            "checkpoint_seconds",
            "checkpoint_steps",
        ):
            if (value := getattr(self, name)) not in (None, "auto") and value <= 0:
                raise UserError(f"{_flag(name)} must be positive, got {value}.")
        for name in ("resample_every", "record_every"):
            if getattr(self, name) < 0:
                raise UserError(f"{_flag(name)} must be 0 or more, got {getattr(self, name)}.")
        if self.windows:
            try:
                Windows(self.windows)
            except ValueError as error:
                raise UserError(f"--windows: {error}") from None
        if self.threads is not None and self.threads > _MOST_THREADS:
            raise UserError(f"--threads must be at most {_MOST_THREADS}, got {self.threads}.")
        if self.dtype not in DTYPES:
            raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype}.")
        if not self.seeds or min(self.seeds) < 1 or len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"--seeds must be different numbers from 1 on, got {list(self.seeds)}.")
        return self._with_checked_names()

    def check_types(self) -> None:
        """Check the types of all fields.

        Raises:
            UserError: If one is of another type; names the field.
        """
        every = typeguard.CollectionCheckStrategy.ALL_ITEMS
        for name, hint in get_type_hints(Experiment).items():
            value = getattr(self, name)
            try:
                typeguard.check_type(value, hint, collection_check_strategy=every)
            except typeguard.TypeCheckError:
                wanted = inspect.formatannotation(hint)
                raise UserError(f"{_flag(name)} must be {wanted}, got {value!r}.") from None

    def _with_checked_names(self) -> Experiment:
        names = list(self.labels)
        if not names or len(names) < len(self.optimizers):
            raise UserError(
                f"--optimizers must be one or more different names, got {list(self.optimizers)}. "
                "LABEL=NAME gives one a name of its own."
            )
        for label in names:
            if not label.isidentifier() or label in ("problem", "network"):
                raise UserError(f"The label of an optimizer must be a plain name, got {label!r}.")
        targets = self._targets()
        settings: dict[str, str] = {}
        for key, text in self.settings.items():
            target, _, argument = key.partition(".")
            target = target.replace("-", "_")
            if target not in targets or not argument:
                known = [name for name in targets if name not in ("mlp",)]
                raise UserError(
                    f"--set {key} has no effect: it must be TARGET.ARGUMENT=VALUE with the target "
                    f"one of {', '.join(known)}.{near_misses(target, targets)}"
                )
            settings[f"{targets[target]}.{argument.replace('-', '_')}"] = text
        neither = self.seconds is None and self.steps is None
        seconds = DEFAULT_SECONDS if neither else self.seconds
        threads = torch.get_num_threads() if self.threads is None else self.threads
        return dataclasses.replace(self, settings=settings, seconds=seconds, threads=threads)

    def only(self, label: str) -> Experiment:
        """Return the experiment of one optimizer alone, with what is set for it alone."""
        known = arguments(resolve(self.labels[label], catalog.OPTIMIZERS, "optimizer"))
        settings = {
            k: v for k, v in self.settings.items() if k.partition(".")[0] in ("problem", "network")
        }
        fields: dict[str, Any] = {}
        for argument, text in self.of(label).items():
            if argument.startswith(("problem.", "network.")):
                settings[argument] = text
            elif argument in OF_ONE and argument not in known:
                fields[argument] = evaluate(text)
            else:
                settings[f"{label}.{argument}"] = text
        chosen = (f"{label}={self.labels[label]}",)
        return dataclasses.replace(self, optimizers=chosen, settings=settings, **fields).checked()

    # --- building ------------------------------------------------------------------------------

    def build_problem(self, **window: Any) -> Problem:
        """Build the problem anew, so that what its terms train is trained by one optimizer only.

        Networks in residuals and coefficients get the experiment's type and device.

        Args:
            window: Start, end and initial values, with time windows.
        """
        found = resolve(self.problem, catalog.PROBLEMS, "problem")
        problem, settings = found, self.of("problem")
        if missing := window.keys() - arguments(found):
            raise UserError(
                f"--windows needs a problem that is a function of {', '.join(window)}, got "
                f"{self.problem} without {', '.join(sorted(missing))}."
            )
        if not isinstance(found, Problem):
            values = bind(found, settings, short(self.problem), window)
            problem = _call(found, {**values, **window}, self.problem)
        elif settings:
            raise UserError(
                f"{self.problem} is a Problem, which has no arguments to set; name a function that "
                "returns one."
            )
        if not isinstance(problem, Problem):
            raise UserError(
                f"{self.problem} must be or return a pinncurv.Problem, got "
                f"{type(problem).__name__}."
            )
        own = copy.deepcopy(problem)  # the function may return the same one every time
        for term in own.terms:
            for owner in (term, *term.operators.values()):
                for part in vars(owner).values():
                    if isinstance(part, nn.Module):
                        part.to(self.device, DTYPES[self.dtype])
        return own

    def build_network(self, problem: Problem, seed: int) -> nn.Module:
        """Build the network, drawn on the CPU in the experiment's type."""
        found = resolve(self.network, catalog.NETWORKS, "network")
        if isinstance(found, nn.Module):
            raise UserError(
                f"{self.network} is a network, of which every training would get the same. Name a "
                "class or a function that builds it."
            )
        given = {name: getattr(problem, name) for name in _OF_NETWORKS if name in arguments(found)}
        values = bind(found, self.of("network"), short(self.network), given)
        before = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            torch.set_default_dtype(DTYPES[self.dtype])
            try:
                network = _call(found, {**given, **values}, self.network)
            finally:
                torch.set_default_dtype(before)
        if not isinstance(network, nn.Module):
            raise UserError(
                f"{self.network} must return an nn.Module, got {type(network).__name__}."
            )
        # a copy, as the function may return the same one to every training
        return copy.deepcopy(network).to(self.device, DTYPES[self.dtype])

    def build_optimizer(self, label: str, parameters: Iterable[torch.Tensor]) -> Any:
        """Build the optimizer of a label; it has the methods step, state_dict, load_state_dict."""
        name = self.labels[label]
        found = resolve(name, catalog.OPTIMIZERS, "optimizer")
        first = next(iter(arguments(found)), None)
        values = bind(found, self.of(label), label, () if first is None else (first,))
        optimizer = catalog.stepped(_call(found, values, label, list(parameters)))
        if missing := [
            n for n in ("step", "state_dict", "load_state_dict") if not hasattr(optimizer, n)
        ]:
            raise UserError(
                f"{name} must return an optimizer, got {type(optimizer).__name__} without "
                f"{', '.join(missing)}."
            )
        return optimizer

    # --- identity ------------------------------------------------------------------------------

    def identity(self, label: str, seed: int) -> dict[str, Any]:
        """Return all that must agree for a checkpoint to be continued."""
        own = (self.problem, self.network, self.labels[label])
        return {
            "problem": self.problem,
            "network": self.network,
            "optimizer": self.labels[label],
            "settings": {t: self.of(t) for t in ("problem", "network")}
            | {"optimizer": self.of(label)},
            "dtype": self.dtype,
            "resample_every": self.resample_every,
            **({"candidates": self.candidates} if self.candidates > 1 else {}),
            **({"windows": list(self.windows)} if self.windows else {}),
            "seed": seed,
            "files": {name.rsplit(":", 1)[0]: digest(name) for name in own if is_own(name)},
        }


def from_json(tree: Any, where: str) -> Experiment:
    """Read an experiment from what a JSON file holds.

    Raises:
        UserError: If it is no experiment; names the field.
    """
    if not isinstance(tree, dict):
        raise UserError(f"{where} must hold a JSON object of settings, got {type(tree).__name__}.")
    known = {f.name for f in dataclasses.fields(Experiment)}
    for name in tree:
        if name not in known:
            raise UserError(f"{where} has an unknown field {name!r}.{near_misses(name, known)}")
    values: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
    experiment = Experiment(**values)
    experiment.check_types()  # before anything looks into it
    return experiment


def _call(function: Callable[..., Any], values: Mapping[str, Any], name: str, *first: Any) -> Any:
    try:
        return function(*first, **values)
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # of the user's own code it may be any
        raise UserError(f"{name}: {told(error)}") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
