"""Every shipped problem: its equation is the published one, and its solution solves it."""

import pytest
import torch
from torch import Tensor, nn

from pinncurv.problems import Problem, gaussian_preserving, ornstein_uhlenbeck, waves
from tests.problems import oracles
from tests.problems.shipped import SHIPPED

PI = torch.pi


def _isotropic(x: Tensor) -> Tensor:
    return (2**0.5 * torch.eye(x.shape[1] - 1, dtype=x.dtype)).expand(len(x), -1, -1)


def _ornstein_uhlenbeck() -> oracles.Oracle:
    return oracles.fokker_planck(lambda x: -x[:, 1:] / 2, _isotropic)


def _waves(dim: int) -> oracles.Oracle:
    process = waves(dim)
    return oracles.fokker_planck(process.drift, process.diffusivity)


def _gaussian(x: Tensor) -> Tensor:
    """The log-density by torch.distributions."""
    variance = 2 - torch.exp(-x[:, :1])
    normal = torch.distributions.Normal(torch.zeros_like(variance), variance.sqrt())
    return normal.log_prob(x[:, 1:]).sum(1, keepdim=True)


EQUATIONS = {
    "poisson2d": oracles.poisson(lambda x: 2 * PI**2 * torch.sin(PI * x).prod()),
    "poisson5d": oracles.poisson(lambda x: PI**2 * torch.cos(PI * x).sum()),
    "poisson10d": oracles.poisson(lambda x: 0 * x[0]),
    "poisson100d": oracles.poisson(lambda x: 0 * x[0] - 200 / 33.47),
    "heat1d": oracles.heat(1 / 4),
    "heat4d": oracles.heat(1 / 4),
    "log_fokker_planck9d": oracles.ornstein_uhlenbeck_log,
    "log_fokker_planck2d": oracles.ornstein_uhlenbeck_log,
    "fokker_planck1d": _ornstein_uhlenbeck(),
    "fokker_planck3d": _ornstein_uhlenbeck(),
    "anisotropic_fokker_planck2d": _waves(2),
    "anisotropic_fokker_planck3d": _waves(3),
    "anisotropic_log_fokker_planck2d": oracles.logarithmic(_waves(2)),
    "anisotropic_log_fokker_planck3d": oracles.logarithmic(_waves(3)),
}

SOLUTIONS = {
    "poisson2d": lambda x: torch.sin(PI * x).prod(1, keepdim=True),
    "poisson5d": lambda x: torch.cos(PI * x).sum(1, keepdim=True),
    "poisson10d": lambda x: (x[:, ::2] * x[:, 1::2]).sum(1, keepdim=True) / 1.34,
    "poisson100d": lambda x: (x * x).sum(1, keepdim=True) / 33.47,
    "heat1d": lambda x: torch.exp(-(PI**2) * x[:, :1] / 4) * torch.sin(PI * x[:, 1:]),
    "heat4d": lambda x: torch.exp(-x[:, :1]) * torch.sin(2 * x[:, 1:]).sum(1, keepdim=True),
    **{name: lambda x: _gaussian(x).exp() for name in SHIPPED if "fokker" in name},
    **{name: _gaussian for name in SHIPPED if "log_fokker" in name},
}

# Root mean squares that arXiv 2405.15603's runs were trained on.
ROOT_MEAN_SQUARES = {
    "poisson2d": 0.500,
    "poisson5d": 1.58,
    "poisson10d": 1.00,
    "poisson100d": 1.00,
    "heat1d": 0.317,
    "heat4d": 1.90,
    "log_fokker_planck9d": 38.6,
}


class Known(nn.Module):
    """A known solution as a network without parameters."""

    def __init__(self, problem: Problem) -> None:
        """Store the solution."""
        super().__init__()
        self.solution = problem.solution

    def forward(self, x: Tensor) -> Tensor:
        """Evaluate the solution."""
        return self.solution(x)


