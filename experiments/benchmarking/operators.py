"""Time and memory of curvature operators and their inverses.

The problem is Poisson's equation in two dimensions with 900 + 120 points, linearized beforehand.
"Build" makes the operator, "solve" its inverse and one product with that. Every number is the
median over repetitions; memory is the peak above what is held once the loss is linearized, so freed
memory that is used again does not count.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from experiments.benchmarking.clock import megabytes, peak_megabytes, reset_peak, seconds
from experiments.benchmarking.sizes import SIZES, build_network
from pinncurv.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    InSubspace,
    LinearizedObjective,
    MatrixFreeGaussNewton,
    Nystroem,
    Objective,
    OptimalKronecker,
    PartialTraces,
    PreconditionedCG,
    Recipe,
    SubspaceGaussNewton,
    Woodbury,
    reduce,
)
from pinncurv.linops import Damped, FactorDamping

DAMPING = 1e-6
# Repetitions go on until one of the two is reached.
REPETITIONS, SECONDS = 9, 20.0


@dataclass(frozen=True)
class Method:
    """What builds the operator, what inverts it, and for which networks."""

    curvature: Recipe
    inverse: Callable[[Any], Any]
    sizes: tuple[str, ...] = ("s", "m", "b", "tiny")


EXACT = MatrixFreeGaussNewton()
ITERATIONS = PreconditionedCG(DAMPING, tolerance=0.0, max_iterations=10, stop=None)
METHODS = {
    "KFAC-expand, factor damping": Method(KFAC(), FactorDamping(DAMPING)),
    "KFAC-reduce, factor damping": Method(KFAC(reduce), FactorDamping(DAMPING)),
    "EKFAC": Method(EKFAC(), Damped(DAMPING)),
    "EKFAC, partial traces": Method(EKFAC(basis=PartialTraces()), Damped(DAMPING)),
    "best Kronecker product": Method(OptimalKronecker(), Damped(DAMPING)),
    "diagonal": Method(DiagonalGaussNewton(), Damped(DAMPING)),
    "per-layer blocks": Method(BlockDiagonalGaussNewton(), Damped(DAMPING), ("s", "m", "tiny")),
    "Gauss-Newton, dense": Method(GaussNewton(), Damped(DAMPING), ("s", "tiny")),
    "Gauss-Newton, kernel": Method(EXACT, Woodbury(DAMPING)),
    "Gauss-Newton, sketch of rank 100": Method(EXACT, Nystroem(DAMPING, 100)),
    "Gauss-Newton, 10 iterations of CG": Method(EXACT, ITERATIONS),
    "Gauss-Newton in a subspace of 100": Method(SubspaceGaussNewton(100), InSubspace(DAMPING)),
}


def linearize(size: str, device: str) -> LinearizedObjective:
    """Return the linearized loss of one network."""
    chosen = SIZES[size]
    problem, batch = chosen.sample(device)
    return Objective(build_network(chosen.widths).to(device), problem.terms, batch).linearize()


def measure(name: str, size: str, device: str) -> dict[str, float]:
    """Return the seconds and megabytes of one method at one size."""
    warnings.simplefilter("ignore")  # conjugate gradients and the best product stop early
    method, linearized = METHODS[name], linearize(size, device)
    gradient = linearized.gradient()
    reset_peak(device)
    before, start = megabytes(device), time.perf_counter()
    times: list[tuple[float, float]] = []
    while len(times) < REPETITIONS and time.perf_counter() - start < SECONDS:
        times.append(_once(method, linearized, gradient, device))
    build, solve = map(statistics.median, zip(*times, strict=True))
    return {"build": build, "solve": solve, "megabytes": peak_megabytes(device) - before}


def _once(
    method: Method, linearized: LinearizedObjective, gradient: list[Tensor], device: str
) -> tuple[float, float]:
    """Return the seconds to build and to solve."""
    made: list[Any] = []
    build = seconds(lambda: made.append(method.curvature(linearized)), device)
    return build, seconds(lambda: method.inverse(made[0]) @ gradient, device)
