"""The flow in a square whose lid moves, without jumps in the corners."""

import torch
from torch import Tensor

from pinncurv.problems.cavity_reference import CavityReference
from pinncurv.problems.conditions import dirichlet, point
from pinncurv.problems.domains import Box
from pinncurv.problems.navier_stokes import navier_stokes
from pinncurv.problems.numbers import check_positive
from pinncurv.problems.problem import Problem


def cavity(n_interior: int = 2000, n_boundary: int = 400, reynolds: float = 100.0) -> Problem:
    """The steady flow in the unit square under a lid with a smooth velocity.

    (u·∇)u + ∇p - Δu / Re = 0, div u = 0,    u = (4x (1 - x), 0) on y = 1, u = 0 on the other walls,
    p(0, 0) = 0

    The unknown is (u, v, p). In the upper corners the pressure goes to infinity like a logarithm,
    and the vorticity depends on the angle, since the slope of the lid's velocity does not fit the
    walls: no smooth network has small residuals there.

    Args:
        n_interior: Number of points in the square.
        n_boundary: Number of points on the walls.
        reynolds: The Reynolds number Re; the reference is for up to a few hundred.

    Raises:
        ValueError: If the Reynolds number is not positive and finite.

    Source: PINNacle (arXiv 2306.08827), problem NS2d-C.
    """
    check_positive("Reynolds number", reynolds)
    domain = Box.unit(2)
    origin = torch.zeros(1, 2, dtype=torch.float64)
    return Problem(
        name="cavity",
        terms=(
            navier_stokes(domain.interior(n_interior), 1 / reynolds),
            dirichlet(_walls, domain.faces(n_boundary), components=(0, 1)),
            point(origin[:, :1], origin, name="pressure", components=(2,)),
        ),
        d_in=2,
        evaluation=domain.interior(10 * n_interior),
        d_out=3,
        solution=CavityReference(reynolds, _DEGREE),
        coordinates=("$x$", "$y$"),
    )


# Eight more change the velocity by 1e-8 and the pressure by 2e-6, relative L2 norms at Re = 100.
_DEGREE = 56


def _walls(x: Tensor) -> Tensor:
    """Return the velocity on the walls: only the lid moves."""
    along, height = x[:, :1], x[:, 1:]
    return torch.cat([torch.where(height == 1, 4 * along * (1 - along), 0), 0 * along], 1)
