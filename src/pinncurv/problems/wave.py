"""The wave equation on an interval."""

import math

import torch
from torch import Tensor

from pinncurv.diffops import Partial, Value
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.domains import SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.problem import Problem, TensorOrJet, zero


def wave1d(
    n_interior: int = 2500, n_boundary: int = 200, n_initial: int = 200, weight: float = 1.0
) -> Problem:
    """A string with two standing waves, released at rest.

    u_tt = 4 u_xx,    u = sin(πx) cos(2πt) + ½ sin(4πx) cos(8πt),    on [0, 1]²

    with u = 0 at both ends, and u and u_t = 0 given at the start.

    Args:
        n_interior: Number of points in space and time.
        n_boundary: Number of points at both ends.
        n_initial: Number of points at the start.
        weight: Weight of the conditions. The residual of the equation is larger than u by π² and
            more: 1000 lets the conditions count from the first step on.

    Source: S. Wang, X. Yu, P. Perdikaris, arXiv 2007.14527.
    """
    domain = SpaceTimeBox.unit(1)
    interior = LossTerm(
        operators={"u_tt": Partial(0, 0), "u_xx": Partial(1, 1)},
        residual=_residual,
        points=domain.interior(n_interior),
        name="interior",
    )
    initial = LossTerm(
        operators={"u": Value(), "u_t": Partial(0)},
        residual=_at_rest,
        points=domain.initial(n_initial),
        weight=weight,
        name="initial",
    )
    return Problem(
        name="wave1d",
        terms=(interior, dirichlet(zero, domain.lateral(n_boundary), weight), initial),
        d_in=2,
        evaluation=domain.interior(10_000),
        solution=_standing_waves,
        coordinates=("$t$", "$x$"),
    )


def _residual(x: Tensor, u_tt: Tensor, u_xx: Tensor) -> Tensor:
    return u_tt - 4 * u_xx


def _at_rest(x: Tensor, u: Tensor, u_t: Tensor) -> Tensor:
    return torch.cat([u - _standing_waves(x), u_t], 1)


def _standing_waves(x: TensorOrJet) -> TensorOrJet:
    t, x = math.pi * x[:, :1], math.pi * x[:, 1:]
    return torch.sin(x) * torch.cos(2 * t) + 0.5 * torch.sin(4 * x) * torch.cos(8 * t)
