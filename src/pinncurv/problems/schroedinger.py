"""The cubic Schrödinger equation, as a system of two real equations."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pinncurv.diffops import Partial, Value
from pinncurv.problems.conditions import initial_and_lateral
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.problem import Problem, TensorOrJet


def nls(
    n_interior: int = 4000,
    n_boundary: int = 100,
    n_initial: int = 200,
    start: float = 0.0,
    end: float = math.pi / 2,
    initial: Callable[[Tensor], Tensor] | None = None,
    initial_weight: float = 1.0,
) -> Problem:
    """The two-soliton breather, h = u + iv.

    i h_t + ½ h_xx + |h|² h = 0,    h = 2 / cosh x at the start,
    h = 4 (cosh 3x + 3 e^{4it} cosh x) e^{it/2} / (cosh 4x + 4 cosh 2x + 3 cos 4t),
    on [0, π/2] x [-15, 15]

    The closed form is that on the whole line, which decays to 1e-6 at the ends: it is periodic up
    to a kink of that size there.

    Args:
        n_interior: Number of points in space and time.
        n_boundary: Number of points at both ends, where h is prescribed; 0 for networks that have
            the period 30 by themselves.
        n_initial: Number of points at the start.
        start: The first time, of a time window.
        end: The last time.
        initial: The values at the first time, those of the closed form by default.
        initial_weight: The weight of the initial term.

    Source: M. Raissi, P. Perdikaris, G. E. Karniadakis, Physics-informed neural networks, 2019,
    section 3.1.1; the closed form of J. Satsuma, N. Yajima, 1974.
    """
    domain = SpaceTimeBox(Box((-15.0,), (15.0,)), start, end)
    conditions = initial_and_lateral(
        _breather, domain, n_initial, n_boundary, initial, initial_weight
    )
    interior = LossTerm(
        operators={"h": Value(), "h_t": Partial(0), "h_xx": Partial(1, 1)},
        residual=_residual,
        points=domain.interior(n_interior),
        name="interior",
    )
    return Problem(
        name="nls",
        terms=(interior, *conditions),
        d_in=2,
        evaluation=domain.interior(10_000),
        d_out=2,
        solution=_breather,
        coordinates=("$t$", "$x$"),
        periodic={} if n_boundary else {1: (-15.0, 15.0)},
    )


def _residual(x: Tensor, h: Tensor, h_t: Tensor, h_xx: Tensor) -> Tensor:
    times_i = torch.cat([-h_t[:, 1:], h_t[:, :1]], 1)
    return times_i + 0.5 * h_xx + (h**2).sum(1, keepdim=True) * h


def _breather(x: TensorOrJet) -> TensorOrJet:
    t, x = x[:, :1], x[:, 1:]
    broad, narrow = torch.cosh(3 * x), 3 * torch.cosh(x)
    real = broad * torch.cos(t / 2) + narrow * torch.cos(4.5 * t)
    imaginary = broad * torch.sin(t / 2) + narrow * torch.sin(4.5 * t)
    total = torch.cosh(4 * x) + 4 * torch.cosh(2 * x) + 3 * torch.cos(4 * t)
    return 4 * torch.cat([real, imaginary], 1) / total
