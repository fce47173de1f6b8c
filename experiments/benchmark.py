"""Time and memory of a step against the usual way to differentiate a PINN loss, or another commit.

The baseline is one evaluation of loss and parameter gradient with the Laplacian by nested
``torch.autograd.grad`` (a loop over coordinates with ``create_graph=True``), the way most PINN code
does it. Every figure is the median over iterations in a process of its own, and the median over
rounds in which the figures of one size alternate, so that a busy machine slows all of them.

Sizes s to h are second-order problems; kdv, biharmonic and laplace100 are there for derivatives of
orders three and four, and for many coordinates; extra is m with 2 % of the parameters outside of
linear layers. With ``--against PATH`` another checkout is measured in turns with this one.

Run it with ``tox run -e benchmark``, or ``python experiments/benchmark.py --sizes s m``.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pinncurv
from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.problems import Problem, heat4d, poisson2d, poisson100d

DTYPE = torch.float64
HERE = Path(__file__).resolve().parents[1]


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


def kdv(n_interior: int, n_boundary: int) -> Problem:
    """Return u_t + 6 u u_x + u_xxx = 0 with an initial condition."""
    # orders above two are not in every commit that this file is run against
    from pinncurv.diffops import Partial, Value  # noqa: PLC0415 - see above
    from pinncurv.problems import LossTerm, SpaceTimeBox  # noqa: PLC0415

    domain = SpaceTimeBox.unit(1)
    operators = {"u": Value(), "t": Partial(0), "x1": Partial(1), "x3": Partial(1, 1, 1)}
    pde = LossTerm(
        operators, lambda x, u, t, x1, x3: t + 6 * u * x1 + x3, domain.interior(n_interior)
    )
    start = LossTerm(
        {"u": Value()}, lambda x, u: u - _wave(x), domain.initial(n_boundary), name="initial"
    )
    return Problem("kdv", (pde, start), 2, domain.interior(n_interior))


def _wave(x: Tensor) -> Tensor:
    return torch.cos(torch.pi * x[:, 1:])


def _product(x: Tensor) -> Tensor:
    return torch.sin(torch.pi * x).prod(1, keepdim=True)


def biharmonic(n_interior: int, n_boundary: int) -> Problem:
    """Return Δ²u = 4π⁴ sin πx sin πy with u = 0 on the boundary."""
    from pinncurv.diffops import Bilaplacian, Value  # noqa: PLC0415 - see kdv
    from pinncurv.problems import Box, LossTerm  # noqa: PLC0415

    domain = Box.unit(2)
    pde = LossTerm(
        {"b": Bilaplacian()},
        lambda x, b: b - 4 * torch.pi**4 * _product(x),
        domain.interior(n_interior),
    )
    edge = LossTerm({"u": Value()}, lambda x, u: u, domain.faces(n_boundary), name="boundary")
    return Problem("biharmonic", (pde, edge), 2, domain.interior(n_interior))


_M = (2, 64, 64, 48, 48, 1)
SIZES = {
    "s": Size((2, 64, 1), poisson2d, 900, 120, 100),
    "m": Size(_M, poisson2d, 900, 120, 40),
    "b": Size((2, 256, 256, 128, 128, 1), poisson2d, 900, 120, 15),
    "h": Size((5, 256, 256, 128, 128, 1), heat4d, 3000, 500, 7),
    "extra": Size(_M, poisson2d, 900, 120, 40),
    "kdv": Size(_M, kdv, 900, 120, 15),
    "biharmonic": Size(_M, biharmonic, 900, 120, 7),
    "laplace100": Size((100, 256, 256, 128, 128, 1), poisson100d, 100, 50, 7),
}
_INF = float("inf")
# What is measured, and the ratio to the baseline that it should not exceed at each size.
TARGETS: dict[str, dict[str, float]] = {
    "baseline": {},
    "gradient": {
        **{"s": 1.0, "m": 1.0, "b": 0.7, "h": 0.7},
        **{"kdv": _INF, "biharmonic": 0.5, "laplace100": 0.5},
    },
    "kfac_star": {"s": 1.5, "m": 1.5, "b": 1.5, "h": 1.5, "extra": 1.3},
    "gauss_newton": {"s": 4.0},
    "kfac_star_chunked": {"h": _INF},
}
# Peak resident memory in MB that should not be exceeded.
MEMORY_TARGETS = {("kfac_star", "h"): 900.0, ("kfac_star_chunked", "h"): 500.0}


class Slopes(nn.Module):
    """tanh(a x) with a trained slope a for each neuron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(width, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return torch.tanh(self.a * x)


def build_network(widths: tuple[int, ...], slopes: bool = False) -> nn.Sequential:
    """Return a tanh network with torch's initialization of seed 1."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out, dtype=DTYPE), Slopes(d_out) if slopes else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def _partial(u: Tensor, x: Tensor, i: int) -> Tensor:
    """Return ∂u/∂x_i by reverse mode, to be differentiated further."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0][:, i : i + 1]


def _nested_laplacian(u: Tensor, x: Tensor, dims: range) -> Tensor:
    (gradient,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return torch.stack([_partial(gradient[:, i], x, i) for i in dims]).sum(0)


def _nested_residual(name: str, model: nn.Module, x: Tensor, source: Tensor | float) -> Tensor:
    """Return the interior residual of a size by nested reverse mode."""
    u, d = model(x), range(x.shape[1])
    if name == "kdv":
        (gradient,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        u_t, u_x = gradient[:, :1], gradient[:, 1:]
        return u_t + 6 * u * u_x + _partial(_partial(u_x, x, 1), x, 1)
    if name == "h":
        (gradient,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        rows = [_partial(gradient[:, i], x, i) for i in d[1:]]
        return gradient[:, :1] - 0.25 * torch.stack(rows).sum(0)
    laplacian = _nested_laplacian(u, x, d)
    if name == "biharmonic":
        return _nested_laplacian(laplacian, x, d) - source
    return (laplacian if name == "laplace100" else -laplacian) - source


def baseline(name: str, model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the evaluation of loss and gradient by nested reverse mode."""
    interior, boundary = batch
    size = SIZES[name]
    problem = size.problem(size.n_interior, size.n_boundary)
    source: Tensor | float = 0.0
    if name == "biharmonic":
        target, source = torch.zeros(len(boundary), 1), 4 * torch.pi**4 * _product(interior)
    elif name == "kdv":
        target = _wave(boundary)
    else:
        assert problem.solution is not None
        target = problem.solution(boundary)
        if name == "laplace100":
            source = 200 / 33.47
        elif name != "h":
            source = 2 * torch.pi**2 * problem.solution(interior)
    parameters = list(model.parameters())

    def evaluate() -> object:
        residual = _nested_residual(name, model, interior.clone().requires_grad_(), source)
        mismatch = model(boundary) - target
        loss = 0.5 * residual.square().mean() + 0.5 * mismatch.square().mean()
        # the last bias of a network whose derivatives alone count has no gradient there
        return loss, torch.autograd.grad(loss, parameters, allow_unused=True)

    return evaluate


def build(figure: str, name: str) -> Callable[[], object]:
    """Return what one figure measures."""
    size = SIZES[name]
    # the baseline of the slopes is the same step without them
    model = build_network(size.widths, slopes=name == "extra" and figure != "baseline")
    problem = size.problem(size.n_interior, size.n_boundary)
    batch = problem.sample(torch.Generator().manual_seed(0), DTYPE, "cpu")
    if figure == "baseline" and name != "extra":
        return baseline(name, model, batch)
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
    result = {"seconds": statistics.median(seconds), "megabytes": peak}
    print(json.dumps({**result, "package": pinncurv.__file__}))


def run_and_read(*command: str, root: Path = HERE) -> dict[str, float]:
    """Run Python in a process of its own, with the package of a checkout; read its last line."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    arguments = [sys.executable, *command]
    output = subprocess.run(
        arguments, check=True, capture_output=True, text=True, env=environment
    ).stdout
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    if not Path(result.pop("package", str(root))).is_relative_to(root):
        raise RuntimeError(f"The package must be that of {root}. Is another one installed first?")
    return result


def verdict(value: float, target: float | None) -> str:
    """Say whether a target is met."""
    if target is None or target == float("inf"):
        return ""
    return f"target {target:g}: {'met' if value <= target else 'MISSED'}"


def run(
    sizes: list[str], figures: list[str], rounds: int, threads: int, against: Path | None
) -> None:
    """Measure and print a table, one line per size and figure as soon as it is known."""
    print(f"torch {torch.__version__}, {threads} threads, {DTYPE}, {rounds} rounds")
    header = f"{'size':10} {'figure':18} {'ms':>9} {'ratio':>7} {'peak MB':>8}"
    print(header + (f"  against {against}: ms, new / old, peak MB" if against else ""))
    for name in sizes:
        chosen = [f for f in figures if f == "baseline" or name in TARGETS[f]]
        results: dict[tuple[str, Path], list[dict[str, float]]] = {}
        for _ in range(rounds):
            for figure in chosen:
                for root in (HERE, against) if against else (HERE,):
                    command = (__file__, "--measure", figure, name, "--threads", str(threads))
                    if root == HERE or name in "smbh":  # what every commit has
                        measured = run_and_read(*command, root=root)
                        results.setdefault((figure, root), []).append(measured)
        base = [r["seconds"] for r in results["baseline", HERE]]
        for figure in chosen:
            seconds = [r["seconds"] for r in results[figure, HERE]]
            ratio = statistics.median(s / b for s, b in zip(seconds, base, strict=True))
            peak = statistics.median(r["megabytes"] for r in results[figure, HERE])
            notes = [
                verdict(ratio, TARGETS[figure].get(name)),
                verdict(peak, MEMORY_TARGETS.get((figure, name))),
            ]
            if against and (figure, against) in results:
                old = results[figure, against]
                change = [s / r["seconds"] for s, r in zip(seconds, old, strict=True)]
                ms = statistics.median(r["seconds"] for r in old) * 1e3
                mb = statistics.median(r["megabytes"] for r in old)
                notes.append(f"old {ms:.2f} ms, {statistics.median(change):.3f}, {mb:.0f} MB")
            print(
                f"{name:10} {figure:18} {statistics.median(seconds) * 1e3:9.2f} {ratio:7.2f} "
                f"{peak:8.0f}  " + ", ".join(note for note in notes if note),
                flush=True,
            )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--figures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--against", type=Path, help="another checkout to measure in turns")
    parser.add_argument("--measure", nargs=2, metavar=("FIGURE", "SIZE"), help="measure one only")
    arguments = parser.parse_args()
    if arguments.measure:
        figure, name = arguments.measure
        measure(figure, name, arguments.threads)
        return
    figures = ["baseline", *(f for f in arguments.figures if f != "baseline")]
    run(arguments.sizes, figures, arguments.rounds, arguments.threads, arguments.against)


if __name__ == "__main__":
    main()
