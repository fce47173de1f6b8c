"""Time and memory of a step against the usual way to differentiate a PINN loss.

The baseline is one evaluation of loss and parameter gradient with the Laplacian by nested
``torch.autograd.grad`` (a loop over coordinates with ``create_graph=True``), the way most PINN code
does it. Every figure is the median over iterations in a process of its own, and the median over
rounds in which the figures of one size alternate, so that a busy machine slows all of them.

Run it with ``tox run -e benchmark``, or ``python experiments/benchmark.py --sizes s m``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.problems import Problem, heat4d, poisson2d

DTYPE = torch.float64


@dataclass(frozen=True)
class Size:
    """One problem and network.

    Args:
        widths: Widths of the network.
        problem: Makes the problem.
        n_interior: Number of interior points.
        n_boundary: Number of boundary points.
        iterations: How many evaluations the median is over.
    """

    widths: tuple[int, ...]
    problem: Callable[..., Problem]
    n_interior: int
    n_boundary: int
    iterations: int


SIZES = {
    "s": Size((2, 64, 1), poisson2d, 900, 120, 100),
    "m": Size((2, 64, 64, 48, 48, 1), poisson2d, 900, 120, 40),
    "b": Size((2, 256, 256, 128, 128, 1), poisson2d, 900, 120, 15),
    "h": Size((5, 256, 256, 128, 128, 1), heat4d, 3000, 500, 7),
}
# What is measured, and the ratio to the baseline that it should not exceed at each size.
TARGETS: dict[str, dict[str, float]] = {
    "baseline": {},
    "gradient": {"s": 1.0, "m": 1.0, "b": 0.7, "h": 0.7},
    "kfac_star": {"s": 1.5, "m": 1.5, "b": 1.5, "h": 1.5},
    "gauss_newton": {"s": 4.0},
    "kfac_star_chunked": {"h": float("inf")},
}
# Peak resident memory in MB that should not be exceeded.
MEMORY_TARGETS = {("kfac_star", "h"): 900.0, ("kfac_star_chunked", "h"): 500.0}


def build_network(widths: tuple[int, ...]) -> nn.Sequential:
    """Return a tanh network with torch's initialization of seed 1."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, dtype=DTYPE), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def baseline(size: Size, model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the evaluation of loss and gradient by nested reverse mode."""
    interior, boundary = batch
    problem = size.problem(size.n_interior, size.n_boundary)
    assert problem.solution is not None
    target = problem.solution(boundary)
    heat = size.problem is heat4d
    source = 0.0 if heat else 2 * torch.pi**2 * problem.solution(interior)
    parameters = list(model.parameters())

    def evaluate() -> object:
        x = interior.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        laplacian = torch.zeros(len(x), 1, dtype=DTYPE)
        for i in range(1 if heat else 0, x.shape[1]):
            (row,) = torch.autograd.grad(gradient[:, i].sum(), x, create_graph=True)
            laplacian = laplacian + row[:, i : i + 1]
        residual = gradient[:, :1] - 0.25 * laplacian if heat else -laplacian - source
        mismatch = model(boundary) - target
        loss = 0.5 * residual.square().mean() + 0.5 * mismatch.square().mean()
        return loss, torch.autograd.grad(loss, parameters)

    return evaluate


def build(figure: str, name: str) -> Callable[[], object]:
    """Return what one figure measures."""
    size = SIZES[name]
    model = build_network(size.widths)
    problem = size.problem(size.n_interior, size.n_boundary)
    batch = problem.sample(torch.Generator().manual_seed(0), DTYPE, "cpu")
    if figure == "baseline":
        return baseline(size, model, batch)
    chunk_size = 500 if figure == "kfac_star_chunked" else None
    objective = Objective(model, problem.terms, batch, chunk_size)
    if figure == "gradient":
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(objective.loss(), parameters)
    if figure == "gauss_newton":
        optimizer = presets.gauss_newton(model.parameters())
    else:
        optimizer = presets.kfac_star(model.parameters(), damping=1e-10, decay=0.95)
    return lambda: optimizer.step(objective)


def measure(figure: str, name: str, threads: int) -> None:
    """Print one figure's median seconds and this process's peak memory as JSON."""
    torch.set_num_threads(threads)
    evaluate = build(figure, name)
    for _ in range(3):
        evaluate()
    seconds = []
    for _ in range(SIZES[name].iterations):
        start = time.perf_counter()
        evaluate()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"seconds": statistics.median(seconds), "megabytes": peak}))


def run_and_read(*command: str) -> dict[str, float]:
    """Run Python in a process of its own, and return the JSON in its last line."""
    arguments = [sys.executable, *command]
    output = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def verdict(value: float, target: float | None) -> str:
    """Say whether a target is met."""
    if target is None or target == float("inf"):
        return ""
    return f"target {target:g}: {'met' if value <= target else 'MISSED'}"


def run(sizes: list[str], figures: list[str], rounds: int, threads: int) -> None:
    """Measure and print a table, one line per size and figure as soon as it is known."""
    print(f"torch {torch.__version__}, {threads} threads, {DTYPE}, {rounds} rounds")
    print(f"{'size':4} {'figure':18} {'ms':>9} {'ratio':>7} {'peak MB':>8}")
    for name in sizes:
        chosen = [f for f in figures if f == "baseline" or name in TARGETS[f]]
        results: dict[str, list[dict[str, float]]] = {figure: [] for figure in chosen}
        for _ in range(rounds):
            for figure in chosen:
                command = ("--measure", figure, name, "--threads", str(threads))
                results[figure].append(run_and_read(__file__, *command))
        base = statistics.median(r["seconds"] for r in results["baseline"])
        for figure in chosen:
            seconds = statistics.median(r["seconds"] for r in results[figure])
            peak = statistics.median(r["megabytes"] for r in results[figure])
            notes = [
                verdict(seconds / base, TARGETS[figure].get(name)),
                verdict(peak, MEMORY_TARGETS.get((figure, name))),
            ]
            print(
                f"{name:4} {figure:18} {seconds * 1e3:9.2f} {seconds / base:7.2f} {peak:8.0f}  "
                + ", ".join(note for note in notes if note),
                flush=True,
            )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--figures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("FIGURE", "SIZE"), help="measure one only")
    arguments = parser.parse_args()
    if arguments.measure:
        figure, name = arguments.measure
        measure(figure, name, arguments.threads)
        return
    figures = ["baseline", *(f for f in arguments.figures if f != "baseline")]
    run(arguments.sizes, figures, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
