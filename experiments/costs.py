"""Time and memory of curvature operators and their inverses, as a Markdown table.

The problem is Poisson's equation in two dimensions with 900 + 120 points, linearized beforehand.
"Build" makes the operator, "solve" its inverse and one product with that. Every cell is the median
over repetitions in a process of its own; memory is the peak of that process above what it holds
once the loss is linearized, so freed memory that is used again does not count (Linux only).

Run it with ``tox run -e costs``, or ``python -m experiments.costs --sizes s m``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from experiments.benchmark import DTYPE, SIZES, build_network, run_and_read
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
    sizes: str = "smb"


EXACT = MatrixFreeGaussNewton()
ITERATIONS = PreconditionedCG(DAMPING, tolerance=0.0, max_iterations=10, stop=None)
METHODS = {
    "KFAC-expand, factor damping": Method(KFAC(), FactorDamping(DAMPING)),
    "KFAC-reduce, factor damping": Method(KFAC(reduce), FactorDamping(DAMPING)),
    "EKFAC": Method(EKFAC(), Damped(DAMPING)),
    "EKFAC, partial traces": Method(EKFAC(basis=PartialTraces()), Damped(DAMPING)),
    "best Kronecker product": Method(OptimalKronecker(), Damped(DAMPING)),
    "diagonal": Method(DiagonalGaussNewton(), Damped(DAMPING)),
    "per-layer blocks": Method(BlockDiagonalGaussNewton(), Damped(DAMPING), "sm"),
    "Gauss-Newton, dense": Method(GaussNewton(), Damped(DAMPING), "s"),
    "Gauss-Newton, kernel": Method(EXACT, Woodbury(DAMPING)),
    "Gauss-Newton, sketch of rank 100": Method(EXACT, Nystroem(DAMPING, 100)),
    "Gauss-Newton, 10 iterations of CG": Method(EXACT, ITERATIONS),
    "Gauss-Newton in a subspace of 100": Method(SubspaceGaussNewton(100), InSubspace(DAMPING)),
}


def linearize(size: str) -> LinearizedObjective:
    """Return the linearized loss of one network."""
    chosen = SIZES[size]
    problem = chosen.problem(chosen.n_interior, chosen.n_boundary)
    batch = problem.sample(torch.Generator().manual_seed(0), DTYPE, "cpu")
    return Objective(build_network(chosen.widths), problem.terms, batch).linearize()


def resident(which: str) -> float:
    """Return the process's memory in megabytes, now (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(which)) * 1024 / 1e6


def measure(name: str, size: str, threads: int) -> None:
    """Print one row's seconds and memory as JSON."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # conjugate gradients and the best product stop early
    method, linearized = METHODS[name], linearize(size)
    gradient = linearized.gradient()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before, start = resident("VmRSS"), time.perf_counter()
    seconds: list[tuple[float, float]] = []
    while len(seconds) < REPETITIONS and time.perf_counter() - start < SECONDS:
        times = [time.perf_counter()]
        operator = method.curvature(linearized.linearizations)
        times.append(time.perf_counter())
        method.inverse(operator) @ gradient
        seconds.append((times[1] - times[0], time.perf_counter() - times[1]))
    peak = resident("VmHWM")
    build, solve = map(statistics.median, zip(*seconds, strict=True))
    print(json.dumps({"build": build, "solve": solve, "megabytes": peak - before}))


def run(sizes: list[str], threads: int) -> None:
    """Measure and print a table per network, one line per method as soon as it is known."""
    print(f"torch {torch.__version__}, {threads} threads, {DTYPE}, 900 + 120 points")
    for size in sizes:
        widths = SIZES[size].widths
        parameters = sum(a * b + b for a, b in pairwise(widths))
        print(f"\n| {'-'.join(map(str, widths))}: D = {parameters:,} | build ms | solve ms | MB |")
        print("|:--|--:|--:|--:|", flush=True)
        for name in (name for name, method in METHODS.items() if size in method.sizes):
            command = ("--measure", name, size, "--threads", str(threads))
            row = run_and_read("-m", "experiments.costs", *command)
            build, solve = row["build"] * 1e3, row["solve"] * 1e3
            print(f"| {name} | {build:.2f} | {solve:.2f} | {row['megabytes']:.0f} |", flush=True)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices="smb", default=list("smb"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=2, metavar=("METHOD", "SIZE"), help="measure one only")
    arguments = parser.parse_args()
    if arguments.measure:
        name, size = arguments.measure
        measure(name, size, arguments.threads)
        return
    run(arguments.sizes, arguments.threads)


if __name__ == "__main__":
    main()
