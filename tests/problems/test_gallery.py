"""The problems of the gallery: their equations, once more with nested torch.func, and solutions.

An equation is a function of u, of one point with a vector as its value, and of the point; it
returns the terms of the equation, one row per component of the residual.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, vmap

from tests.problems.shipped import GALLERY
from tests.problems.test_solutions import Known

Unknown = Callable[[Tensor], Tensor]
Equation = Callable[[Unknown, Tensor], Tensor]


def _navier_stokes(viscosity: float, time: int) -> Equation:
    """Momentum and mass, derivative by derivative; time is 1 where there is one, else 0."""

    def equation(u: Unknown, x: Tensor) -> Tensor:
        d = len(x) - time
        value, first, second = u(x), jacfwd(u)(x), hessian(u)(x)
        rows = []
        for i in range(d):
            transport = [value[j] * first[i, time + j] for j in range(d)]
            diffusion = [-viscosity * second[i, time + j, time + j] for j in range(d)]
            inertia = first[i, 0] if time else 0 * value[0]
            rows.append(torch.stack([inertia, first[d, time + i], *transport, *diffusion]))
        mass = torch.stack([first[i, time + i] for i in range(d)])
        rows.append(torch.cat([mass, mass.new_zeros(len(rows[0]) - d)]))
        return torch.stack(rows)

    return equation


EQUATIONS: dict[str, Equation] = {
    "kovasznay": _navier_stokes(1 / 40, 0),
    "beltrami": _navier_stokes(1.0, 1),
}


def _points(name: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    batches = GALLERY[name]().sample(generator, torch.float64, "cpu")
    return tuple(x[torch.randperm(len(x), generator=generator)[:8]] for x in batches)


def _terms(name: str, u: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Evaluate the terms of the equation in the domain, [N, components, number of terms]."""
    return vmap(lambda point: EQUATIONS[name](lambda y: u(y[None])[0], point))(x)


@pytest.mark.parametrize("name", GALLERY)
def test_solution_solves_the_equation(name: str, generator: torch.Generator) -> None:
    """By torch.func and by jets, the solution leaves rounding errors in the domain."""
    problem = GALLERY[name]()
    x = _points(name, generator)[0]
    terms = _terms(name, problem.solution, x)
    scale = terms.abs().sum(2)
    assert (scale > 1e-3).any(0).all()
    assert (terms.sum(2).abs() <= 1e-11 * scale).all()
    residual = problem.terms[0].evaluate(Known(problem), x)
    assert residual.shape == scale.shape
    assert (residual.abs() <= 1e-11 * scale).all()


@pytest.mark.parametrize("name", GALLERY)
def test_conditions_hold_at_the_solution(name: str, generator: torch.Generator) -> None:
    """Every other term of the loss vanishes there."""
    problem = GALLERY[name]()
    for term, x in zip(problem.terms[1:], _points(name, generator)[1:], strict=True):
        residual = term.evaluate(Known(problem), x)
        assert residual.abs().max() <= 1e-12, term.name


@pytest.mark.parametrize("name", GALLERY)
def test_residual_of_a_network_is_the_equation(name: str, generator: torch.Generator) -> None:
    """Away from the solution the loss term agrees with the equation, sign included."""
    problem = GALLERY[name]()
    layers = [nn.Linear(problem.d_in, 7), nn.Tanh(), nn.Linear(7, problem.d_out)]
    model = nn.Sequential(*layers).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7, generator=generator)
    constants = {k: p.detach() for k, p in model.named_parameters()}
    x = _points(name, generator)[0]
    terms = _terms(name, lambda y: functional_call(model, constants, (y,)), x)
    residual = problem.terms[0].evaluate(model, x)
    assert ((residual - terms.sum(2)).abs() <= 1e-11 * terms.abs().sum(2)).all()


@pytest.mark.parametrize("name", GALLERY)
def test_network_that_is_wrong_violates_the_conditions(
    name: str, generator: torch.Generator
) -> None:
    """No condition is void: a network of random weights fails every component of each."""
    problem = GALLERY[name]()
    model = nn.Sequential(nn.Linear(problem.d_in, problem.d_out), nn.Tanh()).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, 0.2, 0.7, generator=generator)
    for term, x in zip(problem.terms[1:], _points(name, generator)[1:], strict=True):
        assert (term.evaluate(model, x).abs().amax(0) > 1e-3).all(), term.name
