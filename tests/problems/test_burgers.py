"""Burgers' equation: the solution of Cole and Hopf against other quadratures, and the terms."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn
from torch.func import grad, hessian

from pinncurv.problems import burgers
from tests.problems.oracles import terms_of

DEFAULT = 0.01 / math.pi


def _by_adaptive_quadrature(viscosity: float, t: float, x: float) -> float:
    """The quotient of integrals over η, weighted relative to the largest integrand."""

    def exponent(eta):
        return -np.cos(np.pi * (x - eta)) / (2 * np.pi * viscosity) - eta**2 / (4 * viscosity * t)

    reach = 6.0
    grid = np.linspace(-reach, reach, 20001)
    largest, where = exponent(grid).max(), grid[exponent(grid).argmax()]
    integrals = [
        quad(
            lambda eta, f=f: f(eta) * np.exp(exponent(eta) - largest),
            *(-reach, reach),
            points=sorted({where, -where, 0.0}),
            epsabs=1e-12,
            epsrel=1e-11,
            limit=500,
        )[0]
        for f in (lambda eta: np.sin(np.pi * (x - eta)), np.ones_like)
    ]
    return -integrals[0] / integrals[1]


@pytest.mark.parametrize("viscosity", [DEFAULT, 0.1, 0.002])
@pytest.mark.parametrize("t", [0.01, 0.3, 0.6, 1.0])
def test_solution_is_that_of_an_adaptive_quadrature(viscosity: float, t: float) -> None:
    solution = burgers(viscosity).solution
    for x in (0.0, 1e-3, 0.02, -0.3, 0.97):
        point = torch.tensor([[t, x]], dtype=torch.float64)
        expected = _by_adaptive_quadrature(viscosity, t, x)
        assert solution(point).item() == pytest.approx(expected, abs=1e-11)


def _oracle(u, x: Tensor) -> Tensor:
    return torch.stack([grad(u)(x)[0], u(x) * grad(u)(x)[1], -DEFAULT * hessian(u)(x)[1, 1]])


class _Known(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return burgers().solution(x)


def test_solution_solves_the_equation(generator: torch.Generator) -> None:
    """By nested torch.func and by jets, also in the layer and soon after the start."""
    problem = burgers(n_interior=60)
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    x[:20, 1] *= 0.01
    x[20:30, 0] *= 1e-5
    terms = terms_of(_oracle, problem.solution, x)
    assert terms.abs().max() > 50
    assert (terms.sum(1).abs() <= 1e-11 * terms.abs().sum(1)).all()
    residual = problem.terms[0].evaluate(_Known(), x)
    assert (residual[:, 0].abs() <= 1e-11 * terms.abs().sum(1)).all()


def test_conditions_hold(generator: torch.Generator) -> None:
    """The initial values are those at t = 0, not near it, and the ends do not move."""
    problem = burgers()
    start, ends = problem.sample(generator, torch.float64, "cpu")[1:]
    torch.testing.assert_close(problem.solution(start), -torch.sin(math.pi * start[:, 1:]))
    assert start[:, 0].abs().max() == 0
    assert (ends[:, 1].abs() == 1).all()
    for term, x in zip(problem.terms[1:], (start, ends), strict=True):
        assert term.apply(x, {"u": problem.solution(x)}).abs().max() < 1e-13


def test_residual_of_a_network(generator: torch.Generator) -> None:
    problem = burgers(n_interior=8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    expected = terms_of(_oracle, model, x).sum(1)
    torch.testing.assert_close(problem.terms[0].evaluate(model, x)[:, 0], expected)


def test_float32(generator: torch.Generator) -> None:
    solution = burgers().solution
    x = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    assert solution(x.float()).dtype == torch.float32
    torch.testing.assert_close(solution(x.float()).double(), solution(x), rtol=1e-3, atol=1e-3)


def test_viscosity_is_positive() -> None:
    with pytest.raises(ValueError, match=r"viscosity must be positive and finite, got 0\.0"):
        burgers(0.0)
