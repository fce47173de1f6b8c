"""Inverse problems: an unknown field of the equation is found from measurements of its solution."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pinncurv.diffops import Gradient, Laplacian, Value
from pinncurv.problems.conditions import dirichlet, point
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.problem import Problem, TensorOrJet, zero
from pinncurv.problems.samplers import Sampler


def heat_coefficient(
    n_interior: int = 2000, n_boundary: int = 400, n_data: int = 2500, noise: float = 0.1
) -> Problem:
    """The conductivity of a heat equation, from noisy temperatures at random points and times.

    u_t - ∇·(a ∇u) = f, a_t = 0 in [0, 1] x [-1, 1]²,    a known on the spatial boundary,
    u = e^{-t} sin πx sin πy,    a = 2 + sin πx sin πy

    The unknown is (u, a): a network with two outputs, whose second one learns that it does not
    depend on time. The errors of both fields are measured, without noise.

    Args:
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the spatial boundary.
        n_data: Number of measurements, at points that stay the same.
        noise: The standard deviation of their errors, which are the same in every problem.

    Source: PINNacle (arXiv 2306.08827), problem HInv.
    """
    domain = SpaceTimeBox(Box.cube(2, -1.0, 1.0))
    return _coefficient(
        "heat_coefficient",
        (domain.interior(n_interior), domain.lateral(n_boundary), domain.interior(n_data)),
        domain.interior(10 * n_interior),
        partial(_heat, _heat_source),
        _heat_solution,
        noise,
        ("$t$", "$x$", "$y$"),
    )


def poisson_coefficient(
    n_interior: int = 2000, n_boundary: int = 400, n_data: int = 2500, noise: float = 0.1
) -> Problem:
    """The coefficient of an elliptic equation, from noisy values of the solution.

    -∇·(a ∇u) = f in the unit square,    a known on its boundary,
    u = sin πx sin πy,    a = 1 / (1 + x² + y² + (x - 1)² + (y - 1)²)

    The unknown is (u, a), a network with two outputs. The errors of both fields are measured,
    without noise. The source f fits u and a; that of PINNacle's code has 2x + 1 where
    2x - 1 is right.

    Args:
        n_interior: Number of points in the square.
        n_boundary: Number of points on its boundary.
        n_data: Number of measurements, at points that stay the same.
        noise: The standard deviation of their errors, which are the same in every problem.

    Source: PINNacle (arXiv 2306.08827), problem PInv, corrected.
    """
    domain = Box.unit(2)
    return _coefficient(
        "poisson_coefficient",
        (domain.interior(n_interior), domain.faces(n_boundary), domain.interior(n_data)),
        domain.interior(10 * n_interior),
        partial(_poisson, _poisson_source),
        _poisson_solution,
        noise,
        ("$x$", "$y$"),
    )


class UnknownSource(nn.Module):
    """The residual of a Poisson equation whose source is a network, which is trained along.

    -Δu - f(x)

    Args:
        source: The network f, [N, d] -> [N, 1].
        exact: What it should become, to measure its error.
    """

    def __init__(self, source: nn.Module, exact: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.source, self.exact = source, exact

    def forward(self, x: TensorOrJet, lap_u: TensorOrJet) -> TensorOrJet:
        """Return the residual."""
        return -lap_u - self.source(x)

    @torch.no_grad()
    def relative_error(self, x: Tensor) -> float:
        """Return the relative L2 error of the source at points [N, d]."""
        exact = self.exact(x)
        return float((self.source(x) - exact).norm() / exact.norm())


def poisson_source(
    n_interior: int = 1000,
    n_boundary: int = 200,
    n_data: int = 1000,
    noise: float = 0.01,
    source: nn.Module | None = None,
) -> Problem:
    """The source of a Poisson equation, a second network, from noisy values of the solution.

    -Δu = f in the unit square, u = 0 on its boundary,    u = sin πx sin πy,    f = 2π² u

    The network of the source belongs to the residual of the first term, an `UnknownSource`, which
    also measures its error: ``problem.terms[0].residual.relative_error(x)``.

    Args:
        n_interior: Number of points in the square.
        n_boundary: Number of points on its boundary.
        n_data: Number of measurements, at points that stay the same.
        noise: The standard deviation of their errors, which are the same in every problem.
        source: The network of the source, in the dtype of that of u; by default 2-20-20-1 with
            tanh in float64, always with the same initial weights.
    """
    domain = Box.unit(2)
    residual = UnknownSource(_default_source() if source is None else source, _double_sine_source)
    interior = LossTerm(
        {"lap_u": Laplacian()}, residual, domain.interior(n_interior), name="interior"
    )
    return Problem(
        name="poisson_source",
        terms=(
            interior,
            dirichlet(zero, domain.faces(n_boundary)),
            _measurements(_double_sine, domain.interior(n_data), noise),
        ),
        d_in=2,
        evaluation=domain.interior(10 * n_interior),
        solution=_double_sine,
        coordinates=("$x$", "$y$"),
    )


def _coefficient(
    name: str,
    points: tuple[Sampler, Sampler, Sampler],
    evaluation: Sampler,
    residual: Callable[..., Tensor],
    solution: Callable[[Tensor], Tensor],
    noise: float,
    coordinates: tuple[str, ...],
) -> Problem:
    """Build a problem for (u, a): its points are inside, on the boundary, and of measurements."""
    interior, boundary, data = points
    space = tuple(range(len(coordinates) - 2, len(coordinates)))
    operators = {"w": Value(), "grad": Gradient(), "lap": Laplacian(dims=space)}
    return Problem(
        name=name,
        terms=(
            LossTerm(operators, residual, interior, name="interior"),
            dirichlet(partial(_second, solution), boundary, components=(1,)),
            _measurements(partial(_first, solution), data, noise),
        ),
        d_in=interior.dim,
        evaluation=evaluation,
        d_out=2,
        solution=solution,
        coordinates=coordinates,
    )


def _measurements(u: Callable[[Tensor], Tensor], points: Sampler, noise: float) -> LossTerm:
    """Return the term of values of u at points, with errors, the same ones whenever it is called.

    Raises:
        ValueError: If the noise is negative or not finite.
    """
    if not 0 <= noise < math.inf:
        raise ValueError(
            f"The noise of measurements must be a standard deviation >= 0, got {noise}. Use 0 for "
            "exact ones."
        )
    generator = torch.Generator().manual_seed(0)
    x = points.sample(generator, torch.float64, "cpu")
    exact = u(x)
    errors = torch.randn(exact.shape, generator=generator, dtype=exact.dtype)
    return point(exact + noise * errors, x, name="data", components=(0,))


def _default_source() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 1)]
        return nn.Sequential(*layers).double()


def _heat(
    source: Callable[[Tensor], Tensor], x: Tensor, w: Tensor, grad: Tensor, lap: Tensor
) -> Tensor:
    slopes = grad[:, 0, 1:] * grad[:, 1, 1:]
    flow = w[:, 1:] * lap[:, :1] + slopes.sum(1, keepdim=True)
    return torch.cat([grad[:, 0, :1] - flow - source(x), grad[:, 1, :1]], 1)


def _poisson(
    source: Callable[[Tensor], Tensor], x: Tensor, w: Tensor, grad: Tensor, lap: Tensor
) -> Tensor:
    slopes = grad[:, 0] * grad[:, 1]
    return -w[:, 1:] * lap[:, :1] - slopes.sum(1, keepdim=True) - source(x)


def _double_sine(x: TensorOrJet) -> TensorOrJet:
    return torch.sin(math.pi * x[:, :1]) * torch.sin(math.pi * x[:, 1:])


def _double_sine_source(x: TensorOrJet) -> TensorOrJet:
    return 2 * math.pi**2 * _double_sine(x)


def _first(fields: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return fields(x)[:, :1]


def _second(fields: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return fields(x)[:, 1:]


def _heat_solution(x: TensorOrJet) -> TensorOrJet:
    waves = _double_sine(x[:, 1:])
    return torch.cat([torch.exp(-x[:, :1]) * waves, 2 + waves], 1)


def _heat_source(x: Tensor) -> Tensor:
    waves, angles = _double_sine(x[:, 1:]), math.pi * x[:, 1:]
    sines, cosines = torch.sin(angles).square(), torch.cos(angles).square()
    slopes = (cosines * sines.flip(1)).sum(1, keepdim=True)
    diffusion = math.pi**2 * (slopes - 2 * waves * (2 + waves))
    return -torch.exp(-x[:, :1]) * (waves + diffusion)


def _poisson_solution(x: TensorOrJet) -> TensorOrJet:
    squares = (x**2 + (x - 1) ** 2).sum(1, keepdim=True)
    return torch.cat([_double_sine(x), 1 / (1 + squares)], 1)


def _poisson_source(x: Tensor) -> Tensor:
    u, a = _poisson_solution(x).split(1, 1)
    angles = math.pi * x
    slopes = math.pi * torch.cos(angles) * torch.sin(angles).flip(1)
    return 2 * math.pi**2 * a * u + 2 * a**2 * ((2 * x - 1) * slopes).sum(1, keepdim=True)
