"""The problem of paper/high_dimension.md, and what a step costs: python paper/high_dimension.py."""

import argparse
import resource
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from time import process_time
from typing import Any

import torch
from torch import Generator, Tensor, nn

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.catalog import mlp
from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.diffops import Laplacian, RandomCoordinates, RandomDirections, RandomSigns
from pinncurv.optim import FirstOrder
from pinncurv.problems import Ansatz, Drawn, LossTerm, Problem


def two_body(
    dim: int = 100, n_interior: int = 100, sampling: RandomDirections | None = None
) -> Problem:
    """A solution in which neighbouring coordinates interact.

    Δu = f in |x| < 1,    u = (1 - |x|²) s(x),    s = Σ_i c_i sin(x_i + cos(y_i) + y_i cos(x_i))

    with y_i = x_{i+1} and c_i from the normal distribution. That u = 0 on the sphere holds by the
    network, `ball`. Neither are second derivatives equal, nor are mixed ones zero: no estimate is
    exact.

    Args:
        dim: The number of coordinates.
        n_interior: Number of points.
        sampling: Random directions to estimate the Laplacian from; None for the exact one.

    Source: Hu, Shukla, Karniadakis, Kawaguchi 2023 (arXiv 2307.12306), section 4.
    """
    c = torch.randn(dim - 1, generator=Generator().manual_seed(0), dtype=torch.float64)
    interior = LossTerm(
        operators={"lap": Laplacian(sampling=sampling)},
        residual=partial(_residual, c),
        points=Drawn(partial(_in_ball, dim), n_interior, dim),
        weight=1 / (2 * dim) ** 2,  # Δu is about -2 d s: losses are then of the size of s²
        name="interior",
    )
    evaluation = Drawn(partial(_in_ball, dim), 2000, dim)
    return Problem("two_body", (interior,), dim, evaluation, solution=partial(_solution, c))


def ball(d_in: int, d_out: int, widths: tuple[int, ...] = (64, 64, 48, 48)) -> nn.Module:
    """Return a perceptron times 1 - |x|²."""
    return Ansatz(mlp(d_in, d_out, widths), _factor, _nothing)


def _in_ball(dim: int, n: int, generator: Generator) -> Tensor:
    normal = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    radius = torch.rand(n, 1, generator=generator, dtype=torch.float64) ** (1 / dim)
    return radius * normal / normal.norm(dim=1, keepdim=True)


def _nothing(x):
    return torch.zeros_like(x[:, :1])


def _factor(x):
    return 1 - (x**2).sum(-1, keepdim=True)


def _solution(c: Tensor, x: Tensor) -> Tensor:
    return _factor(x) * (torch.sin(_phase(x)) @ c.to(x))[:, None]


def _phase(x: Tensor) -> Tensor:
    x, y = x[:, :-1], x[:, 1:]
    return x + torch.cos(y) + y * torch.cos(x)


def _residual(c: Tensor, x: Tensor, lap: Tensor) -> Tensor:
    return lap - _source(c.to(x), x)


def _source(c: Tensor, x: Tensor) -> Tensor:
    """Return Δ((1 - |x|²) s) = (1 - |x|²) Δs - 4 x·∇s - 2 d s."""
    phase, (a, b) = _phase(x), (x[:, :-1], x[:, 1:])
    sine, cosine = torch.sin(phase), torch.cos(phase)
    by_a, by_b = 1 - b * torch.sin(a), torch.cos(a) - torch.sin(b)  # first derivatives of a phase
    second = -b * torch.cos(a) - torch.cos(b)
    laplacian = cosine * second - sine * (by_a**2 + by_b**2)
    slope = cosine * (a * by_a + b * by_b)  # x·∇
    d = x.shape[1]
    return _factor(x) * (laplacian @ c)[:, None] - ((4 * slope + 2 * d * sine) @ c)[:, None]


# --- what a step costs ----------------------------------------------------------------------------

SAMPLINGS = {
    "exact": None,
    **{f"{m} coordinates": RandomCoordinates(m) for m in (4, 16, 64)},
    **{f"{m} signs": RandomSigns(m) for m in (4, 16, 64)},
}
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "Adam": lambda parameters: FirstOrder(torch.optim.Adam(parameters)),
    "KFAC*": partial(presets.kfac_star, damping=1e-2),
}


def measure(dim: int, n_interior: int, sampling: RandomDirections | None, steps: int) -> list[str]:
    """Return the cells of a row: milliseconds of a batch and of steps, megabytes, and the bias.

    Times are those of the process, medians after a first step; memory is its peak so far above that
    of a small problem. The bias is the loss of the exact solution at 200 points.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _step(two_body(8, 2, RandomCoordinates(2)), ball(8, 1), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rows = _step(two_body(dim, n_interior, sampling), ball(dim, 1), steps)
    cells = [f"{1e3 * seconds:.1f}" for seconds, _ in rows.values()]
    cells += [f"{(peak - before) / 1e3:.0f}" for _, peak in list(rows.values())[1:]]
    return [*cells, f"{_bias(dim, sampling):.1e}"]


def _bias(dim: int, sampling: RandomDirections | None) -> float:
    if sampling is None:
        return 0.0
    problem = two_body(dim, 200, sampling)
    (x,) = problem.sample(Generator().manual_seed(0), torch.float64, "cpu")
    assert problem.solution is not None
    return 0.5 * float(problem.terms[0].scaled_residual(problem.solution, x).square().sum())


def _step(problem: Problem, network: nn.Module, steps: int) -> dict[str, tuple[float, int]]:
    """Return seconds and the peak of memory so far, of a new batch and of a step."""
    generator = Generator().manual_seed(0)
    objective = Objective.sample(network.double(), problem, generator)
    rows = {"new batch": _median(lambda: objective.resampled(generator), steps)}
    for name, make in OPTIMIZERS.items():
        optimizer = make(objective.parameters())
        rows[name] = _median(lambda optimizer=optimizer: optimizer.step(objective), steps)
    return rows


def _median(function: Callable[[], Any], times: int) -> tuple[float, int]:
    seconds = []
    for _ in range(1 + times):
        start = process_time()
        function()
        seconds.append(process_time() - start)
    return statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print a table for each dimension."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[100, 1000], metavar="D")
    parser.add_argument("--points", type=int, default=32, metavar="N")
    parser.add_argument("--steps", type=int, default=5, metavar="K", help="steps to time")
    options = parser.parse_args()
    units = [f"{name} [ms]" for name in ("new batch", *OPTIMIZERS)]
    header = ["Laplacian", *units, *(f"{name} [MB]" for name in OPTIMIZERS), "bias"]
    for dim in options.dims:
        print(f"\nd = {dim}, {options.points} points\n")
        print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|", flush=True)
        for name, sampling in SAMPLINGS.items():
            # a process of its own, whose peak of memory is that of this row
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                row = pool.submit(measure, dim, options.points, sampling, options.steps).result()
            print("| " + " | ".join([name, *row]) + " |", flush=True)


if __name__ == "__main__":
    main()
