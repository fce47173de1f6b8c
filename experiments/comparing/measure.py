"""All that is measured at one point of a training, operator by operator."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from jaxtyping import Float
from torch import Tensor

from experiments.comparing.exact import Exact, Limits
from experiments.comparing.inverses import InverseComparison, compare_inverses
from experiments.comparing.matrices import MatrixComparison, compare_matrices
from experiments.comparing.operators import OPERATORS, Entry
from experiments.comparing.points import Point
from experiments.comparing.settings import Settings
from experiments.training.errors import first_line

# Seconds after which nothing is computed again only to time it better.
_LONG = 1.0

# What says that one approximation cannot be built, inverted or compared; others may.
_FAILURES = (ArithmeticError, ValueError, RuntimeError, MemoryError)

T = TypeVar("T")


@dataclass(frozen=True)
class DampedResult:
    """What was measured for one damping.

    Args:
        damping: λ.
        inverse: How good the inverse is.
        seconds: To invert and to compute one step; NaN where a factorization was reused.
        note: What went wrong.
        failed: Whether there is no result.
    """

    damping: float
    inverse: InverseComparison
    seconds: float = math.nan
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
        matrices: What does not depend on a damping; None if it could not be built.
        build_seconds: To build the operator from linearizations.
        damped: One result per damping.
    """

    trajectory: str
    step: int
    operator: str
    loss: float
    rmse: float
    mass: Float[Tensor, "L L"]
    matrices: MatrixComparison | None
    build_seconds: float
    damped: tuple[DampedResult, ...]


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
        entry: How to build and to invert it.
        exact: The exact matrix.
        settings: The resolved settings.
        clock: Times it.
    """

    def __init__(self, entry: Entry, exact: Exact, settings: Settings, clock: Clock) -> None:
        self.entry, self.exact, self.settings, self.clock = entry, exact, settings, clock
        self.operator, self.build_seconds = clock.time(lambda: self._build)
        self._is_used = self._is_slow = False

    def _build(self) -> PyTorchLinearOperator:
        return self.entry.curvature(self.exact.linearized.linearizations)

    def matrices(self) -> MatrixComparison:
        """Compare the matrix."""
        return compare_matrices(self.operator, self.exact, self.settings.lanczos_steps)

    def damped(self, damping: float) -> DampedResult:
        """Compare the inverse, and time it together with one step."""
        recipe = self.entry.inverse(damping)

        def prepare() -> Callable[[], PyTorchLinearOperator]:
            # Operators keep their factorizations, so that only a fresh one says what they cost.
            operator = self._build() if self._is_used and not self._is_slow else self.operator
            self._is_used = True

            def work() -> PyTorchLinearOperator:
                inverse = recipe(operator)
                self.exact.direction(inverse)
                return inverse

            return work

        was_slow = self._is_slow
        inverse, seconds = self.clock.time(prepare)
        self._is_slow = self._is_slow or self.build_seconds + seconds > _LONG
        comparison = compare_inverses(
            inverse,
            self.entry.definite,
            damping,
            self.exact,
            lanczos_steps=self.settings.lanczos_steps,
            cg_tolerance=self.settings.cg_tolerance,
            cg_limit=self.settings.cg_limit,
        )
        return DampedResult(damping, comparison, math.nan if was_slow else seconds)


def measure(point: Point, settings: Settings) -> Iterator[OperatorResult]:
    """Yield the results of every operator at one point.

    Args:
        point: The point.
        settings: The resolved settings.
    """
    trainer = point.trainer
    metrics = trainer.measure(None)
    exact = Exact(trainer.objective.linearize(), Limits.of(settings))
    clock = Clock(settings.repeats, trainer.device)
    for name in settings.operators:
        matrices, build_seconds, note = None, math.nan, ""
        damped: list[DampedResult] = []
        with _Notes() as notes:
            try:
                approximation = _Approximation(OPERATORS[name], exact, settings, clock)
                build_seconds = approximation.build_seconds
                matrices = approximation.matrices()
            except _FAILURES as error:
                note = f"{type(error).__name__}: {first_line(error)}"
        note = note or notes.text
        for damping in settings.dampings:
            damped.append(
                DampedResult(damping, InverseComparison(), note=note, failed=True)
                if matrices is None
                else _damped(approximation, damping, note)
            )
        yield OperatorResult(
            trajectory=point.trajectory,
            step=point.step,
            operator=name,
            loss=float(metrics["loss"]),
            rmse=float(metrics["rmse"]),
            mass=exact.mass,
            matrices=matrices,
            build_seconds=build_seconds,
            damped=tuple(damped),
        )


def _damped(approximation: _Approximation, damping: float, note: str) -> DampedResult:
    """Compare an inverse; what goes wrong becomes a note."""
    with _Notes() as notes:
        try:
            result = approximation.damped(damping)
        except _FAILURES as error:
            failure = f"{type(error).__name__}: {first_line(error)}"
            return DampedResult(damping, InverseComparison(), note=failure, failed=True)
    return replace(result, note="; ".join(filter(None, (note, notes.text))))


class _Notes(warnings.catch_warnings):
    """Collects the library's warnings for the table instead of printing them."""

    def __init__(self) -> None:
        super().__init__(record=True)
        self._caught: list[warnings.WarningMessage] = []

    def __enter__(self) -> _Notes:
        self._caught = super().__enter__() or []
        warnings.simplefilter("always")
        return self

    @property
    def text(self) -> str:
        """The different warnings, each once."""
        return "; ".join(dict.fromkeys(first_line(w.message) for w in self._caught))
