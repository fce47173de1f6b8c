"""Periodic problems: their computed references against other methods, and the equations."""

import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn
from torch.func import grad

from pinncurv.curvature import Objective
from pinncurv.problems import (
    Ansatz,
    Fixed,
    NotPeriodic,
    PeriodicEmbedding,
    Problem,
    allen_cahn,
    convection,
    helmholtz,
    kdv,
    kuramoto_sivashinsky,
    nls,
    periodic,
    warn_unless_periodic,
)
from pinncurv.problems.periodic_reference import PeriodicReference, _table
from tests.problems.oracles import terms_of

PI = np.pi
PROBLEMS = {"allen_cahn": allen_cahn, "kdv": kdv, "kuramoto_sivashinsky": kuramoto_sivashinsky}


def _allen_cahn(u: Callable, x: Tensor) -> Tensor:
    value = u(x)
    second = grad(lambda y: grad(u)(y)[1])(x)[1]
    return torch.stack([grad(u)(x)[0], -1e-4 * second, 5 * value**3, -5 * value])


def _kdv(u: Callable, x: Tensor) -> Tensor:
    third = grad(lambda z: grad(lambda y: grad(u)(y)[1])(z)[1])(x)[1]
    return torch.stack([grad(u)(x)[0], u(x) * grad(u)(x)[1], 0.022**2 * third])


def _kuramoto_sivashinsky(u: Callable, x: Tensor) -> Tensor:
    second = lambda z: grad(lambda y: grad(u)(y)[1])(z)[1]  # noqa: E731
    fourth = grad(lambda z: grad(second)(z)[1])(x)[1]
    first = grad(u)(x)
    return torch.stack(
        [first[0], 6.25 * u(x) * first[1], 0.390625 * second(x), 0.00152587890625 * fourth]
    )


EQUATIONS = {"allen_cahn": _allen_cahn, "kdv": _kdv, "kuramoto_sivashinsky": _kuramoto_sivashinsky}

# Right hand side by complex FFTs without dealiasing, u(0), x in [lower, upper], points, end.
LINES = {
    "allen_cahn": (
        lambda u, d: 1e-4 * d(u, 2) - 5 * u**3 + 5 * u,
        lambda x: x**2 * np.cos(PI * x),
        *(-1.0, 1.0, 2048, 0.3),
    ),
    "kdv": (
        lambda u, d: -u * d(u, 1) - 0.022**2 * d(u, 3),
        lambda x: np.cos(PI * x),
        *(-1.0, 1.0, 160, 0.2),
    ),
    "kuramoto_sivashinsky": (
        lambda u, d: -6.25 * u * d(u, 1) - 100 / 256 * d(u, 2) - 100 / 65536 * d(u, 4),
        lambda x: np.cos(x) * (1 + np.sin(x)),
        *(0.0, 2 * PI, 160, 0.06),
    ),
}


