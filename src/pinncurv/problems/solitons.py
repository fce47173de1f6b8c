"""Two solitons of the Korteweg-de Vries equation, of which one overtakes the other."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pinncurv.diffops import Partial, Value
from pinncurv.problems.conditions import initial_and_lateral, neumann
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.problem import Problem, TensorOrJet
from pinncurv.problems.samplers import Fixed, Product, check_count

_C1, _C2 = 6.0, 2.0  # the speeds
_R1, _R2 = math.sqrt(_C1), math.sqrt(_C2)


def kdv_two_solitons(
    n_interior: int = 4000,
    n_boundary: int = 200,
    n_initial: int = 400,
    n_slope: int = 100,
    start: float = 0.0,
    end: float = 5.0,
    initial: Callable[[Tensor], Tensor] | None = None,
    initial_weight: float = 1.0,
) -> Problem:
    """A fast soliton that overtakes a slow one.

    u_t + 6 u u_x + u_xxx = 0,    ξ_i = x - c_i t - x_i,    c = (6, 2),    x_i = (-2, 2),
    u = 2 (c₁ - c₂) (c₁ cosh²(√c₂ ξ₂/2) + c₂ sinh²(√c₁ ξ₁/2)) / D²,
    D = (√c₁ - √c₂) cosh((√c₁ ξ₁ + √c₂ ξ₂)/2) + (√c₁ + √c₂) cosh((√c₁ ξ₁ - √c₂ ξ₂)/2),
    on [0, 5] x [0, 20]

    with u given at the start and at both ends, and u_x at the right end.

    Args:
        n_interior: Number of points in space and time.
        n_boundary: Number of points at both ends.
        n_initial: Number of points at the start.
        n_slope: Number of points at the right end, for u_x.
        start: The first time, of a time window.
        end: The last time.
        initial: The values at the first time, those of the closed form by default.
        initial_weight: The weight of the initial term.

    Source: arXiv 2405.04230 (the two-soliton problem of its experiments).
    """
    for count in (n_boundary, n_slope):
        check_count(count)
    domain = SpaceTimeBox(Box((0.0,), (20.0,)), start, end)
    conditions = initial_and_lateral(
        _two_solitons, domain, n_initial, n_boundary, initial, initial_weight
    )
    interior = LossTerm(
        operators={"u": Value(), "u_t": Partial(0), "u_x": Partial(1), "u_xxx": Partial(1, 1, 1)},
        residual=_residual,
        points=domain.interior(n_interior),
        name="interior",
    )
    right = Fixed(torch.full((n_slope, 1), 20.0, dtype=torch.float64))
    at_right = Product((Box((start,), (end,)).interior(n_slope), right))
    return Problem(
        name="kdv_two_solitons",
        terms=(
            interior,
            *conditions,
            neumann(_slope, domain.normal, at_right, name="slope"),
        ),
        d_in=2,
        evaluation=domain.interior(10_000),
        solution=_two_solitons,
        coordinates=("$t$", "$x$"),
    )


def _residual(x: Tensor, u: Tensor, u_t: Tensor, u_x: Tensor, u_xxx: Tensor) -> Tensor:
    return u_t + 6 * u * u_x + u_xxx


def _two_solitons(x: TensorOrJet) -> TensorOrJet:
    fast, slow = _halves(x)
    return 2 * (_C1 - _C2) * _numerator(fast, slow) / _root(fast, slow) ** 2


def _slope(x: Tensor) -> Tensor:
    """Return ∂u/∂x by the quotient rule, with ∂(√c_i ξ_i / 2)/∂x = √c_i / 2."""
    fast, slow = _halves(x)
    N, D = _numerator(fast, slow), _root(fast, slow)
    N_x = math.sqrt(_C1 * _C2) / 2 * (_R1 * torch.sinh(2 * slow) + _R2 * torch.sinh(2 * fast))
    D_x = (_C1 - _C2) / 2 * (torch.sinh(fast + slow) + torch.sinh(fast - slow))
    return 2 * (_C1 - _C2) * (N_x - 2 * N * D_x / D) / D**2


def _halves(x: TensorOrJet) -> tuple[TensorOrJet, TensorOrJet]:
    """Return √c_i ξ_i / 2 of both solitons."""
    t, x = x[:, :1], x[:, 1:]
    return _R1 / 2 * (x - _C1 * t + 2), _R2 / 2 * (x - _C2 * t - 2)


def _numerator(fast: TensorOrJet, slow: TensorOrJet) -> TensorOrJet:
    return _C1 * torch.cosh(slow) ** 2 + _C2 * torch.sinh(fast) ** 2


def _root(fast: TensorOrJet, slow: TensorOrJet) -> TensorOrJet:
    return (_R1 - _R2) * torch.cosh(fast + slow) + (_R1 + _R2) * torch.cosh(fast - slow)