def _network(d_in: int, generator: torch.Generator) -> nn.Module:
    model = nn.Sequential(nn.Linear(d_in, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.7, 0.7, generator=generator)
    return model


def _points(problem: Problem, generator: torch.Generator) -> tuple[Tensor, ...]:
    batches = problem.sample(generator, torch.float64, "cpu")
    return tuple(x[torch.randperm(len(x), generator=generator)[:8]] for x in batches)


@pytest.mark.parametrize("name", SHIPPED)
def test_solution_solves_the_equation(name: str, generator: torch.Generator) -> None:
    """Substituted into torch.func's derivatives, the solution leaves rounding errors."""
    problem = SHIPPED[name]()
    x = _points(problem, generator)[0]
    terms = oracles.terms_of(EQUATIONS[name], problem.solution, x)
    assert (terms.sum(1).abs() <= 1e-12 * (terms.abs().sum(1))).all()


@pytest.mark.parametrize("name", SHIPPED)
def test_solution_is_the_published_one(name: str, generator: torch.Generator) -> None:
    """The solution agrees with its formula, written down a second time."""
    problem = SHIPPED[name]()
    for x in _points(problem, generator):
        torch.testing.assert_close(problem.solution(x), SOLUTIONS[name](x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_loss_term_vanishes_at_the_solution(name: str, generator: torch.Generator) -> None:
    """The loss terms, evaluated with jets, are zero to rounding at the solution."""
    problem = SHIPPED[name]()
    interior, condition = _points(problem, generator)
    scale = oracles.terms_of(EQUATIONS[name], problem.solution, interior).abs().sum(1)
    residual = problem.terms[0].evaluate(Known(problem), interior)
    assert residual.shape == (len(interior), 1)
    assert (residual[:, 0].abs() <= 1e-12 * scale).all()
    residual = problem.terms[1].evaluate(Known(problem), condition)
    assert (residual.abs() <= 1e-14 * SOLUTIONS[name](condition).abs()).all()


@pytest.mark.parametrize("name", SHIPPED)
def test_residual_of_a_network_is_the_equation(name: str, generator: torch.Generator) -> None:
    """Away from the solution the loss term agrees with the oracle, sign included."""
    problem = SHIPPED[name]()
    model = _network(problem.d_in, generator)
    interior, condition = _points(problem, generator)
    terms = oracles.terms_of(EQUATIONS[name], model, interior)
    error = problem.terms[0].evaluate(model, interior)[:, 0] - terms.sum(1)
    assert (error.abs() <= 1e-12 * terms.abs().sum(1)).all()
    expected = model(condition) - SOLUTIONS[name](condition)
    torch.testing.assert_close(problem.terms[1].evaluate(model, condition), expected)


@pytest.mark.parametrize(("name", "expected"), ROOT_MEAN_SQUARES.items())
def test_root_mean_square_of_the_solution(
    name: str, expected: float, generator: torch.Generator
) -> None:
    """The solution has the published root mean square, to its three digits and sampling."""
    problem = SHIPPED[name]()
    squares = problem.solution(problem.evaluation.sample(generator, torch.float64, "cpu")) ** 2
    standard_error = (squares.std() / len(squares) ** 0.5 / (2 * expected)).item()
    assert abs(squares.mean().sqrt().item() - expected) <= 0.005 * expected + 4 * standard_error


@pytest.mark.parametrize(
    ("name", "counts"),
    {
        "poisson2d": (900, 120),
        "poisson5d": (3000, 500),
        "poisson10d": (3000, 500),
        "poisson100d": (100, 50),
        "heat1d": (900, 120),
        "heat4d": (3000, 500),
        "log_fokker_planck9d": (3000, 1000),
    }.items(),
)
def test_published_problems(name: str, counts: tuple[int, int]) -> None:
    """Names, numbers of points and weights are those of the reference."""
    problem = SHIPPED[name]()
    assert problem.name == name
    assert tuple(term.points.n for term in problem.terms) == counts
    assert [term.weight for term in problem.terms] == [1.0, 1.0]
    assert problem.evaluation.n == 10 * counts[0]


def test_domains_of_the_published_problems(generator: torch.Generator) -> None:
    """Conditions hold where the reference says."""
    for name in ROOT_MEAN_SQUARES:
        problem = SHIPPED[name]()
        interior, condition = problem.sample(generator, torch.float64, "cpu")
        bound = 5 if name == "log_fokker_planck9d" else 1
        assert interior.max() > 0.9 * bound
        if name.startswith("poisson"):
            assert ((condition == 0) | (condition == 1)).any(1).all()
        elif name.startswith("heat"):
            half = len(condition) // 2
            on_faces = ((condition[:half, 1:] == 0) | (condition[:half, 1:] == 1)).any(1)
            assert on_faces.all()
            assert condition[:half, 0].std() > 0.2
            assert (condition[half:, 0] == 0).all()
        else:
            assert (condition[:, 0] == 0).all()
            assert condition[:, 1:].min() < -4.5
            assert 0 <= interior[:, 0].min() < 0.1


def test_balanced_drift_of_isotropic_diffusion_is_linear(generator: torch.Generator) -> None:
    """For D = 2 I, the manufactured drift is that of the Ornstein-Uhlenbeck process."""
    x = torch.rand(6, 4, generator=generator, dtype=torch.float64)
    process, expected = gaussian_preserving(3, _isotropic), ornstein_uhlenbeck(3)
    torch.testing.assert_close(process.drift(x), expected.drift(x))
    torch.testing.assert_close(process.velocity(x), expected.velocity(x))
    torch.testing.assert_close(process.rate(x), expected.rate(x))