def _points(problem: Problem, n: int, generator: torch.Generator) -> Tensor:
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")[:n]
    x[:, 0] = 0.02 + 0.97 * x[:, 0]  # later than the layer in time that the kink makes
    return x


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_is_that_of_the_method_of_lines(name: str) -> None:
    """By an explicit integrator with error control, on points of its own."""
    right, initial, lower, upper, n, end = LINES[name]
    x = lower + (upper - lower) * np.arange(n) / n
    waves = 2j * PI / (upper - lower) * np.fft.fftfreq(n, 1 / n)

    def derivative(u, order):
        return np.fft.ifft(waves**order * np.fft.fft(u)).real

    solved = solve_ivp(
        lambda t, u: right(u, derivative),
        (0, end),
        initial(x),
        method="DOP853",
        rtol=1e-9,
        atol=1e-10,
        first_step=1e-6,
        t_eval=[end / 3, end],
    )
    for t, expected in zip(solved.t, solved.y.T, strict=True):
        points = torch.tensor(np.stack([np.full(n, t), x], 1))
        error = PROBLEMS[name]().solution(points)[:, 0].numpy() - expected
        accuracy = 3e-6 if name == "allen_cahn" else 1e-7  # of the lines, because of the kink
        assert np.linalg.norm(error) < accuracy * np.linalg.norm(expected)


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_has_converged(name: str, generator: torch.Generator) -> None:
    """With half the steps and three quarters of the points it is the same to 1e-6."""
    problem = PROBLEMS[name]()
    reference = problem.solution
    assert isinstance(reference, PeriodicReference)
    steps, snapshots = reference.steps // 2, reference.snapshots // 2
    coarse = replace(reference, n=reference.n * 3 // 4, steps=steps, snapshots=snapshots)
    x = _points(problem, 2000, generator)
    x[:500, 0] = 1.0
    expected = reference(x)
    assert (coarse(x) - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_solves_the_equation(name: str, generator: torch.Generator) -> None:
    """The interpolant, differentiated by nested torch.func."""
    problem = PROBLEMS[name]()
    terms = terms_of(EQUATIONS[name], problem.solution, _points(problem, 200, generator))
    assert terms.sum(1).norm() < 1e-6 * terms.norm()


@pytest.mark.parametrize("name", PROBLEMS)
def test_reference_is_periodic_and_starts_at_the_initial_values(name: str) -> None:
    problem = PROBLEMS[name]()
    start, points = problem.solution, problem.terms[1].points
    x = points.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    assert x[:, 0].abs().max() == 0
    residual = problem.terms[1].apply(x, {"u": start(x)})
    assert residual.norm() < (1e-4 if name == "allen_cahn" else 1e-9) * len(x) ** 0.5
    shift = torch.tensor(
        [0.3, 2.0 if name != "kuramoto_sivashinsky" else 2 * PI], dtype=torch.float64
    )
    moved = torch.cat([x[:, :1] + 0.3, x[:, 1:]], 1)
    torch.testing.assert_close(start(x + shift), start(moved), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_residual_of_a_network(name: str, generator: torch.Generator) -> None:
    problem = PROBLEMS[name](n_interior=8)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    expected = terms_of(EQUATIONS[name], model, x).sum(1)
    torch.testing.assert_close(problem.terms[0].evaluate(model, x)[:, 0], expected)


def test_reference_goes_through_a_file_and_to_float32(generator: torch.Generator) -> None:
    problem = pickle.loads(pickle.dumps(kdv()))
    x = problem.evaluation.sample(generator, torch.float64, "cpu")[:100]
    torch.testing.assert_close(problem.solution(x), kdv().solution(x), rtol=0, atol=0)
    assert problem.solution(x.float()).dtype == torch.float32
    torch.testing.assert_close(
        problem.solution(x.float()).double(), problem.solution(x), atol=1e-4, rtol=0
    )


def test_reference_is_computed_once(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """Not when a problem is made, and not again while the file is whole."""
    monkeypatch.setenv("PINNCURV_CACHE", str(tmp_path / "new" / "folder"))
    reference = replace(kdv().solution, n=64, steps=200, snapshots=20)
    calls = []
    solve = type(reference.equation).solve
    monkeypatch.setattr(
        type(reference.equation),
        "solve",
        lambda *given, **named: calls.append(1) or solve(*given, **named),
    )
    x = torch.tensor([[0.5, 0.1], [0.1, -0.9]], dtype=torch.float64)
    assert not calls
    expected = reference(x)
    (path,) = (tmp_path / "new" / "folder").iterdir()
    reference(x)
    assert len(calls) == 1
    _table.cache_clear()
    assert torch.equal(reference(x), expected)
    assert len(calls) == 1
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    for content in (whole[:1000], b"", bytes(damaged), b"no archive"):
        path.write_bytes(content)
        _table.cache_clear()
        assert torch.equal(reference(x), expected)
        assert path.read_bytes()[:100] == whole[:100]
    assert len(calls) == 5
    assert os.listdir(path.parent) == [path.name]


def test_reference_is_not_that_of_another_definition(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PINNCURV_CACHE", str(tmp_path))
    reference = replace(kdv().solution, n=64, steps=2000, snapshots=20)
    x = torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    reference(x)
    for other in (
        replace(reference, initial=kuramoto_sivashinsky().solution.initial),
        replace(reference, equation=replace(reference.equation, coefficient=-0.4)),
    ):
        assert (other(x) - reference(x)).abs() > 1e-3
    assert len(os.listdir(tmp_path)) == 3


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PINNCURV_CACHE", str(tmp_path / "file" / "folder"))
    reference = replace(kdv().solution, n=32, steps=100, snapshots=10)
    assert reference(torch.zeros(1, 2, dtype=torch.float64)).item() == pytest.approx(1)


def test_reference_knows_no_other_times() -> None:
    times = torch.tensor([-1e-9, 0.0, 0.5, 1.0, 1.0 + 1e-9], dtype=torch.float64)
    values = kdv().solution(torch.stack([times, times], 1))
    assert values.isnan().flatten().tolist() == [True, False, False, False, True]


def test_times_and_initial_values_belong_together() -> None:
    with pytest.raises(ValueError, match=r"0 <= start < end <= 1\.0, got start=0\.0, end=2\.0"):
        kdv(end=2.0)
    for start in (-1.0, np.nan):
        with pytest.raises(ValueError, match="0 <= start < end"):
            kdv(start=start)
    with pytest.raises(ValueError, match=r"at start=0\.5 must be given, .* got initial=None"):
        allen_cahn(start=0.5)


def test_a_window_has_its_own_initial_values(generator: torch.Generator) -> None:
    problem = kdv(20, 10, start=0.25, end=0.5, initial=lambda x: 3 * x[:, :1])
    interior, start = problem.sample(generator, torch.float64, "cpu")
    assert 0.25 <= interior[:, 0].min() < interior[:, 0].max() <= 0.5
    assert (start[:, 0] == 0.25).all()
    residual = problem.terms[1].apply(start, {"u": torch.ones(10, 1, dtype=torch.float64)})
    torch.testing.assert_close(residual, torch.full_like(residual, 0.25))


# --- the condition at the ends --------------------------------------------------------------------

LEFT_TO_THE_NETWORK = {
    "allen_cahn": (lambda: allen_cahn(30, 20), 2.0),
    "kdv": (lambda: kdv(30, 20), 2.0),
    "kuramoto_sivashinsky": (lambda: kuramoto_sivashinsky(30, 20), 2 * PI),
    "convection": (lambda: convection(n_interior=30, n_boundary=0), 2 * PI),
    "nls": (lambda: nls(30, 0, 20), 30.0),
}


def _layers(d_in: int, d_out: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, 5), nn.Tanh(), nn.Linear(5, d_out)).to(dtype)


@pytest.mark.parametrize("name", LEFT_TO_THE_NETWORK)
def test_networks_that_are_not_periodic_are_noticed(name: str, generator: torch.Generator) -> None:
    """One that is periodic, a term, or initial values by construction on top of one, are not."""
    build, period = LEFT_TO_THE_NETWORK[name]
    problem = build()
    plain, points = _layers(2, problem.d_out), problem.sample(generator, torch.float64, "cpu")
    with pytest.warns(NotPeriodic, match="coordinate 1, .*PeriodicEmbedding, or add a term"):
        Objective.sample(plain, problem, check=False)
    for dtype in (torch.float32, torch.float64):
        embedding = PeriodicEmbedding((None, period), modes=5)
        embedded = nn.Sequential(embedding, _layers(embedding.d_out, problem.d_out, dtype))
        warn_unless_periodic(problem, embedded, [x.to(dtype) for x in points])
    warn_unless_periodic(problem, Ansatz(embedded, _time, problem.solution), points)
    start = points[-1] * torch.tensor([1.0, 0.0]) + torch.tensor([0.0, problem.periodic[1][0]])
    term = periodic(plain, 1, period, Fixed(start))
    warn_unless_periodic(replace(problem, terms=(*problem.terms, term)), plain, points)


def _time(x: Tensor) -> Tensor:
    return x[:, :1]


def test_which_problems_are_periodic() -> None:
    """None whose ends have a condition; those without one in every coordinate."""
    Objective.sample(_layers(2, 1), convection(n_interior=30, n_boundary=10), check=False)
    with pytest.warns(NotPeriodic) as told:
        Objective.sample(
            _layers(3, 1), helmholtz((1, 2, 1), n_interior=30, n_boundary=0), check=False
        )
    assert [f"coordinate {i}" in str(told[i].message) for i in range(3)] == [True] * 3
    with pytest.raises(ValueError, match=r"must be whole numbers, .* got \(1.5, 2.0\)"):
        helmholtz((1.5, 2), n_boundary=0)
    with pytest.raises(ValueError, match=r"coordinates, from 0 to 1, got \{2: \(0.0, 1.0\)\}"):
        replace(kdv(), periodic={2: (0.0, 1.0)})
    for ends in ((1.0, -1.0), (1.0, 1.0), (-1.0, math.nan), (-1.0, math.inf)):
        with pytest.raises(ValueError, match=r"coordinate 1 must be finite and increase, got \("):
            replace(kdv(), periodic={1: ends})
