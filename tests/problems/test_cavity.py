"""The flow in a cavity: the computed reference solves the equations, and has converged."""

import pickle

import numpy as np
import pytest
import torch
from scipy.sparse import diags, identity, kron
from scipy.sparse.linalg import splu
from torch import Tensor, nn

from pinncurv.problems import cavity
from pinncurv.problems.cavity_reference import CavityReference


def _points(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, 2, generator=generator, dtype=torch.float64)


def _slopes(u: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of a function whose points do not mix, by reverse mode."""
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


@pytest.mark.slow
def test_reference_solves_the_equations(generator: torch.Generator) -> None:
    """Momentum and mass balance, away from the corners where the terms are unbounded."""
    problem = cavity()
    x = _points(150, generator)
    x[:, 1] = x[:, 1] * 0.97
    x.requires_grad_()
    u, v, p = problem.solution(x).unbind(1)
    du, dv, dp = (_slopes(part, x) for part in (u, v, p))
    largest = dp.norm(dim=1).max()
    for slopes, i in ((du, 0), (dv, 1)):
        laplacian = sum(_slopes(slopes[:, j], x)[:, j] for j in range(2))
        residual = u * slopes[:, 0] + v * slopes[:, 1] + dp[:, i] - laplacian / 100
        assert residual.abs().max() < 1e-3 * largest
        assert residual.square().mean().sqrt() < 1e-4 * dp.square().mean().sqrt()
    assert (du[:, 0] + dv[:, 1]).abs().max() < 1e-11


def test_reference_fits_the_walls(generator: torch.Generator) -> None:
    """Also in the corners, where nothing is undefined."""
    solution = cavity().solution
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    for axis in range(2):
        for side in (0.0, 1.0):
            x = torch.cat([_points(50, generator), corners])
            x[:, axis] = side
            lid = 4 * x[:, 0] * (1 - x[:, 0]) * (x[:, 1] == 1)
            values = solution(x)
            assert (values[:, 0] - lid).abs().max() < 1e-13
            assert values[:, 1].abs().max() < 1e-13
            assert values.isfinite().all()
    assert solution(corners[:1])[0, 2].abs() < 1e-13


def test_reference_has_converged(generator: torch.Generator) -> None:
    x = _points(2000, generator)
    expected = cavity().solution(x)
    error = (CavityReference(100.0, 40)(x) - expected).norm(dim=0) / expected.norm(dim=0)
    assert (error < torch.tensor([1e-6, 1e-6, 5e-5])).all()


def _by_differences(n: int) -> np.ndarray:
    """Return u on the line x = 1/2 by second order differences, vorticity and stream function."""
    h, m = 1 / n, n - 1
    one = identity(m)
    second = diags([1.0, -2.0, 1.0], [-1, 0, 1], (m, m)) / h**2
    first = diags([-1.0, 1.0], [-1, 1], (m, m)) / (2 * h)
    laplacian = (kron(second, one) + kron(one, second)).tocsc()
    poisson = splu(laplacian)
    d_x, d_y = kron(first, one).tocsr(), kron(one, first).tocsr()
    along = np.arange(1, n) * h
    lid = 4 * along * (1 - along)
    step = 0.004
    implicit = splu((kron(one, one) - step / 100 * laplacian).tocsc())
    w = np.zeros((m, m))
    for _ in range(8000):
        psi = poisson.solve(-w.ravel()).reshape(m, m)
        u, v = (d_y @ psi.ravel()).reshape(m, m), -(d_x @ psi.ravel()).reshape(m, m)
        # vorticity of the walls, Thom's formula
        left, right = -2 * psi[0] / h**2, -2 * psi[-1] / h**2
        bottom, top = -2 * psi[:, 0] / h**2, -2 * (psi[:, -1] + h * lid) / h**2
        w_x, w_y = (d @ w.ravel() for d in (d_x, d_y))
        w_x, w_y = w_x.reshape(m, m), w_y.reshape(m, m)
        w_x[0] -= left / (2 * h)
        w_x[-1] += right / (2 * h)
        w_y[:, 0] -= bottom / (2 * h)
        w_y[:, -1] += top / (2 * h)
        rim = np.zeros((m, m))
        rim[0] += left
        rim[-1] += right
        rim[:, 0] += bottom
        rim[:, -1] += top
        right_side = w - step * (u * w_x + v * w_y) + step / 100 / h**2 * rim
        new = implicit.solve(right_side.ravel()).reshape(m, m)
        if np.abs(new - w).max() < 1e-6:
            break
        w = new
    return u[n // 2 - 1]


def test_reference_is_the_limit_of_finite_differences() -> None:
    """Of a time stepping method for the vorticity, extrapolated from two grids."""
    coarse, fine = _by_differences(16), _by_differences(32)
    extrapolated = (4 * fine[1::2] - coarse) / 3
    x = torch.stack([torch.full((15,), 0.5), torch.arange(1, 16) / 16], 1).double()
    expected = cavity().solution(x)[:, 0].numpy()
    assert np.abs(extrapolated - expected).max() < 3e-3
    assert np.abs(fine[1::2] - expected).max() < 0.5 * np.abs(coarse - expected).max()


def test_terms(generator: torch.Generator) -> None:
    """The conditions are those of the reference, and the equation has its Reynolds number."""
    problem = pickle.loads(pickle.dumps(cavity(40, 200)))
    interior, walls, origin = problem.sample(generator, torch.float64, "cpu")
    for term, x in zip(problem.terms[1:], (walls, origin), strict=True):
        assert term.apply(x, {"u": problem.solution(x)}).abs().max() < 1e-13
    assert (walls[:, 1] == 1).sum() > 20
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    values = {"grad": torch.zeros(40, 3, 2), "u": torch.zeros(40, 3), "lap": torch.ones(40, 3)}
    received = problem.terms[0].apply(interior.float(), values)
    torch.testing.assert_close(received, torch.tensor([[-0.01, -0.01, 0.0]]).expand(40, 3))
    assert problem.terms[0].evaluate(model, interior).shape == (40, 3)
    assert problem.errors(problem.solution, interior).relative == 0


def test_reynolds_numbers_that_are_too_large_are_refused() -> None:
    with pytest.raises(
        RuntimeError, match=r"must converge from rest, .* Choose a smaller Reynolds"
    ):
        CavityReference(1e5, 8)(torch.zeros(1, 2, dtype=torch.float64))
