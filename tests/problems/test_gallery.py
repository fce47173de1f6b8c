"""The problems of the gallery: their equations, once more with nested torch.func, and solutions.

An equation is a function of u, of one point with a vector as its value, and of the point; it
returns the terms of the equation, one row per component of the residual.
"""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, vmap

from pinncurv import problems
from tests.problems.shipped import GALLERY
from tests.problems.test_solutions import Known

PI = torch.pi
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


def _helmholtz(a: tuple[float, ...], k: float) -> Equation:
    def equation(u: Unknown, x: Tensor) -> Tensor:
        waves = torch.stack([torch.sin(f * PI * x[i]) for i, f in enumerate(a)]).prod()
        source = -(k**2 - PI**2 * sum(f * f for f in a)) * waves
        return torch.stack([hessian(u)(x)[0].trace(), k**2 * u(x)[0], source])[None]

    return equation


def _wave(u: Unknown, x: Tensor) -> Tensor:
    second = hessian(u)(x)[0]
    return torch.stack([second[0, 0], -4 * second[1, 1]])[None]


def _plate(u: Unknown, x: Tensor) -> Tensor:
    fourth = hessian(hessian(u))(x)[0]
    terms = [fourth[0, 0, 0, 0], fourth[1, 1, 1, 1], 2 * fourth[0, 0, 1, 1]]
    # the source by differentiation of the solution, a product of functions of one coordinate
    s, p = torch.sin(PI * x) ** 2, torch.cos(2 * PI * x)
    terms += [8 * PI**4 * p[0] * s[1], 8 * PI**4 * s[0] * p[1], -8 * PI**4 * p[0] * p[1]]
    return torch.stack(terms)[None]


def _multiscale(u: Unknown, x: Tensor) -> Tensor:
    source = [w**2 * PI**2 / 2 * torch.sin(w * PI * x).prod() for w in (4, 8, 12, 16)]
    return torch.stack([-hessian(u)(x)[0].trace(), *(-f for f in source)])[None]


def _convection(u: Unknown, x: Tensor) -> Tensor:
    first = jacfwd(u)(x)[0]
    return torch.stack([first[0], 30 * first[1]])[None]


def _reaction(u: Unknown, x: Tensor) -> Tensor:
    return torch.stack([jacfwd(u)(x)[0, 0], -5 * u(x)[0], 5 * u(x)[0] ** 2])[None]


def _kdv(u: Unknown, x: Tensor) -> Tensor:
    first, third = jacfwd(u)(x)[0], jacfwd(hessian(u))(x)[0, 1, 1, 1]
    return torch.stack([first[0], 6 * u(x)[0] * first[1], third])[None]


def _nls(h: Unknown, x: Tensor) -> Tensor:
    """Real and imaginary part of i h_t + ½ h_xx + |h|² h."""
    (u, v), first, second = h(x), jacfwd(h)(x), hessian(h)(x)
    size = u**2 + v**2
    real = torch.stack([-first[1, 0], second[0, 1, 1] / 2, size * u])
    return torch.stack([real, torch.stack([first[0, 0], second[1, 1, 1] / 2, size * v])])


def _black_scholes(v: Unknown, x: Tensor) -> Tensor:
    first, second, price = jacfwd(v)(x)[0], hessian(v)(x)[0], x[1]
    diffusion = -(0.2**2) / 2 * price**2 * second[1, 1]
    return torch.stack([first[0], diffusion, -0.05 * price * first[1], 0.05 * v(x)[0]])[None]


def _disk(u: Unknown, x: Tensor) -> Tensor:
    source = 13 * torch.sin(3 * x[0]) * torch.cos(2 * x[1])
    second = hessian(u)(x)[0]
    return torch.stack([-second[0, 0], -second[1, 1], -source])[None]


def _minus_laplacian(u: Unknown, x: Tensor) -> Tensor:
    second = hessian(u)(x)[0]
    return torch.stack([-second[0, 0], -second[1, 1]])[None]


EQUATIONS: dict[str, Equation] = {
    "kovasznay": _navier_stokes(1 / 40, 0),
    "beltrami": _navier_stokes(1.0, 1),
    "helmholtz": _helmholtz((1, 4), 1),
    "helmholtz_periodic3d": _helmholtz((1, 4, 3), 10),
    "wave1d": _wave,
    "biharmonic_plate": _plate,
    "poisson2d_multiscale": _multiscale,
    "convection": _convection,
    "reaction": _reaction,
    "kdv_two_solitons": _kdv,
    "nls": _nls,
    "black_scholes": _black_scholes,
    "poisson_disk": _disk,
    "poisson_l_shape": _minus_laplacian,
}


LAMBDA = -0.963740544195769  # of Kovasznay's flow at Re = 40

