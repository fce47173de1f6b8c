"""The viscous Burgers equation from a sine, with the solution of Cole and Hopf."""

import math
from functools import partial

import torch
from torch import Tensor

from pinncurv.diffops import Partial, Value
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.numbers import check_positive
from pinncurv.problems.problem import Problem, TensorOrJet, zero


def burgers(
    viscosity: float = 0.01 / math.pi,
    n_interior: int = 2000,
    n_initial: int = 200,
    n_boundary: int = 200,
    initial_weight: float = 1.0,
) -> Problem:
    """The viscous Burgers equation, in which a sine steepens to a layer at x = 0.

    u_t + u u_x = ν u_xx in [0, 1] x [-1, 1],    u = -sin(πx) at t = 0,    u = 0 at x = ±1

    Args:
        viscosity: The number ν > 0.
        n_interior: Number of points in the domain.
        n_initial: Number of points at the start.
        n_boundary: Number of points at both ends of the interval.
        initial_weight: Weight of the initial values.

    Raises:
        ValueError: If the viscosity is not positive and finite.

    Source: Raissi, Perdikaris, Karniadakis 2019, section 3.1.1; the solution is that of Basdevant
    et al. 1986.
    """
    check_positive("viscosity", viscosity)
    domain = SpaceTimeBox(Box.cube(1, -1.0, 1.0))
    interior = LossTerm(
        operators={"u": Value(), "u_t": Partial(0), "u_x": Partial(1), "u_xx": Partial(1, 1)},
        residual=partial(_residual, viscosity),
        points=domain.interior(n_interior),
        name="interior",
    )
    return Problem(
        name="burgers",
        terms=(
            interior,
            dirichlet(_sine, domain.initial(n_initial), initial_weight, "initial"),
            dirichlet(zero, domain.lateral(n_boundary)),
        ),
        d_in=2,
        evaluation=domain.interior(10 * n_interior),
        solution=partial(cole_hopf, viscosity),
        coordinates=("$t$", "$x$"),
    )


def cole_hopf(viscosity: float, x: TensorOrJet) -> TensorOrJet:
    """Evaluate the solution of Burgers' equation from -sin(πx), for times up to one.

    u = -∫ sin(πy) f(y) e^{-s²} ds / ∫ f(y) e^{-s²} ds,
    y = x - 2 sqrt(νt) s,    f(y) = exp(-cos(πy) / (2πν))

    The integrands are analytic and vanish rapidly, so that the trapezoidal rule converges
    exponentially. Its step resolves the narrowest peak, exp(-(1 + πt) s²), and the waves in y, and
    its range contains the farthest peaks, those at x = 0, which lie at |s| < 0.4 / sqrt(ν). Sums
    are taken relative to their largest summand, so that no exponential of 1/ν overflows.

    Args:
        viscosity: The number ν.
        x: Points (t, x), [N, 2] in float64 for an accuracy of 1e-13; a jet for t > 0 only, as the
            square root has no derivative at 0.
    """
    reach = 0.4 / math.sqrt(viscosity) + 7.0
    step = 0.2 / (1 + 4 * math.sqrt(viscosity))
    count = math.ceil(reach / step)
    s = step * torch.arange(-count, count + 1, dtype=x.dtype, device=x.device)
    y = math.pi * (x[:, 1:] - 2 * math.sqrt(viscosity) * torch.sqrt(x[:, :1]) * s)
    exponent = torch.cos(y) / (-2 * math.pi * viscosity) - s**2
    return -(torch.softmax(exponent, 1) * torch.sin(y)).sum(dim=1, keepdim=True)


def _residual(
    viscosity: float, x: Tensor, u: Tensor, u_t: Tensor, u_x: Tensor, u_xx: Tensor
) -> Tensor:
    return u_t + u * u_x - viscosity * u_xx


def _sine(x: TensorOrJet) -> TensorOrJet:
    return -torch.sin(math.pi * x[:, 1:])
