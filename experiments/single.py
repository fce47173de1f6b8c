"""What float32 costs and saves where factors, kernels and matrices are formed (``single=True``).

    python experiments/single.py accuracy --sizes s m
    python experiments/single.py times --sizes s m b h p

``accuracy`` prints 1 - cos of the angle between the direction with and without, for several
dampings, at the start and after steps of training; ``times`` the processor time of forming each, on
one thread, in turns. Both print tables for ``paper/single_precision.md``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from pinncurv import presets
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    GaussNewton,
    Kernel,
    MatrixFreeGaussNewton,
    Objective,
    Woodbury,
)
from pinncurv.linops import Damped, FactorDamping, FactorizationError, trace_norm
from pinncurv.problems import Problem, heat4d, poisson2d, poisson5d

LARGEST = 1000  # parameters with which the dense matrix is compared, and blocks are factorized


@dataclass(frozen=True)
class Size:
    """One problem and network.

    Args:
        widths: Widths of the network.
        problem: Makes the problem of some points.
        points: How many, inside and on the boundary.
    """

    widths: tuple[int, ...]
    problem: Callable[..., Problem]
    points: tuple[int, int] = (900, 120)

    def objective(self) -> Objective:
        """Return the loss at points of seed 0, of a network of seed 1."""
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for pair in pairwise(self.widths):
            layers += [nn.Linear(*pair, dtype=torch.float64), nn.Tanh()]
        problem = self.problem(*self.points)
        batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
        return Objective(nn.Sequential(*layers[:-1]), problem.terms, batch)


SIZES = {
    "s": Size((2, 64, 1), poisson2d),
    "m": Size((2, 64, 64, 48, 48, 1), poisson2d),
    "b": Size((2, 256, 256, 128, 128, 1), poisson2d),
    "h": Size((5, 256, 256, 128, 128, 1), heat4d, (3000, 500)),
    "p": Size((5, 64, 64, 48, 48, 1), poisson5d, (3000, 500)),
}

# A direction of operator and damping: what forms the operator, and what inverts it.
DIRECTIONS: dict[str, tuple[Callable[..., Any], Callable[[float], Any]]] = {
    "KFAC, `same`": (KFAC, FactorDamping),
    "KFAC, `trace_norm`": (KFAC, lambda damping: FactorDamping(damping, trace_norm)),
    "kernel": (MatrixFreeGaussNewton, Woodbury),
    "blocks": (BlockDiagonalGaussNewton, Damped),
    "matrix": (GaussNewton, Damped),
}


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def angle(received: Tensor, expected: Tensor) -> str:
    """Return 1 - cos, without the cancellation."""
    a, b = received / received.norm(), expected / expected.norm()
    return f"{0.5 * float((a - b).square().sum()):.0e}"


def error(received: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Return the largest relative error of some matrices in the Frobenius norm."""
    pairs = [(a, b) for a, b in zip(received, expected, strict=True) if b.any()]
    return f"{max(float((a - b).norm() / b.norm()) for a, b in pairs):.0e}"


def direction(operator: Any, inverse: Any, linearizations: Any) -> Tensor:
    """Return the preconditioned gradient, of a kernel by way of the residual, as optimizers do."""
    inverted = inverse(operator)
    if inverted.solve_residual is not None:
        return flat(inverted.solve_residual(linearizations.residual))
    return flat(inverted @ linearizations.gradient())


def accuracy(name: str, method: str, steps: int, dampings: Sequence[float]) -> None:
    """Print the angles after some steps of a method."""
    objective = SIZES[name].objective()
    parameters = list(objective.parameters())
    optimizer = getattr(presets, method)(parameters)
    for _ in range(steps):
        optimizer.step(objective)
    made = objective.linearize()
    large = sum(p.numel() for p in parameters) > LARGEST
    chosen = [n for n in DIRECTIONS if not (large and n in ("matrix", "blocks"))]
    built = {n: [DIRECTIONS[n][0](single=s)(made) for s in (False, True)] for n in chosen}
    K = [Kernel(single=s)(made).matrix for s in (False, True)]
    double, single = built["KFAC, `same`"]
    trace = float(K[0].trace())
    print(
        f"\n{name} after {steps} steps of {method}: loss {objective.loss().item():.1e}; relative "
        f"errors of factors {error(single.tensors(), double.tensors())}, kernel "
        f"{error(K[1:], K[:1])}; ε tr JJᵀ = {torch.finfo(torch.float32).eps * trace:.0e}\n"
    )
    print("| λ | " + " | ".join(chosen) + " |\n|---" * 1 + "|---" * len(chosen) + "|")
    for damping in dampings:
        cells = []
        for n in chosen:
            try:
                double, single = (direction(C, DIRECTIONS[n][1](damping), made) for C in built[n])
                cells.append(angle(single, double))
            except FactorizationError:
                cells.append("fails")
        print(f"| {damping:.0e} | " + " | ".join(cells) + " |", flush=True)


def seconds(form: Callable[[bool], object], single: bool) -> float:
    """Return the processor time of forming an operator."""
    start = time.process_time()
    form(single)
    return time.process_time() - start


def times(name: str, turns: int) -> None:
    """Print the time of forming each in milliseconds, the smallest of some turns."""
    made = SIZES[name].objective().linearize()
    D = sum(p.numel() for p in made.space.parameters.values())
    recipes: dict[str, Callable[..., Any]] = {
        "KFAC": lambda single: KFAC(single=single)(made),
    }
    if name in ("m", "p"):
        recipes["kernel"] = lambda single: Kernel(single)(made).matrix
    if name == "s":
        recipes["matrix"] = lambda single: GaussNewton(single)(made)
    for label, form in recipes.items():
        pairs = []
        for turn in range(turns + 1):  # the first warms up
            order = (False, True) if turn % 2 else (True, False)
            taken = {single: seconds(form, single) for single in order}
            pairs.append((taken[False], taken[True]))
        double, single = (1e3 * min(pair[i] for pair in pairs[1:]) for i in (0, 1))
        ratio = sorted(b / a for a, b in pairs[1:])[turns // 2]
        print(f"| {name} ({D}) | {label} | {double:.2f} | {single:.2f} | {ratio:.2f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["accuracy", "times"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["s"])
    parser.add_argument("--method", default="kfac_star", help="of pinncurv.presets")
    parser.add_argument("--steps", nargs="+", type=int, default=[0, 300])
    parser.add_argument("--dampings", nargs="+", type=float, default=[1e-12, 1e-8, 1e-4])
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that a damping is below the resolution is what is shown
    print(f"torch {torch.__version__}, one thread of a CPU, float64")
    for name in options.sizes:
        if options.what == "times":
            times(name, options.turns)
            continue
        for steps in options.steps:
            accuracy(name, options.method, steps, options.dampings)


if __name__ == "__main__":
    main()
