"""The Poisson equation, and the instances of arXiv 2405.15603 with known solutions."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pinncurv.diffops import Laplacian, RandomDirections
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.domains import Box
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.problem import Problem, TensorOrJet


def poisson(
    domain: Box,
    source: Callable[[Tensor], Tensor],
    boundary: Callable[[Tensor], Tensor],
    n_interior: int,
    n_boundary: int,
    solution: Callable[[Tensor], Tensor] | None = None,
    name: str = "poisson",
    sampling: RandomDirections | None = None,
) -> Problem:
    """The Poisson equation with Dirichlet data on the faces of a box.

    -Δu = f in the domain,    u = g on its faces

    Args:
        domain: The box.
        source: The right hand side f, [N, d] -> [N, 1].
        boundary: The boundary values g, [N, d] -> [N, 1].
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the faces.
        solution: The solution, if it is known.
        name: The name of the problem.
        sampling: Random directions to estimate the Laplacian from; None for the exact one.
    """
    interior = LossTerm(
        operators={"lap_u": Laplacian(sampling=sampling)},
        residual=partial(_residual, source),
        points=domain.interior(n_interior),
        name="interior",
    )
    return Problem(
        name=name,
        terms=(interior, dirichlet(boundary, domain.faces(n_boundary))),
        d_in=domain.dim,
        evaluation=domain.interior(10 * n_interior),
        solution=solution,
    )


def poisson2d(n_interior: int = 900, n_boundary: int = 120) -> Problem:
    """The product of sines on the unit square.

    -Δu = 2 π² sin(πx₁) sin(πx₂),    u = sin(πx₁) sin(πx₂)

    Source: arXiv 2405.15603 (the problem definitions of its experiments).
    """
    source = partial(_scaled, 2 * math.pi**2, _sines)
    return _with_solution("poisson2d", 2, source, _sines, n_interior, n_boundary)


def poisson5d(n_interior: int = 3000, n_boundary: int = 500) -> Problem:
    """The sum of cosines on the unit cube of dimension 5.

    -Δu = π² Σ_i cos(πx_i),    u = Σ_i cos(πx_i)

    Source: arXiv 2405.15603 (the problem definitions of its experiments).
    """
    source = partial(_scaled, math.pi**2, _cosines)
    return _with_solution("poisson5d", 5, source, _cosines, n_interior, n_boundary)


def poisson10d(n_interior: int = 3000, n_boundary: int = 500) -> Problem:
    """A harmonic polynomial on the unit cube of dimension 10, scaled to root mean square one.

    -Δu = 0,    u = Σ_i x_{2i-1} x_{2i} / 1.34

    Source: arXiv 2405.15603 (the problem definitions of its experiments).
    """
    source = partial(_constant, 0.0)
    return _with_solution("poisson10d", 10, source, _harmonic, n_interior, n_boundary)


def poisson100d(
    n_interior: int = 100, n_boundary: int = 50, sampling: RandomDirections | None = None
) -> Problem:
    """The squared norm on the unit cube of dimension 100, scaled to root mean square one.

    -Δu = -200 / 33.47,    u = |x|² / 33.47

    Args:
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the faces.
        sampling: Random directions to estimate the Laplacian from, e.g. ``RandomCoordinates(16)``,
            of which neither kind errs at the solution; None for the exact one.

    Source: arXiv 2405.15603 (the problem definitions of its experiments).
    """
    source = partial(_constant, -200 / 33.47)
    return _with_solution("poisson100d", 100, source, _squares, n_interior, n_boundary, sampling)


def _with_solution(
    name: str,
    dim: int,
    source: Callable[[Tensor], Tensor],
    solution: Callable[[Tensor], Tensor],
    n_interior: int,
    n_boundary: int,
    sampling: RandomDirections | None = None,
) -> Problem:
    """Build a problem on the unit cube whose boundary values are the solution's."""
    domain = Box.unit(dim)
    return poisson(domain, source, solution, n_interior, n_boundary, solution, name, sampling)


# Module-level functions and ``partial``, not closures, so that problems can be pickled.


def _residual(source: Callable[[Tensor], Tensor], x: Tensor, lap_u: Tensor) -> Tensor:
    return -lap_u - source(x)


def _scaled(factor: float, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return factor * function(x)


def _constant(value: float, x: Tensor) -> Tensor:
    return torch.full_like(x[:, :1], value)


def _sines(x: TensorOrJet) -> TensorOrJet:
    return torch.sin(math.pi * x[:, :1]) * torch.sin(math.pi * x[:, 1:])


def _cosines(x: TensorOrJet) -> TensorOrJet:
    return torch.cos(math.pi * x).sum(dim=-1, keepdim=True)


def _harmonic(x: TensorOrJet) -> TensorOrJet:
    return (x[:, 0::2] * x[:, 1::2]).sum(dim=-1, keepdim=True) / 1.34


def _squares(x: TensorOrJet) -> TensorOrJet:
    return (x**2).sum(dim=-1, keepdim=True) / 33.47
