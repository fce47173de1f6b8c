"""The figures: what is measured, at which sizes, and what must be reached."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.benchmarking.sizes import SIZES, Size, build_network
from pinncurv import presets
from pinncurv.curvature import Objective

Evaluate = Callable[[], object]

_KERNEL = ("k1200", "k3500")
# At which sizes each figure is measured; the baseline is what ratios refer to.
FIGURES: dict[str, tuple[str, ...]] = {
    "baseline": tuple(SIZES),
    "gradient": ("s", "m", "b", "h", "kdv", "biharmonic", "laplace100", "tiny"),
    "kfac_star": ("s", "m", "b", "h", "extra", "tiny"),
    "gauss_newton": ("s", "tiny"),
    "kfac_star_chunked": ("h",),
    "spring": _KERNEL,
}


@dataclass(frozen=True)
class Target:
    """What must not be exceeded.

    Attributes:
        eager: The ratio to the baseline.
        compiled: The same of the compiled step.
        megabytes: The peak memory.
        memory: The peak memory as a ratio to the baseline's.
        over_eager: The compiled step's time as a ratio to the eager one's.
        over_floor: The compiled step's time as a ratio to its floor.
    """

    eager: float | None = None
    compiled: float | None = None
    megabytes: float | None = None
    memory: float | None = None
    over_eager: float | None = None
    over_floor: float | None = None


_CPU = {
    ("gradient", "s"): Target(1.0),
    ("gradient", "m"): Target(1.0, 0.6),
    ("gradient", "b"): Target(0.7, 0.6),
    ("gradient", "h"): Target(0.7, 0.6),
    ("gradient", "biharmonic"): Target(0.5),
    ("gradient", "laplace100"): Target(0.5),
    ("kfac_star", "s"): Target(2.6, 1.8),
    ("kfac_star", "m"): Target(1.6, 1.3),
    ("kfac_star", "b"): Target(1.8, 1.6),
    ("kfac_star", "h"): Target(1.3, 1.1, megabytes=900),
    ("kfac_star", "extra"): Target(1.3),
    ("gauss_newton", "s"): Target(3.0, 2.0),
    ("kfac_star_chunked", "h"): Target(megabytes=500),
    ("spring", "k1200"): Target(0.5, 0.5, memory=1.0),
    ("spring", "k3500"): Target(0.5, 0.5, memory=1.0),
}
_CUDA = {
    ("kfac_star", "s"): Target(over_eager=0.2),
    ("kfac_star", "h"): Target(over_floor=1.5),
}


def target(figure: str, size: str, device: str) -> Target:
    """Return what a figure must reach at a size, on a CPU or a GPU."""
    targets = _CPU if device == "cpu" else _CUDA
    return targets.get((figure, size), Target())


def verdict(what: str, value: float, limit: float | None) -> Iterator[str]:
    """Yield whether a target is met, nothing where there is none."""
    if limit is not None:
        met = "met" if value <= limit else "MISSED"
        yield f"{what} {value:.3f}: target {limit:g} {met}"


def build(figure: str, name: str, compiled: bool = False, device: str = "cpu") -> Evaluate:
    """Return what one figure measures at one size."""
    further, size = _compile(compiled), SIZES[name]
    if figure == "baseline" and name == "extra":  # its baseline is the step of m
        figure, name = "kfac_star", "m"
    slopes = 2 if name == "extra" else 0  # 96 of 9,969 parameters
    model = build_network(size.widths, slopes).to(device)
    problem, batch = size.sample(device)
    if figure == "baseline" and name not in _KERNEL:
        return _nested(size, model, batch)
    chunk_size = 500 if figure == "kfac_star_chunked" else None
    objective = Objective(model, problem.terms, batch, chunk_size, **further)
    if figure == "baseline":
        return lambda: _dense_kernel(objective)
    if figure == "gradient":
        return lambda: objective.linearize().gradient()
    if figure == "gauss_newton":
        optimizer = presets.gauss_newton(model.parameters())
    elif figure == "spring":
        optimizer = presets.spring(model.parameters())
    else:
        optimizer = presets.kfac_star(model.parameters(), damping=1e-10, decay=0.95)
    return lambda: optimizer.step(objective)


def _compile(compiled: bool) -> dict[str, bool]:
    """Return the argument of an objective that is to be compiled.

    Raises:
        NotImplementedError: If there is none in the package that is measured.
    """
    if compiled and "compile" not in inspect.signature(Objective).parameters:
        raise NotImplementedError("Objective has no argument compile.")
    return {"compile": True} if compiled else {}


def _nested(size: Size, model: nn.Module, batch: tuple[Tensor, ...]) -> Evaluate:
    """Return the evaluation of loss and gradient by nested reverse mode."""
    interior, boundary = batch
    solution = size.problem(size.n_interior, size.n_boundary).solution
    assert solution is not None
    x = interior.clone().requires_grad_()
    source, values = size.nested(solution(x), x).detach(), solution(boundary)
    parameters = list(model.parameters())

    def evaluate() -> object:
        x = interior.clone().requires_grad_()
        residual = size.nested(model(x), x) - source
        mismatch = model(boundary) - values
        loss = 0.5 * residual.square().mean() + 0.5 * mismatch.square().mean()
        return loss, torch.autograd.grad(loss, parameters)

    return evaluate


def _dense_kernel(objective: Objective) -> Tensor:
    """Form J densely and multiply, J Jᵀ.

    J from the linearization: it takes 0.6 times as long as by torch.func (vmap of jacrev), which is
    what public code does, so that the baseline is the harder one.
    """
    J = objective.linearize().jacobian.to_dense()
    return J @ J.mT
