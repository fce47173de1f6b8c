"""Time and memory of a step against the usual way to differentiate a PINN loss, or another commit.

The baseline is one evaluation of loss and parameter gradient by nested ``torch.autograd.grad`` (a
loop over coordinates with ``create_graph=True``), the way most PINN code does it. Every figure has
a process of its own. The processes of one size take turns of a fraction of a second, and ratios are
medians of ratios within a turn, so that a busy machine slows both sides. Each round has new ones.

Sizes s to h are second-order problems; kdv, biharmonic and laplace100 are there for derivatives of
orders three and four, and for many coordinates. The baseline of extra is the KFAC* step of m, which
it does with 1 % more parameters, outside of linear layers.

With ``--against PATH`` the package of another checkout takes turns with this one, where it can. The
baseline does not use the package: its new / old is how far to trust the others.

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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pinncurv
from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.problems import (
    Box,
    LossTerm,
    Problem,
    SpaceTimeBox,
    dirichlet,
    heat4d,
    poisson2d,
    poisson100d,
)

DTYPE = torch.float64
HERE = Path(__file__).resolve().parents[1]
TURNS = 5  # of every process in a round


# --- problems, and their interior residuals by nested reverse mode --------------------------------


def kdv(n_interior: int, n_boundary: int) -> Problem:
    """Return u_t + 6 u u_x + u_xxx = 0 with a soliton at the start."""
    # orders above two are not in every commit that this file is run against
    from pinncurv.diffops import Partial, Value  # noqa: PLC0415 - see above

    def soliton(x: Tensor) -> Tensor:
        return 2 / torch.cosh(x[:, 1:] - 4 * x[:, :1]) ** 2

    domain = SpaceTimeBox.unit(1)
    pde = LossTerm(
        {"u": Value(), "t": Partial(0), "x1": Partial(1), "x3": Partial(1, 1, 1)},
        lambda x, u, t, x1, x3: t + 6 * u * x1 + x3,
        domain.interior(n_interior),
    )
    start = dirichlet(soliton, domain.initial(n_boundary))
    return Problem("kdv", (pde, start), 2, domain.interior(n_interior), solution=soliton)


def biharmonic(n_interior: int, n_boundary: int) -> Problem:
    """Return Δ²u = 4π⁴ sin πx sin πy with u = 0 on the boundary."""
    from pinncurv.diffops import Bilaplacian  # noqa: PLC0415 - see kdv

    def product(x: Tensor) -> Tensor:
        return torch.sin(torch.pi * x).prod(1, keepdim=True)

    domain = Box.unit(2)
    pde = LossTerm(
        {"b": Bilaplacian()},
        lambda x, b: b - 4 * torch.pi**4 * product(x),
        domain.interior(n_interior),
    )
    edge = dirichlet(product, domain.faces(n_boundary))
    return Problem("biharmonic", (pde, edge), 2, domain.interior(n_interior), solution=product)


def _gradient(u: Tensor, x: Tensor) -> Tensor:
    """Return all ∂u/∂x_i, to be differentiated further."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


def _trace(gradient: Tensor, x: Tensor, dims: Iterable[int]) -> Tensor:
    rows = [_gradient(gradient[:, i], x)[:, i : i + 1] for i in dims]
    return torch.stack(rows).sum(0)


def _nested_poisson(u: Tensor, x: Tensor) -> Tensor:
    return -_trace(_gradient(u, x), x, range(x.shape[1]))


def _nested_biharmonic(u: Tensor, x: Tensor) -> Tensor:
    return _nested_poisson(_nested_poisson(u, x), x)


def _nested_heat(u: Tensor, x: Tensor) -> Tensor:
    gradient = _gradient(u, x)
    return gradient[:, :1] - 0.25 * _trace(gradient, x, range(1, x.shape[1]))


def _nested_kdv(u: Tensor, x: Tensor) -> Tensor:
    gradient = _gradient(u, x)
    u_xx = _gradient(gradient[:, 1], x)[:, 1]
    return gradient[:, :1] + 6 * u * gradient[:, 1:] + _gradient(u_xx, x)[:, 1:]


