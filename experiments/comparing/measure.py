"""All that is measured at one point of a training, operator by operator."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from experiments.comparing.continuation import continued_loss
from experiments.comparing.exact import Exact, Limits
from experiments.comparing.inverses import InverseComparison, compare_inverses
from experiments.comparing.matrices import MatrixComparison, compare_matrices, cosine
from experiments.comparing.operators import OPERATORS
from experiments.comparing.points import Point
from experiments.comparing.settings import Settings
from experiments.training.errors import first_line
from pinncurv.linops import PyTorchLinearOperator
from pinncurv.optim import ConstantDamping, DampingRule, LevenbergMarquardt

# Seconds after which nothing is computed again only to time it better.
_LONG = 1.0

# What says that one approximation cannot be built, inverted or compared; others may.
_FAILURES = (ArithmeticError, ValueError, RuntimeError, MemoryError)

_RULES: dict[str, Callable[[], DampingRule]] = {
    "constant": ConstantDamping,
    "levenberg-marquardt": LevenbergMarquardt,
}

T = TypeVar("T")


@dataclass(frozen=True)
class DampedResult:
    """What was measured for one damping.

    Args:
        damping: λ.
        inverse: How good the inverse is.
        seconds: To invert and to compute one step; NaN where a factorization was reused.
        continued_loss: The loss after some further steps with this inverse; NaN if not asked for,
            infinite if they failed.
        step_cosines: The cosines with the steps of the approximations before, by name.
        note: What went wrong.
        failed: Whether there is no result.
    """

    damping: float
    inverse: InverseComparison
    seconds: float = math.nan
    continued_loss: float = math.nan
    step_cosines: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    failed: bool = False


@dataclass(frozen=True)
class OperatorResult:
    """All about one approximation at one point.

    Args:
        trajectory: Which training.
        step: The training step.
        operator: The name of the approximation.
        loss: The loss there.
        rmse: The root mean square error there.
        mass: The share of each pair of layers in the exact matrix.
        matrices: What does not depend on a damping; None if it could not be built, or if the
            inverse alone is the approximation.
        cosines: The cosines with the matrices of the approximations before, by name.
        build_seconds: To build the operator from linearizations.
        damped: One result per damping.
    """

    trajectory: str
    step: int
    operator: str
    loss: float
    rmse: float
    mass: Float[Tensor, "L L"]
    matrices: MatrixComparison | None = None
    cosines: Mapping[str, float] = field(default_factory=dict)
    build_seconds: float = math.nan
    damped: tuple[DampedResult, ...] = ()


class Clock:
    """Measures medians of seconds.

    Args:
        repeats: How often to time what is short.
        device: Whose work is to be waited for.
    """

    def __init__(self, repeats: int, device: torch.device) -> None:
        self.repeats = repeats
        self.device = device

    def time(self, prepare: Callable[[], Callable[[], T]]) -> tuple[T, float]:
        """Return a result and the median of the seconds that it took.

        Args:
            prepare: Makes fresh material, which takes no part, and returns the work on it.
        """
        seconds: list[float] = []
        begin = self._now()
        while not seconds or (len(seconds) < self.repeats and self._now() - begin < _LONG):
            work = prepare()
            start = self._now()
            result = work()
            seconds.append(self._now() - start)
        return result, statistics.median(seconds)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


class _Approximation:
    """One approximation at one point.

    Args:
        name: Which approximation.
        exact: The exact matrix.
        settings: The resolved settings.
        clock: Times it.

    Attributes:
        operator: The operator.
        build_seconds: How long it took to build it.
        steps: Its steps by damping, as far as they were computed.
    """

    def __init__(self, name: str, exact: Exact, settings: Settings, clock: Clock) -> None:
        self.name, self.entry = name, OPERATORS[name]
        self.exact, self.settings, self.clock = exact, settings, clock
        self.operator, self.build_seconds = clock.time(lambda: self._build)
        self.steps: dict[float, Tensor] = {}
        self._is_used = self._is_slow = False

    def _build(self) -> PyTorchLinearOperator:
        return self.entry.curvature(self.exact.linearized.linearizations)

    def matrices(self) -> MatrixComparison | None:
        """Compare the matrix."""
        if not self.entry.is_matrix:
            return None
        return compare_matrices(self.operator, self.exact, self.settings.lanczos_steps)

    def cosines(self, others: Sequence[_Approximation]) -> dict[str, float]:
        """Compare the matrix with those of others."""
        if not self.entry.is_matrix:
            return {}
        cosines = {}
        for other in others:
            if other.entry.is_matrix:
                try:
                    cosines[other.name] = cosine(self.operator, other.operator, self.exact)
                except _FAILURES as error:
                    note = f"cosine with {other.name} failed: {first_line(error)}"
                    warnings.warn(note, stacklevel=1)
        return cosines

    def step_cosines(self, damping: float, others: Sequence[_Approximation]) -> dict[str, float]:
        """Compare the step with those of others."""
        step = self.steps[damping].double()
        return {
            other.name: torch.cosine_similarity(step, other.steps[damping].double(), 0).item()
            for other in others
            if damping in other.steps
        }

    def damped(self, damping: float) -> DampedResult:
        """Compare the inverse, and time it together with one step."""
        recipe = self.entry.inverse(damping)

        def prepare() -> Callable[[], PyTorchLinearOperator]:
            # Operators keep their factorizations, so that only a fresh one says what they cost.
            operator = self._build() if self._is_used and not self._is_slow else self.operator
            self._is_used = True

            def work() -> PyTorchLinearOperator:
                inverse = recipe(operator)
                self.steps[damping] = self.exact.direction(inverse)
                return inverse

            return work

        was_slow = self._is_slow
        inverse, seconds = self.clock.time(prepare)
        self._is_slow = self._is_slow or self.build_seconds + seconds > _LONG
        comparison = compare_inverses(
            self.steps[damping],
            inverse,
            self.entry,
            damping,
            self.exact,
            lanczos_steps=self.settings.lanczos_steps,
            cg_tolerance=self.settings.cg_tolerance,
            cg_limit=self.settings.cg_limit,
        )
        return DampedResult(
            damping, comparison, math.nan if was_slow else seconds, self._continued_loss(damping)
        )

    def _continued_loss(self, damping: float) -> float:
        """Train on with it."""
        steps, rule = self.settings.continued_steps, _RULES[self.settings.continued_rule]()
        if not steps:
            return math.nan
        try:
            return continued_loss(self.exact.objective, self.entry, damping, steps, rule)
        except _FAILURES as error:
            warnings.warn(f"further training failed: {first_line(error)}", stacklevel=1)
            return math.inf


def measure(point: Point, settings: Settings) -> Iterator[OperatorResult]:
    """Yield the results of every operator at one point.

    Args:
        point: The point.
        settings: The resolved settings.
    """
    trainer = point.trainer
    metrics = trainer.measure(None)
    exact = Exact(trainer.objective, Limits.of(settings))
    clock = Clock(settings.repeats, trainer.device)
    done: list[_Approximation] = []
    for name in settings.operators:
        result = OperatorResult(
            trajectory=point.trajectory,
            step=point.step,
            operator=name,
            loss=float(metrics["loss"]),
            rmse=float(metrics["rmse"]),
            mass=exact.mass,
        )
        yield _completed(result, exact, settings, clock, done)


def _completed(
    result: OperatorResult,
    exact: Exact,
    settings: Settings,
    clock: Clock,
    done: list[_Approximation],
) -> OperatorResult:
    """Compare one approximation with the exact matrix and with those before, and add it to them.

    What goes wrong becomes a note.
    """
    note, approximation = "", None
    with _Notes() as notes:
        try:
            approximation = _Approximation(result.operator, exact, settings, clock)
            # one after the other, to keep what comes before a failure
            result = replace(result, build_seconds=approximation.build_seconds)
            result = replace(result, matrices=approximation.matrices())
            result = replace(result, cosines=approximation.cosines(done))
        except _FAILURES as error:
            note, approximation = f"{type(error).__name__}: {first_line(error)}", None
    note = note or notes.text
    if approximation is None:
        missing = InverseComparison()
        damped = [DampedResult(d, missing, note=note, failed=True) for d in settings.dampings]
    else:
        damped = [_damped(approximation, d, done, note) for d in settings.dampings]
        if settings.pairs:
            done.append(approximation)
    return replace(result, damped=tuple(damped))


def _damped(
    approximation: _Approximation, damping: float, others: Sequence[_Approximation], note: str
) -> DampedResult:
    """Compare an inverse; what goes wrong becomes a note."""
    with _Notes() as notes:
        try:
            result = approximation.damped(damping)
            cosines = approximation.step_cosines(damping, others)
        except _FAILURES as error:
            failure = f"{type(error).__name__}: {first_line(error)}"
            return DampedResult(damping, InverseComparison(), note=failure, failed=True)
    notes_of_both = "; ".join(filter(None, (note, notes.text)))
    return replace(result, step_cosines=cosines, note=notes_of_both)


class _Notes:
    """Collects the library's warnings for the table instead of printing them."""

    def __init__(self) -> None:
        self._catching = warnings.catch_warnings(record=True)
        self._caught: list[warnings.WarningMessage] = []

    def __enter__(self) -> _Notes:
        self._caught = self._catching.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *_: object) -> None:
        self._catching.__exit__(None, None, None)

    @property
    def text(self) -> str:
        """The different warnings, each once."""
        return "; ".join(dict.fromkeys(first_line(w.message) for w in self._caught))
