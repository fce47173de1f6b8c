"""The gallery's problems without a closed form, and the inverse ones: curvature, copies, errors."""

import copy
import pickle

import pytest
import torch
from torch import nn

from experiments.catalog import PROBLEMS
from pinncurv.curvature import Objective
from tests import oracles

NAMES = (
    *("burgers", "allen_cahn", "kdv", "kuramoto_sivashinsky", "cavity"),
    *("heat_coefficient", "poisson_coefficient", "poisson_source"),
)


def _network(d_in: int, d_out: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d_in, 4), nn.Tanh(), nn.Linear(4, d_out)).double()


@pytest.mark.parametrize("name", NAMES)
def test_gauss_newton_and_gradient(name: str, generator: torch.Generator) -> None:
    """Of the terms as they are, against nested torch.func."""
    problem = PROBLEMS[name]()
    model = _network(problem.d_in, problem.d_out)
    terms = [term.at(slice(0, 2)) for term in problem.terms]
    batch = [x[:2] for x in problem.sample(generator, torch.float64, "cpu")]
    objective = Objective(model, terms, batch)
    jacobian = objective.linearize().jacobian.to_dense()
    oracles.assert_close(jacobian.T @ jacobian, oracles.gauss_newton(terms, model, batch))
    wanted = oracles.gradient(terms, model, batch)
    for received, expected in zip(objective.linearize().gradient(), wanted, strict=True):
        oracles.assert_close(received, expected)


@pytest.mark.parametrize("name", NAMES)
def test_copies_have_the_same_residuals(name: str, generator: torch.Generator) -> None:
    problem = PROBLEMS[name]()
    model = _network(problem.d_in, problem.d_out)
    for twin in (pickle.loads(pickle.dumps(problem)), copy.deepcopy(problem)):
        for mine, its in zip(problem.terms, twin.terms, strict=True):
            x, y = (
                one.points.sample(generator.manual_seed(0), torch.float64, "cpu")
                for one in (mine, its)
            )
            assert torch.equal(x, y)
            assert torch.equal(mine.evaluate(model, x), its.evaluate(model, y))


@pytest.mark.parametrize("name", NAMES)
def test_problem_is_named_and_measured(name: str) -> None:
    """By the name of its function, on ten times as many points as it has in the domain."""
    problem = PROBLEMS[name]()
    assert problem.name == name
    assert problem.evaluation.n == 10 * problem.terms[0].points.n
    assert len(problem.coordinates) == problem.d_in
