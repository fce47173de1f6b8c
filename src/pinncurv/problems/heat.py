"""The heat equation, and the instances of arXiv 2405.15603 with known solutions."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pinncurv.diffops import Laplacian, Partial, RandomDirections
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.domains import SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.numbers import check_positive
from pinncurv.problems.problem import Problem, TensorOrJet


def heat(
    domain: SpaceTimeBox,
    conductivity: float,
    boundary: Callable[[Tensor], Tensor],
    n_interior: int,
    n_boundary: int,
    solution: Callable[[Tensor], Tensor] | None = None,
    name: str = "heat",
    sampling: RandomDirections | None = None,
) -> Problem:
    """The heat equation with Dirichlet data on the faces of a box, and initial values.

    u_t = κ Δu in the domain,    u = g on the spatial faces and at the start

    Args:
        domain: The box in space and the interval in time; a point is (t, x).
        conductivity: The number κ.
        boundary: The boundary and initial values g, [N, 1 + d] -> [N, 1].
        n_interior: Number of points in the domain.
        n_boundary: Number of points of the condition: half of them on the spatial faces at random
            times, half at the start.
        solution: The solution, if it is known.
        name: The name of the problem.
        sampling: Random directions to estimate the Laplacian from; None for the exact one.

    Raises:
        ValueError: If the conductivity is not positive and finite.
    """
    check_positive("conductivity", conductivity)
    space = tuple(range(1, domain.dim))
    interior = LossTerm(
        operators={"u_t": Partial(0), "lap_u": Laplacian(dims=space, sampling=sampling)},
        residual=partial(_residual, conductivity),
        points=domain.interior(n_interior),
        name="interior",
    )
    return Problem(
        name=name,
        terms=(interior, dirichlet(boundary, domain.lateral_and_initial(n_boundary))),
        d_in=domain.dim,
        evaluation=domain.interior(10 * n_interior),
        solution=solution,
        coordinates=("$t$", "$x$"),
    )


def heat1d(n_interior: int = 900, n_boundary: int = 120) -> Problem:
    """A decaying sine on the unit interval.

    u_t = u_xx / 4,    u = exp(-π² t / 4) sin(πx)

    Source: arXiv 2405.15603 (the problem definitions of its experiments).
    """
    domain = SpaceTimeBox.unit(1)
    return heat(domain, 0.25, _sine, n_interior, n_boundary, _sine, "heat1d")


def heat4d(n_interior: int = 3000, n_boundary: int = 500) -> Problem:
    """A decaying sum of sines on the unit cube of dimension 4.

    u_t = Δu / 4,    u = exp(-t) Σ_i sin(2 x_i)

    Source: arXiv 2405.15603 (the problem definitions of its experiments).
    """
    domain = SpaceTimeBox.unit(4)
    return heat(domain, 0.25, _sines, n_interior, n_boundary, _sines, "heat4d")


def _residual(conductivity: float, x: Tensor, u_t: Tensor, lap_u: Tensor) -> Tensor:
    return u_t - conductivity * lap_u


def _sine(x: TensorOrJet) -> TensorOrJet:
    return torch.exp(-(math.pi**2) / 4 * x[:, :1]) * torch.sin(math.pi * x[:, 1:])


def _sines(x: TensorOrJet) -> TensorOrJet:
    return torch.exp(-x[:, :1]) * torch.sin(2 * x[:, 1:]).sum(dim=-1, keepdim=True)
