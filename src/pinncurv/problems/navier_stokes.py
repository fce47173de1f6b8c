"""Incompressible flow, and the two flows with closed forms: Kovasznay's and Beltrami's."""

import math
from functools import partial

import torch
from torch import Tensor

from pinncurv.diffops import Gradient, Laplacian, Partial, Value
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.numbers import check_positive
from pinncurv.problems.problem import Problem, TensorOrJet
from pinncurv.problems.samplers import Sampler


def navier_stokes(
    points: Sampler, viscosity: float, steady: bool = True, name: str = "interior"
) -> LossTerm:
    """The balances of momentum and mass of an incompressible flow, as one term.

    u_t + (u·∇)u + ∇p - ν Δu = 0,    div u = 0

    The unknown has a column for each component of the velocity u, and the pressure p as last one;
    so has the residual: the momentum along each coordinate, then the mass.

    Args:
        points: Where the equations hold; a point is x, or (t, x) if the flow is not steady.
        viscosity: The number ν, one over the Reynolds number.
        steady: Whether there is no time.
        name: The name of the term.
    """
    space = tuple(range(0 if steady else 1, points.dim))
    operators = {"u": Value(), "grad": Gradient(dims=space), "lap": Laplacian(dims=space)}
    return LossTerm(
        operators=operators if steady else {**operators, "u_t": Partial(0)},
        residual=partial(_balances, viscosity),
        points=points,
        name=name,
    )


def kovasznay(n_interior: int = 2601, n_boundary: int = 400, reynolds: float = 40.0) -> Problem:
    """The flow behind a grid, steady and in two dimensions.

    u = 1 - e^{λx} cos 2πy,    v = λ/(2π) e^{λx} sin 2πy,    p = (1 - e^{2λx})/2,
    λ = Re/2 - √(Re²/4 + 4π²),    on [-0.5, 1] x [-0.5, 1.5]

    The velocity is given on the boundary, and the pressure is free up to a constant.

    Args:
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the faces.
        reynolds: The Reynolds number Re.

    Raises:
        ValueError: If the Reynolds number is not positive and finite.

    Source: L. I. G. Kovasznay, Laminar flow behind a two-dimensional grid, 1948.
    """
    check_positive("Reynolds number", reynolds)
    domain = Box((-0.5, -0.5), (1.0, 1.5))
    rate = reynolds / 2 - math.sqrt(reynolds**2 / 4 + 4 * math.pi**2)
    velocity = partial(_kovasznay_velocity, rate)
    return Problem(
        name="kovasznay",
        terms=(
            navier_stokes(domain.interior(n_interior), 1 / reynolds),
            dirichlet(velocity, domain.faces(n_boundary), components=(0, 1)),
        ),
        d_in=2,
        evaluation=domain.interior(10_000),
        d_out=3,
        solution=partial(_kovasznay, rate),
        coordinates=("$x$", "$y$"),
        free_constants=(2,),
    )


def beltrami(n_interior: int = 2601, n_boundary: int = 4056, n_initial: int = 676) -> Problem:
    """The decaying flow whose vorticity is parallel to its velocity, in three dimensions.

    u = -(e^x sin(y + z) + e^z cos(x + y)) e^{-t},  v and w with x, y, z in cyclic order,
    p = -½ (e^{2x} + 2 sin(x + y) cos(z + x) e^{y + z} + cyclic) e^{-2t},  ν = 1,
    on [0, 1] x [-1, 1]³

    The velocity is given at the start, and velocity and pressure on the spatial boundary: without
    it, the pressure would be free up to a function of time.

    Args:
        n_interior: Number of points in space and time.
        n_boundary: Number of points on the spatial faces, at random times.
        n_initial: Number of points at the start.

    Source: C. R. Ethier, D. A. Steinman, Exact fully 3D Navier-Stokes solutions for benchmarking,
    1994, with a = d = 1.
    """
    domain = SpaceTimeBox(Box.cube(3, -1.0, 1.0))
    start = domain.initial(n_initial)
    return Problem(
        name="beltrami",
        terms=(
            navier_stokes(domain.interior(n_interior), 1.0, steady=False),
            dirichlet(_beltrami, domain.lateral(n_boundary)),
            dirichlet(_beltrami_velocity, start, name="initial", components=(0, 1, 2)),
        ),
        d_in=4,
        evaluation=domain.interior(10_000),
        d_out=4,
        solution=_beltrami,
        coordinates=("$t$", "$x$", "$y$", "$z$"),
    )


def _balances(
    viscosity: float, x: Tensor, u: Tensor, grad: Tensor, lap: Tensor, u_t: Tensor | float = 0.0
) -> Tensor:
    d = u.shape[1] - 1
    transport = (grad[:, :d] * u[:, :d].unsqueeze(1)).sum(2)
    momentum = transport + grad[:, d] - viscosity * lap[:, :d]
    if isinstance(u_t, Tensor):
        momentum = momentum + u_t[:, :d]
    mass = torch.stack([grad[:, i, i] for i in range(d)], 1).sum(1, keepdim=True)
    return torch.cat([momentum, mass], 1)


def _kovasznay_velocity(rate: float, x: TensorOrJet) -> TensorOrJet:
    growth, angle = torch.exp(rate * x[:, :1]), 2 * math.pi * x[:, 1:]
    across = rate / (2 * math.pi) * growth * torch.sin(angle)
    return torch.cat([1 - growth * torch.cos(angle), across], 1)


def _kovasznay(rate: float, x: TensorOrJet) -> TensorOrJet:
    pressure = (1 - torch.exp(2 * rate * x[:, :1])) / 2
    return torch.cat([_kovasznay_velocity(rate, x), pressure], 1)


def _cyclic(x: TensorOrJet) -> tuple[TensorOrJet, TensorOrJet, TensorOrJet]:
    """Return x, y, z and the same two more times, one and two places on, as columns of three."""
    return x[:, 1:], torch.cat([x[:, 2:], x[:, 1:2]], 1), torch.cat([x[:, 3:], x[:, 1:3]], 1)


def _beltrami_velocity(x: TensorOrJet) -> TensorOrJet:
    a, b, c = _cyclic(x)
    shape = torch.exp(a) * torch.sin(b + c) + torch.exp(c) * torch.cos(a + b)
    return -shape * torch.exp(-x[:, :1])


def _beltrami(x: TensorOrJet) -> TensorOrJet:
    a, b, c = _cyclic(x)
    parts = torch.exp(2 * a) + 2 * torch.sin(a + b) * torch.cos(c + a) * torch.exp(b + c)
    pressure = -0.5 * parts.sum(1, keepdim=True) * torch.exp(-2 * x[:, :1])
    return torch.cat([_beltrami_velocity(x), pressure], 1)
