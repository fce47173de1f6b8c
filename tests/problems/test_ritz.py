"""The energy of the Poisson equation on a disk: its quadrature, its minimum, and its minimizer."""

import copy
import math
import pickle

import pytest
import torch
from scipy.integrate import dblquad, quad
from torch import Tensor, nn

from pinncurv.curvature import Objective
from pinncurv.problems import poisson_disk_ritz


class Disturbed(nn.Module):
    """The solution plus a multiple of another function."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        u = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
        return u + torch.exp(x[:, :1] - 0.5 * x[:, 1:]) @ self.amount


def _minimum() -> float:
    """Return -½ (∫ 13 u² + ∮ g u), what is left of the energy where its variation vanishes."""

    def inside(r: float, t: float) -> float:
        u = math.sin(3 * r * math.cos(t)) * math.cos(2 * r * math.sin(t))
        return 13 * u**2 * r

    def edge(t: float) -> float:
        a, b = 3 * math.cos(t), 2 * math.sin(t)
        u = math.sin(a) * math.cos(b)
        return u * (a * math.cos(a) * math.cos(b) - b * math.sin(a) * math.sin(b) + u)

    area = dblquad(inside, 0, 2 * math.pi, 0, 1, epsabs=1e-11)[0]
    return -(area + quad(edge, 0, 2 * math.pi, epsabs=1e-11)[0]) / 2


def test_the_solution_is_the_minimizer() -> None:
    """The slope vanishes there, the curvature is that of ∫ |∇v|² + ∮ v²."""
    objective = Objective.sample(Disturbed(), poisson_disk_ritz())
    linearized = objective.linearize()
    assert sum(linearized.term_losses.values()) == pytest.approx(_minimum(), rel=1e-10)
    (slope,) = linearized.gradient()
    assert slope.abs() < 1e-10
    curved = linearized.jacobian.to_dense().square().sum()

    def squared(r: float, t: float) -> float:
        return math.exp(2 * r * (math.cos(t) - 0.5 * math.sin(t)))

    area = dblquad(lambda r, t: 1.25 * squared(r, t) * r, 0, 2 * math.pi, 0, 1, epsabs=1e-11)[0]
    expected = area + quad(lambda t: squared(1, t), 0, 2 * math.pi, epsabs=1e-11)[0]
    assert float(curved) == pytest.approx(expected, rel=1e-10)


def test_copies_have_the_same_energy() -> None:
    problem = poisson_disk_ritz(4, 6)
    for twin in (pickle.loads(pickle.dumps(problem)), copy.deepcopy(problem)):
        losses = [Objective.sample(Disturbed(), p).loss() for p in (problem, twin)]
        assert torch.equal(*losses)
    assert [term.points.n for term in problem.terms] == [24, 6]
