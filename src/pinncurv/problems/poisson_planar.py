"""The Poisson equation on a disk, also as an energy, and on an L-shape; Robin and Neumann."""

import math
from functools import partial

import torch
from scipy.special import roots_legendre
from torch import Tensor

from pinncurv.diffops import Gradient, Laplacian, Value
from pinncurv.problems.conditions import dirichlet, neumann, robin
from pinncurv.problems.disk import Disk
from pinncurv.problems.energy import Energy
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.polygon import Polygon
from pinncurv.problems.problem import Problem, TensorOrJet, zero
from pinncurv.problems.samplers import Fixed, Sampler, check_count


def poisson_disk(n_interior: int = 900, n_boundary: int = 120) -> Problem:
    """A product of waves on the unit disk, with a Robin condition.

    -Δu = 13 u*,    ∂u/∂n + u = g on the circle,    u = u* = sin(3x₁) cos(2x₂)

    Args:
        n_interior: Number of points in the disk.
        n_boundary: Number of points on the circle.
    """
    domain = Disk()
    return Problem(
        name="poisson_disk",
        terms=(
            _equation(domain.interior(n_interior), 13.0),
            robin(_robin_values, 1.0, domain.normal, domain.boundary(n_boundary)),
        ),
        d_in=2,
        evaluation=domain.interior(10_000),
        solution=_waves,
    )


def poisson_disk_ritz(n_radii: int = 24, n_angles: int = 48) -> Problem:
    """The problem of ``poisson_disk`` as the minimum of an energy (deep Ritz).

    ∫ ½|∇u|² - 13 u* u dx + ∮ ½u² - g u ds → min,    u = u* where -Δu = 13 u*, ∂u/∂n + u = g

    The Robin condition is a part of it: nothing is a penalty, and only first derivatives are taken.
    The points are nodes of Gauss' rule in r and equidistant in θ, with the weights of the
    quadrature. At random points, or with more parameters than nodes, a network lowers the energy
    at the nodes by peaks between them.

    Args:
        n_radii: Number of nodes in r.
        n_angles: Number of nodes in θ, in the disk and on the circle.

    Source: E and Yu 2018.
    """
    for count in (n_radii, n_angles):
        check_count(count)
    nodes, weights = (torch.from_numpy(part) for part in roots_legendre(n_radii))
    radii, angles = (1 + nodes) / 2, torch.arange(n_angles).double() * (2 * math.pi / n_angles)
    circle = torch.stack([angles.cos(), angles.sin()], 1)
    shares = weights / 2 * radii * (2 * math.pi * n_radii)  # of which the mean is the area
    inside = Energy(
        {"u": Value(), "grad": Gradient()},
        Fixed((radii[:, None, None] * circle).flatten(0, 1)),
        shares.repeat_interleave(n_angles),
        name="interior",
        density=partial(_energy, 13.0),
    )
    edge = Energy({"u": Value()}, Fixed(circle), 2 * math.pi, name="boundary", density=_edge_energy)
    return Problem(
        name="poisson_disk_ritz",
        terms=(inside, edge),
        d_in=2,
        evaluation=Disk().interior(10_000),
        solution=_waves,
    )


def poisson_l_shape(n_interior: int = 900, n_boundary: int = 60, n_neumann: int = 180) -> Problem:
    """The singular harmonic function at the corner of an L-shape, with a Neumann condition.

    Δu = 0,    u = r^(2/3) sin(2θ/3)

    u = 0 holds on the two edges at the corner, θ = 0 and 3π/2, and ∂u/∂n is given on the others.
    The solution is singular on purpose: a smooth one would not notice the corner, which is what
    L-shapes are computed for. Its gradient is not bounded, so that an ordinary network, not its
    optimizer, limits the error.

    Args:
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the two edges at the corner.
        n_neumann: Number of points on the other edges.
    """
    domain = Polygon.l_shape()
    outer = domain.boundary(n_neumann, edges=(2, 3, 4, 5))
    return Problem(
        name="poisson_l_shape",
        terms=(
            _equation(domain.interior(n_interior), 0.0),
            dirichlet(zero, domain.boundary(n_boundary, edges=(0, 1))),
            neumann(partial(_singular_flux, domain), domain.normal, outer, name="neumann"),
        ),
        d_in=2,
        evaluation=domain.interior(10_000),
        solution=_singular,
    )


def _equation(points: Sampler, strength: float) -> LossTerm:
    residual = partial(_residual, strength)
    return LossTerm({"lap_u": Laplacian()}, residual, points, name="interior")


def _residual(strength: float, x: Tensor, lap_u: Tensor) -> Tensor:
    return -lap_u - strength * _waves(x)


def _energy(strength: float, x: Tensor, u: Tensor, grad: Tensor) -> Tensor:
    return 0.5 * grad[:, 0].square().sum(1, keepdim=True) - strength * _waves(x) * u


def _edge_energy(x: Tensor, u: Tensor) -> Tensor:
    return 0.5 * u**2 - _robin_values(x) * u


def _waves(x: TensorOrJet) -> TensorOrJet:
    return torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])


def _robin_values(x: Tensor) -> Tensor:
    """Return ∂u/∂n + u on the unit circle, where n = x."""
    (a, b), (u, v) = (3 * x[:, :1], 2 * x[:, 1:]), (x[:, :1], x[:, 1:])
    slope = 3 * u * torch.cos(a) * torch.cos(b) - 2 * v * torch.sin(a) * torch.sin(b)
    return slope + _waves(x)


def _polar(x: TensorOrJet) -> tuple[TensorOrJet, TensorOrJet]:
    """Return r² and θ from 0 to 3π/2: the jump of atan2 is turned out of the domain."""
    a, b = x[:, :1], x[:, 1:]
    return a**2 + b**2, torch.atan2(-a - b, b - a) + 0.75 * math.pi


def _singular(x: TensorOrJet) -> TensorOrJet:
    squared, angle = _polar(x)
    return squared ** (1 / 3) * torch.sin(2 / 3 * angle)


def _singular_flux(domain: Polygon, x: Tensor) -> Tensor:
    """Return n · ∇u, ∇u = 2/3 r^(-1/3) (-sin(θ/3), cos(θ/3))."""
    squared, angle = _polar(x)
    direction = torch.cat([-torch.sin(angle / 3), torch.cos(angle / 3)], 1)
    gradient = 2 / 3 * squared ** (-1 / 6) * direction
    return (gradient * domain.normal(x)).sum(1, keepdim=True)