@dataclass(frozen=True)
class Size:
    """One problem and network.

    Args:
        widths: Widths of the network.
        problem: Makes the problem.
        nested: The differential operator, of u and x, by nested reverse mode.
        n_interior: Number of interior points.
        n_boundary: Number of boundary points.
        iterations: How many evaluations a turn is.
    """

    widths: tuple[int, ...]
    problem: Callable[..., Problem]
    nested: Callable[[Tensor, Tensor], Tensor]
    n_interior: int = 900
    n_boundary: int = 120
    iterations: int = 1


_M = (2, 64, 64, 48, 48, 1)
_B = (256, 256, 128, 128, 1)
SIZES = {
    "s": Size((2, 64, 1), poisson2d, _nested_poisson, iterations=20),
    "m": Size(_M, poisson2d, _nested_poisson, iterations=6),
    "b": Size((2, *_B), poisson2d, _nested_poisson, iterations=2),
    "h": Size((5, *_B), heat4d, _nested_heat, 3000, 500),
    "extra": Size(_M, poisson2d, _nested_poisson, iterations=6),
    "kdv": Size(_M, kdv, _nested_kdv, iterations=4),
    "biharmonic": Size(_M, biharmonic, _nested_biharmonic),
    "laplace100": Size((100, *_B), poisson100d, _nested_poisson, 100, 50),
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
AGAINST_TARGET = 1.03  # new / old


# --- one figure -----------------------------------------------------------------------------------


class Slopes(nn.Module):
    """tanh(a x) with a trained slope a for each neuron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.ones(width, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        return torch.tanh(self.a * x)


def build_network(widths: tuple[int, ...], slopes: int = 0) -> nn.Sequential:
    """Return a tanh network with torch's initialization of seed 1, trained slopes in the last."""
    torch.manual_seed(1)
    layers: list[nn.Module] = []
    for layer, (d_in, d_out) in enumerate(pairwise(widths)):
        sloped = layer >= len(widths) - 2 - slopes
        layers += [nn.Linear(d_in, d_out, dtype=DTYPE), Slopes(d_out) if sloped else nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def baseline(name: str, model: nn.Module, batch: tuple[Tensor, ...]) -> Callable[[], object]:
    """Return the evaluation of loss and gradient by nested reverse mode."""
    size, (interior, boundary) = SIZES[name], batch
    solution = size.problem(size.n_interior, size.n_boundary).solution
    assert solution is not None
    x = interior.clone().requires_grad_()
    source, target = size.nested(solution(x), x).detach(), solution(boundary)
    parameters = list(model.parameters())

    def evaluate() -> object:
        x = interior.clone().requires_grad_()
        residual = size.nested(model(x), x) - source
        mismatch = model(boundary) - target
        loss = 0.5 * residual.square().mean() + 0.5 * mismatch.square().mean()
        return loss, torch.autograd.grad(loss, parameters)

    return evaluate


def build(figure: str, name: str) -> Callable[[], object]:
    """Return what one figure measures."""
    size = SIZES[name]
    slopes = 2 if name == "extra" and figure != "baseline" else 0  # 96 of 9,969 parameters
    model = build_network(size.widths, slopes)
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
    """Print one turn's median seconds and the peak memory so far, per line of standard input."""
    torch.set_num_threads(threads)
    evaluate = build(figure, name)
    for _ in range(3):
        evaluate()
    print(json.dumps({"package": pinncurv.__file__}), flush=True)
    for _ in sys.stdin:
        time.sleep(0.01)  # threads of whoever had the last turn wait busily for a while
        seconds = []
        for _ in range(SIZES[name].iterations):
            start = time.perf_counter()
            evaluate()
            seconds.append(time.perf_counter() - start)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
        turn = {"seconds": statistics.median(seconds), "megabytes": peak}
        print(json.dumps(turn), flush=True)


# --- processes in turns ---------------------------------------------------------------------------


class Worker:
    """A process that measures one figure with the package of one checkout."""

    def __init__(self, root: Path, figure: str, name: str, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--measure", figure, name, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=_environment(root),
        )
        package = Path(self._read()["package"])
        if not package.is_relative_to(root / "src"):
            self.process.communicate()
            raise RuntimeError(f"The package must be that of {root}, got {package}.")

    def turn(self) -> dict[str, float]:
        """Return one turn's seconds and megabytes."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return dict(json.loads(line))
        errors = self.process.communicate()[1]
        raise ChildProcessError(errors.strip() or f"exit status {self.process.returncode}")


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(root / "src")}


def run_and_read(*command: str) -> dict[str, float]:
    """Run Python in a process of its own, and return the JSON in its last line."""
    arguments = [sys.executable, *command]
    output = subprocess.run(
        arguments, check=True, capture_output=True, text=True, env=_environment(HERE)
    ).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    return result


def verdict(what: str, value: float, target: float | None) -> str:
    """Say whether a target is met."""
    if target is None or target == _INF:
        return ""
    return f"{what} {value:.3f}: target {target:g} {'met' if value <= target else 'MISSED'}"


def _median(turns: list[dict[str, float]], key: str) -> float:
    return statistics.median(turn[key] for turn in turns)


def _ratio(turns: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    pairs = zip(turns, others, strict=True)
    return statistics.median(a["seconds"] / b["seconds"] for a, b in pairs)


def take_turns(
    name: str, figures: list[str], rounds: int, threads: int, roots: list[Path]
) -> tuple[dict[tuple[str, Path], list[dict[str, float]]], dict[str, str]]:
    """Return all turns of one size by figure and checkout, and why the second one has none."""
    turns: dict[tuple[str, Path], list[dict[str, float]]] = {}
    missing: dict[str, str] = {}
    for _ in range(rounds):
        workers = {}
        for key in ((f, r) for f in figures for r in roots if r == HERE or f not in missing):
            try:
                workers[key] = Worker(key[1], key[0], name, threads)
            except ChildProcessError as error:
                if key[1] == HERE:
                    raise
                missing[key[0]] = str(error).splitlines()[-1]
        for i in range(TURNS):
            for key in list(workers)[:: 1 - 2 * (i % 2)]:  # forth and back
                turns.setdefault(key, []).append(workers[key].turn())
        for worker in workers.values():
            worker.process.communicate()
    return turns, missing


def run(
    sizes: list[str], figures: list[str], rounds: int, threads: int, against: Path | None
) -> None:
    """Measure and print a table, the lines of one size as soon as they are known."""
    print(f"torch {torch.__version__}, {threads} threads, {DTYPE}, {rounds} rounds")
    print(f"{'size':10} {'figure':18} {'ms':>9} {'ratio':>7} {'peak MB':>8}")
    for name in sizes:
        chosen = [f for f in figures if f == "baseline" or name in TARGETS[f]]
        roots = [HERE, against] if against else [HERE]
        turns, missing = take_turns(name, chosen, rounds, threads, roots)
        for figure in chosen:
            new = turns[figure, HERE]
            ratio, peak = _ratio(new, turns["baseline", HERE]), _median(new, "megabytes")
            notes = [
                verdict("ratio", ratio, TARGETS[figure].get(name)),
                verdict("MB", peak, MEMORY_TARGETS.get((figure, name))),
            ]
            if figure in missing:
                notes.append(f"not in old: {missing[figure]}")
            elif against:
                old = turns[figure, against]
                milliseconds, megabytes = _median(old, "seconds") * 1e3, _median(old, "megabytes")
                notes += [
                    f"old {milliseconds:.2f} ms, {megabytes:.0f} MB",
                    verdict("new / old", _ratio(new, old), AGAINST_TARGET),
                    verdict("MB new / old", peak / megabytes, AGAINST_TARGET),
                ]
            print(
                f"{name:10} {figure:18} {_median(new, 'seconds') * 1e3:9.2f} {ratio:7.2f} "
                f"{peak:8.0f}  " + "; ".join(note for note in notes if note),
                flush=True,
            )


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--figures", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--against", type=Path, help="another checkout, to take turns with")
    parser.add_argument("--measure", nargs=2, metavar=("FIGURE", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        figure, name = arguments.measure
        measure(figure, name, arguments.threads)
        return
    figures = ["baseline", *(f for f in arguments.figures if f != "baseline")]
    against = arguments.against and arguments.against.resolve()
    run(arguments.sizes, figures, arguments.rounds, arguments.threads, against)


if __name__ == "__main__":
    main()
