"""Periodic problems: their computed references against other methods, and the equations."""

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

from pinncurv.problems import Problem, allen_cahn, kdv, kuramoto_sivashinsky
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
    with pytest.raises(ValueError, match=r"at start=0\.5 must be given, .* got initial=None"):
        allen_cahn(start=0.5)


def test_a_window_has_its_own_initial_values(generator: torch.Generator) -> None:
    problem = kdv(20, 10, start=0.25, end=0.5, initial=lambda x: 3 * x[:, :1])
    interior, start = problem.sample(generator, torch.float64, "cpu")
    assert 0.25 <= interior[:, 0].min() < interior[:, 0].max() <= 0.5
    assert (start[:, 0] == 0.25).all()
    residual = problem.terms[1].apply(start, {"u": torch.ones(10, 1, dtype=torch.float64)})
    torch.testing.assert_close(residual, torch.full_like(residual, 0.25))
