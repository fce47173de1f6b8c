"""Inverse problems: fields and sources fit each other, and training finds the unknown field."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacfwd, vmap

from pinncurv.curvature import GaussNewton, Objective
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer, QuadraticModel, ShortStepDamping
from pinncurv.problems import (
    UnknownSource,
    heat_coefficient,
    poisson_coefficient,
    poisson_source,
)

PI = torch.pi
COEFFICIENTS = {"heat_coefficient": heat_coefficient, "poisson_coefficient": poisson_coefficient}


class _Known(nn.Module):
    def __init__(self, solution) -> None:
        super().__init__()
        self.solution = solution

    def forward(self, x: Tensor) -> Tensor:
        return self.solution(x)


def _network(d_in: int, d_out: int, width: int = 12) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(d_in, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, d_out)).double()


def _divergence(fields, x: Tensor) -> Tensor:
    """∇·(a ∇u) in the last two coordinates, of one point, without the product rule."""

    def flux(y: Tensor) -> Tensor:
        return fields(y)[1] * jacfwd(fields)(y)[0, -2:]

    return jacfwd(flux)(x)[:, -2:].trace()


def _heat_terms(fields, x: Tensor) -> Tensor:
    t, s = torch.exp(-x[0]), torch.sin(PI * x[1]) * torch.sin(PI * x[2])
    # f = u_t - ∇·(a ∇u) with u = t s, a = 2 + s, by hand
    slopes = (torch.cos(PI * x[1]) * torch.sin(PI * x[2])) ** 2
    slopes = slopes + (torch.sin(PI * x[1]) * torch.cos(PI * x[2])) ** 2
    source = -t * s + 2 * PI**2 * t * s * (2 + s) - PI**2 * t * slopes
    return torch.stack([jacfwd(fields)(x)[0, 0], -_divergence(fields, x), -source])


def _poisson_terms(fields, x: Tensor) -> Tensor:
    a = 1 / (1 + x[0] ** 2 + x[1] ** 2 + (x[0] - 1) ** 2 + (x[1] - 1) ** 2)
    sx, sy, cx, cy = *torch.sin(PI * x), *torch.cos(PI * x)
    mixed = (2 * x[0] - 1) * cx * sy + (2 * x[1] - 1) * sx * cy
    source = 2 * PI**2 * a * sx * sy + 2 * PI * a**2 * mixed
    return torch.stack([-_divergence(fields, x), -source])


TERMS = {"heat_coefficient": _heat_terms, "poisson_coefficient": _poisson_terms}


def _terms(name: str, model, x: Tensor) -> Tensor:
    return vmap(lambda point: TERMS[name](lambda y: model(y[None])[0], point))(x)


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_solution_solves_the_equation(name: str, generator: torch.Generator) -> None:
    problem = COEFFICIENTS[name](n_interior=30)
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    terms = _terms(name, problem.solution, x)
    assert (terms.sum(1).abs() <= 1e-12 * terms.abs().sum(1)).all()
    residual = problem.terms[0].evaluate(_Known(problem.solution), x)
    assert residual.shape == (30, 2 if name == "heat_coefficient" else 1)
    assert (residual.abs() <= 1e-12 * terms.abs().sum(1, keepdim=True)).all()


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_residual_of_a_network(name: str, generator: torch.Generator) -> None:
    """Also where the second output depends on time, which is a residual of its own."""
    problem = COEFFICIENTS[name](n_interior=9)
    model = _network(problem.d_in, 2)
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    residual = problem.terms[0].evaluate(model, x)
    torch.testing.assert_close(residual[:, 0], _terms(name, model, x).sum(1).detach())
    if name == "heat_coefficient":
        slopes = vmap(jacfwd(lambda y: model(y[None])[0, 1]))(x)
        torch.testing.assert_close(residual[:, 1], slopes[:, 0].detach())


@pytest.mark.parametrize("name", COEFFICIENTS)
def test_coefficient_is_known_on_the_boundary(name: str, generator: torch.Generator) -> None:
    problem = COEFFICIENTS[name]()
    walls = problem.terms[1].points.sample(generator, torch.float64, "cpu")
    bounds = (-1.0, 1.0) if name == "heat_coefficient" else (0.0, 1.0)
    assert ((walls[:, -2:] == bounds[0]) | (walls[:, -2:] == bounds[1])).any(1).all()
    fields = problem.solution(walls)
    wrong = fields + torch.tensor([5.0, 0.25])  # the first of which is not looked at
    residual = problem.terms[1].apply(walls, {"u": wrong})
    torch.testing.assert_close(residual, torch.full_like(residual, 0.25))


@pytest.mark.parametrize("build", [*COEFFICIENTS.values(), poisson_source])
def test_measurements_have_the_noise_and_stay(build, generator: torch.Generator) -> None:
    problem = pickle.loads(pickle.dumps(build(noise=0.3)))
    term = problem.terms[2]
    x = term.points.sample(generator, torch.float64, "cpu")
    errors = term.data["y"] - problem.solution(x)[:, :1]
    n = len(errors)
    assert abs(errors.std() - 0.3) < 4 * 0.3 / (2 * n) ** 0.5
    assert errors.mean().abs() < 4 * 0.3 / n**0.5
    again = build(noise=0.3).terms[2]
    assert torch.equal(again.data["y"], term.data["y"])
    assert torch.equal(again.points.points, term.points.points)
    exact = build(noise=0.0).terms[2]
    assert exact.apply(x, {"u": problem.solution(x)}).abs().max() == 0
    with pytest.raises(ValueError, match=r"must be a standard deviation >= 0, got -0\.1"):
        build(noise=-0.1)


def _train(problem, model, generator, steps, damping, rule=None) -> None:
    objective = Objective.sample(model, problem, generator)
    optimizer = CurvatureOptimizer(
        objective.parameters(),
        GaussNewton(),
        Damped(damping),
        step_size=QuadraticModel(),
        damping_rule=rule,
    )
    for _ in range(steps):
        optimizer.step(objective)


def test_training_finds_a_coefficient(generator: torch.Generator) -> None:
    problem, model = poisson_coefficient(300, 60, 300, noise=0.001), _network(2, 2)
    x = problem.evaluation.sample(generator, torch.float64, "cpu")
    before = problem.errors(model, x).components[1]
    rule = ShortStepDamping(short=2**-4, long=0.5, minimum=1e-12)
    _train(problem, model, generator, 100, 1e-8, rule)
    after = problem.errors(model, x).components
    assert before > 0.3
    assert after[0] < 0.01
    assert after[1] < 0.02


@pytest.mark.slow
def test_training_finds_a_source(generator: torch.Generator) -> None:
    """Its error is known to its residual, and its parameters are trained with those of u."""
    torch.manual_seed(5)
    source = nn.Sequential(nn.Linear(2, 10), nn.Tanh(), nn.Linear(10, 1)).double()
    problem, model = poisson_source(150, 60, 150, 0.0, source), _network(2, 1)
    residual = problem.terms[0].residual
    assert isinstance(residual, UnknownSource)
    x = problem.evaluation.sample(generator, torch.float64, "cpu")
    assert residual.relative_error(x) > 0.5
    _train(problem, model, generator, 80, 1e-6)
    assert problem.errors(model, x).relative < 0.01
    assert residual.relative_error(x) < 0.15


def test_default_source_is_always_the_same() -> None:
    """And leaves torch's own generator alone."""
    state = torch.get_rng_state()
    one, other = (poisson_source().terms[0].residual for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for mine, its in zip(one.parameters(), copy.deepcopy(other).parameters(), strict=True):
        assert torch.equal(mine, its)
        assert mine is not its


def test_source_is_that_of_the_solution(generator: torch.Generator) -> None:
    problem = poisson_source(20, source=_network(2, 1))
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    residual = problem.terms[0].residual
    residual.source = _Known(residual.exact)
    assert problem.terms[0].evaluate(_Known(problem.solution), x).abs().max() < 1e-12
    assert residual.relative_error(x) == 0
    walls = problem.terms[1].points.sample(generator, torch.float64, "cpu")
    assert problem.terms[1].apply(walls, {"u": problem.solution(walls)}).abs().max() < 1e-15