# What is published about the solutions, other than that they solve their equations: values at the
# start, or all of them.
PUBLISHED: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "kovasznay": lambda x: [
        1 - torch.exp(LAMBDA * x[:, 0]) * torch.cos(2 * PI * x[:, 1]),
        LAMBDA / (2 * PI) * torch.exp(LAMBDA * x[:, 0]) * torch.sin(2 * PI * x[:, 1]),
        0.5 - torch.exp(2 * LAMBDA * x[:, 0]) / 2,
    ],
    "wave1d": lambda x: [torch.sin(PI * x[:, 1]) + torch.sin(4 * PI * x[:, 1]) / 2],
    "convection": lambda x: [torch.sin(x[:, 1])],
    "reaction": lambda x: [torch.exp(-8 * ((x[:, 1] - PI) / PI) ** 2)],
    "nls": lambda x: [2 / torch.cosh(x[:, 1]), 0 * x[:, 1]],
    "black_scholes": lambda x: [torch.relu(x[:, 1] - 1)],
    "poisson_l_shape": lambda x: [
        # z^(2/3), with the cut of the power turned by 3π/4 out of the domain
        ((torch.complex(x[:, 0], x[:, 1]) / 1j**1.5) ** (2 / 3) * 1j).imag
    ],
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


@pytest.mark.parametrize("name", PUBLISHED)
def test_solution_is_the_published_one(name: str, generator: torch.Generator) -> None:
    """It agrees with what is known of it, written down a second time."""
    problem = GALLERY[name]()
    x = problem.evaluation.sample(generator, torch.float64, "cpu")[:50]
    if problem.coordinates and problem.coordinates[0] != "$x$":
        x[:, 0] = 0
    expected = torch.stack(PUBLISHED[name](x), 1).to(x)
    torch.testing.assert_close(problem.solution(x), expected, rtol=1e-12, atol=1e-12)


def test_solitons_pass_each_other(generator: torch.Generator) -> None:
    """Alone, each has height c / 2 and the shape of a squared hyperbolic secant."""
    solution = GALLERY["kdv_two_solitons"]().solution
    shape = torch.linspace(-2, 2, 9).double()
    for time, speed in ((2.5, 6.0), (5.0, 2.0)):
        x = torch.stack([torch.full((4001,), time), torch.linspace(0, 20, 4001)], 1).double()
        u = solution(x)[:, 0]
        height, place = (u.max(), x[u.argmax(), 1])
        assert height == pytest.approx(speed / 2, rel=1e-3)
        nearby = torch.stack([torch.full_like(shape, time), place + shape], 1)
        expected = speed / 2 / torch.cosh(speed**0.5 / 2 * shape) ** 2
        torch.testing.assert_close(solution(nearby)[:, 0], expected, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("name", GALLERY)
def test_float32(name: str, generator: torch.Generator) -> None:
    """Residuals follow the dtype of the points."""
    problem = GALLERY[name]()
    layers = [nn.Linear(problem.d_in, 7), nn.Tanh(), nn.Linear(7, problem.d_out)]
    model = nn.Sequential(*layers)
    for term, x in zip(problem.terms, _points(name, generator), strict=True):
        single = term.evaluate(model.float(), x.float())
        assert single.dtype == torch.float32
        double = term.evaluate(model.double(), x.float().double())
        tolerance = 1e-3 * double.abs().max().item()
        torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=tolerance)


# Numbers that may be negative, or zero; all others must be positive.
ANY_SIGN = {"rate", "speed", "wave_number", "kdv_two_solitons.start", "nls.start"}
OR_ZERO = {
    *("noise", "initial_weight", "weight", "start"),
    *(f"{name}.n_boundary" for name in ("convection", "helmholtz", "nls", "reaction")),
}


def _numbers() -> list[tuple[str, str]]:
    """Return the numbers that problems have as defaults, where nothing else must be given."""
    found = []
    for name, build in vars(problems).items():
        given = inspect.signature(build).parameters if inspect.isfunction(build) else {}
        defaults = {key: parameter.default for key, parameter in given.items()}
        if inspect.Parameter.empty not in defaults.values():
            found += [(name, key) for key, x in defaults.items() if type(x) in (int, float)]
    return [(name, key) for name, key in found if key not in ("dim", "start", "end")]


@pytest.mark.parametrize(("name", "argument"), _numbers())
def test_numbers_of_a_problem_are_checked(name: str, argument: str, shapes_unchecked: None) -> None:
    """Nothing that cannot be meant is left to the first step, or to an error of torch."""
    bad = [math.nan, math.inf]
    if not {argument, f"{name}.{argument}"} & ANY_SIGN:
        bad += [-1] if {argument, f"{name}.{argument}"} & OR_ZERO else [-1, 0]
    for value in bad:
        with pytest.raises(ValueError, match=" must "):
            getattr(problems, name)(**{argument: value})
