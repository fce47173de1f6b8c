"""The Fokker-Planck equation for the density of a diffusion process, and for its logarithm."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pinncurv.diffops import Gradient, Partial, Value
from pinncurv.problems.conditions import dirichlet
from pinncurv.problems.diffusion_process import DiffusionProcess
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.gaussian import (
    gaussian_density,
    gaussian_log_density,
    ornstein_uhlenbeck,
    waves,
)
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.problem import Problem
from pinncurv.problems.samplers import Sampler

Function = Callable[[Tensor], Tensor]


def fokker_planck(
    dim: int,
    process: DiffusionProcess | None = None,
    *,
    initial: Function | None = None,
    solution: Function | None = None,
    domain: SpaceTimeBox | None = None,
    n_interior: int = 3000,
    n_initial: int = 1000,
    name: str | None = None,
) -> Problem:
    """The Fokker-Planck equation for the density p of a process.

    p_t + div(μ p) - 1/2 Σ_ij ∂_i∂_j (D_ij p) = 0,    p = p_0 at the start

    Args:
        dim: Dimension d of x, without time.
        process: The process. Left out, it is `ornstein_uhlenbeck` with the solution
            `gaussian_density`.
        initial: The density p_0, [N, 1 + d] -> [N, 1]. Left out, it is the solution.
        solution: The density p, [N, 1 + d] -> [N, 1], if it is known.
        domain: The box in space and interval in time. Left out, [0, 1] x [-5, 5]^d.
        n_interior: Number of points in the domain.
        n_initial: Number of points at the start.
        name: The name of the problem.

    Raises:
        ValueError: If dimensions disagree, or a process comes without initial density.
    """
    return _problem(
        density_equation,
        gaussian_density,
        name or f"fokker_planck{dim}d",
        dim,
        process,
        initial,
        solution,
        domain,
        n_interior,
        n_initial,
    )


def log_fokker_planck(
    dim: int,
    process: DiffusionProcess | None = None,
    *,
    initial: Function | None = None,
    solution: Function | None = None,
    domain: SpaceTimeBox | None = None,
    n_interior: int = 3000,
    n_initial: int = 1000,
    name: str | None = None,
) -> Problem:
    """The Fokker-Planck equation for the logarithm q = log p of the density of a process.

    q_t + div μ - 1/2 div div D + (μ - div D)·∇q - 1/2 (∇qᵀ D ∇q + Σ_ij D_ij ∂_i∂_j q) = 0

    Arguments as `fokker_planck`, with log-densities: the solution that comes with the process which
    is taken where none is given is `gaussian_log_density`.

    Raises:
        ValueError: If dimensions disagree, or a process comes without initial log-density.
    """
    return _problem(
        log_density_equation,
        gaussian_log_density,
        name or f"log_fokker_planck{dim}d",
        dim,
        process,
        initial,
        solution,
        domain,
        n_interior,
        n_initial,
    )


def log_fokker_planck9d(n_interior: int = 3000, n_initial: int = 1000) -> Problem:
    """The log-density of the Ornstein-Uhlenbeck process in dimension 9.

    q_t + div μ + μ·∇q - |∇q|² - Δq = 0,    μ = -x / 2

    Source: arXiv 2405.15603 (the problem definitions of its experiments).
    """
    return log_fokker_planck(9, n_interior=n_interior, n_initial=n_initial)


def anisotropic_fokker_planck(
    dim: int = 2, n_interior: int = 3000, n_initial: int = 1000
) -> Problem:
    """The density of `waves`: full, point-dependent diffusion, known solution.

    p_t + div(μ p) - 1/2 Σ_ij ∂_i∂_j (D_ij p) = 0,    p = `gaussian_density`
    """
    return fokker_planck(
        dim,
        waves(dim),
        solution=gaussian_density,
        n_interior=n_interior,
        n_initial=n_initial,
        name=f"anisotropic_fokker_planck{dim}d",
    )


def anisotropic_log_fokker_planck(
    dim: int = 2, n_interior: int = 3000, n_initial: int = 1000
) -> Problem:
    """The log-density of `waves`: full, point-dependent diffusion, known solution.

    The equation of `log_fokker_planck` with the solution q = `gaussian_log_density`.
    """
    return log_fokker_planck(
        dim,
        waves(dim),
        solution=gaussian_log_density,
        n_interior=n_interior,
        n_initial=n_initial,
        name=f"anisotropic_log_fokker_planck{dim}d",
    )


def density_equation(process: DiffusionProcess, points: Sampler) -> LossTerm:
    """The Fokker-Planck equation for the density as a loss term.

    p_t + (div μ - 1/2 div div D) p + (μ - div D)·∇p - 1/2 Σ_ij D_ij ∂_i∂_j p = 0
    """
    operators = {
        "p": Value(),
        "p_t": Partial(0),
        "grad_p": Gradient(dims=tuple(range(1, 1 + process.dim))),
        "diffused": process.second_order,
    }
    return LossTerm(operators, partial(_density, process), points, name="interior")


def log_density_equation(process: DiffusionProcess, points: Sampler) -> LossTerm:
    """The Fokker-Planck equation for the logarithm of the density as a loss term.

    q_t + div μ - 1/2 div div D + (μ - div D)·∇q - 1/2 (∇qᵀ D ∇q + Σ_ij D_ij ∂_i∂_j q) = 0
    """
    operators = {
        "q_t": Partial(0),
        "grad_q": Gradient(dims=tuple(range(1, 1 + process.dim))),
        "diffused": process.second_order,
    }
    return LossTerm(operators, partial(_log_density, process), points, name="interior")


def _density(
    process: DiffusionProcess, x: Tensor, p: Tensor, p_t: Tensor, grad_p: Tensor, diffused: Tensor
) -> Tensor:
    transport = (process.velocity(x) * grad_p.squeeze(1)).sum(dim=1, keepdim=True)
    return p_t + process.rate(x) * p + transport - 0.5 * process.strength * diffused


def _log_density(
    process: DiffusionProcess, x: Tensor, q_t: Tensor, grad_q: Tensor, diffused: Tensor
) -> Tensor:
    gradient = grad_q.squeeze(1)
    transport = (process.velocity(x) * gradient).sum(dim=1, keepdim=True)
    diffusion = process.energy(x, gradient) + process.strength * diffused
    return q_t + process.rate(x) + transport - 0.5 * diffusion


def _problem(
    equation: Callable[[DiffusionProcess, Sampler], LossTerm],
    gaussian: Function,
    name: str,
    dim: int,
    process: DiffusionProcess | None,
    initial: Function | None,
    solution: Function | None,
    domain: SpaceTimeBox | None,
    n_interior: int,
    n_initial: int,
) -> Problem:
    if process is None:
        process = ornstein_uhlenbeck(dim)
        solution = gaussian if initial is None and solution is None else solution
    if process.dim != dim:
        raise ValueError(
            f"The process must have the problem's dimension {dim}, got {process.dim}. Time does "
            "not count: pass the dimension of x."
        )
    domain = SpaceTimeBox(Box.cube(dim, -5.0, 5.0)) if domain is None else domain
    initial = solution if initial is None else initial
    if initial is None:
        raise ValueError(
            f"Problem '{name}' needs values at the start, got neither initial nor solution for "
            "this process. Pass initial=..., a function [N, 1 + d] -> [N, 1]."
        )
    interior = equation(process, domain.interior(n_interior))
    return Problem(
        name=name,
        terms=(interior, dirichlet(initial, domain.initial(n_initial), name="initial")),
        d_in=1 + process.dim,
        evaluation=domain.interior(10 * n_interior),
        solution=solution,
        coordinates=("$t$", "$x$"),
    )
