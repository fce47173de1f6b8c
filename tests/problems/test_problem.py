"""Problems: batches, errors against the solution, and checks that the parts fit."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from pinncurv.diffops import Value
from pinncurv.problems import Box, LossTerm, Problem, dirichlet, heat1d, poisson, poisson2d
from tests.problems.shipped import GALLERY, SHIPPED


def _vector_problem() -> Problem:
    """A problem with two unknowns."""
    solution = lambda x: torch.cat([x, 2 * x], 1)  # noqa: E731
    term = LossTerm({"u": Value()}, lambda x, u: u - solution(x), Box.unit(1).interior(4))
    return Problem("vector", (term,), 1, Box.unit(1).interior(40), d_out=2, solution=solution)


def test_sample_gives_one_batch_per_term(generator: torch.Generator) -> None:
    """In the order of the terms, in the dtype asked for, reproducibly."""
    problem = heat1d(9, 6)
    batches = problem.sample(generator, torch.float32, "cpu")
    assert [tuple(x.shape) for x in batches] == [(9, 2), (6, 2)]
    assert all(x.dtype == torch.float32 for x in batches)
    again = problem.sample(torch.Generator().manual_seed(0), torch.float32, "cpu")
    assert all(torch.equal(x, y) for x, y in zip(batches, again, strict=True))
    assert not torch.equal(problem.sample(generator, torch.float32, "cpu")[0], batches[0])


@pytest.mark.parametrize("points", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", [torch.float32, torch.float64])
def test_errors_of_any_dtypes(network, points, generator: torch.Generator) -> None:
    """The network in its own dtype, the solution and the difference in the finer one of the two."""
    problem = poisson2d()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).to(network)
    x = problem.evaluation.sample(generator, points, "cpu")
    finer = torch.promote_types(network, points)
    expected = problem.solution(x.to(finer))
    difference = model(x.to(network)).to(finer) - expected
    relative = (difference.norm() / expected.norm()).item()
    assert problem.errors(model, x).relative == pytest.approx(relative, rel=1e-6)
    asked = []
    told = replace(problem, solution=lambda x: asked.append(x.dtype) or problem.solution(x))
    told.errors(model, x)
    assert asked == [finer]


def test_errors(generator: torch.Generator) -> None:
    """The plain error is not divided by the norm of the solution, the relative one is."""
    problem = poisson2d()
    x = problem.evaluation.sample(generator, torch.float64, "cpu")
    errors = problem.errors(lambda x: problem.solution(x) + 0.01, x)
    assert errors.rmse == pytest.approx(0.01, rel=1e-12)
    norm = problem.solution(x).square().mean().sqrt().item()
    assert errors.relative == pytest.approx(0.01 / norm, rel=1e-12)
    assert norm == pytest.approx(0.5, abs=0.01)
    assert problem.errors(problem.solution, x).rmse == 0.0


def test_errors_of_a_vector(generator: torch.Generator) -> None:
    """Squared errors of components add up, then the points are averaged."""
    problem = _vector_problem()
    x = problem.evaluation.sample(generator, torch.float64, "cpu")
    shift = torch.tensor([0.3, 0.4], dtype=torch.float64)
    errors = problem.errors(lambda x: problem.solution(x) + shift, x)
    assert errors.rmse == pytest.approx(0.5, rel=1e-12)
    norm = (x**2).mean().sqrt().item()
    assert errors.relative == pytest.approx(0.5 / (5**0.5 * norm), rel=1e-12)
    assert errors.components == pytest.approx((0.3 / norm, 0.2 / norm), rel=1e-12)
    assert errors.mean == pytest.approx(0.25 / norm, rel=1e-12)


def test_a_free_constant_is_no_error(generator: torch.Generator) -> None:
    """Means of that component do not count, neither in the error nor in the norm."""
    problem = replace(_vector_problem(), free_constants=(1,))
    x = problem.evaluation.sample(generator, torch.float64, "cpu")
    errors = problem.errors(lambda x: 1.1 * problem.solution(x) + 7 * x.new_tensor([0, 1]), x)
    assert errors.components == pytest.approx((0.1, 0.1), rel=1e-12)
    spread = x.var(correction=0)
    assert errors.rmse == pytest.approx(0.1 * (x.square().mean() + 4 * spread).sqrt().item())
    assert errors.relative == pytest.approx(0.1, rel=1e-12)
    with pytest.raises(ValueError, match=r"components of the unknown, from 0 to 1, got \(2,\)"):
        replace(problem, free_constants=(2,))


def test_errors_need_no_gradient(generator: torch.Generator) -> None:
    """The network runs without recording a graph."""
    recorded = []

    def model(x: Tensor) -> Tensor:
        recorded.append(torch.is_grad_enabled())
        return x[:, :1]

    problem = poisson2d()
    problem.errors(model, problem.evaluation.sample(generator, torch.float64, "cpu"))
    assert recorded == [False]


def test_errors_check_shapes(generator: torch.Generator) -> None:
    """A network that returns [N] would be broadcast to [N, N]."""
    problem = poisson2d()
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"must return shape \[900, 1\], got \[900\] from the net"):
        problem.errors(lambda x: x[:, 0], x)


def test_errors_need_a_solution(generator: torch.Generator) -> None:
    """Without a known solution there is no error to measure."""
    problem = poisson(
        Box.unit(2), lambda x: torch.ones_like(x[:, :1]), lambda x: 0 * x[:, :1], 9, 4
    )
    assert problem.solution is None
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"'poisson' need its solution, got solution=None. Pass"):
        problem.errors(lambda x: x[:, :1], x)


def test_source_without_column_is_found(generator: torch.Generator) -> None:
    """A right hand side of shape [N] is the classical bug."""
    problem = poisson(Box.unit(2), lambda x: x[:, 0], lambda x: 0 * x[:, :1], 9, 4)
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"'interior': .* broadcast"):
        problem.terms[0].evaluate(lambda x: (x**2).sum(1, keepdim=True), x)


def test_parts_must_fit() -> None:
    """Names differ, dimensions agree."""
    problem = poisson2d()
    with pytest.raises(ValueError, match=r"their names must differ, got \['interior', 'interior'"):
        replace(problem, terms=(problem.terms[0], problem.terms[0]))
    with pytest.raises(ValueError, match=r"at least one term .* got \[\]"):
        replace(problem, terms=())
    other = dirichlet(lambda x: x[:, :1], Box.unit(3).faces(2))
    with pytest.raises(
        ValueError, match="points of 'boundary' must have dimension d_in = 2, got 3"
    ):
        replace(problem, terms=(problem.terms[0], other))
    with pytest.raises(ValueError, match="points of 'evaluation' must have dimension"):
        replace(problem, evaluation=Box.unit(3).interior(2))


@pytest.mark.parametrize("name", [*SHIPPED, *GALLERY])
def test_pickle(name: str, generator: torch.Generator) -> None:
    """A problem that went through a file draws the same points and has the same residuals."""
    problem = (SHIPPED | GALLERY)[name]()
    copied = pickle.loads(pickle.dumps(problem))
    layers = [torch.nn.Linear(problem.d_in, 3), torch.nn.Tanh(), torch.nn.Linear(3, problem.d_out)]
    network = torch.nn.Sequential(*layers).double()
    for term, twin in zip(problem.terms, copied.terms, strict=True):
        x, y = (
            one.points.sample(generator.manual_seed(0), torch.float64, "cpu")
            for one in (term, twin)
        )
        assert torch.equal(x, y)
        x = x[:7]
        assert torch.equal(term.evaluate(network, x), twin.evaluate(network, x))
        assert torch.equal(problem.solution(x), copied.solution(x))
