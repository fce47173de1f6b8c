"""The bending of a clamped plate, of fourth order."""

import math

import torch
from torch import Tensor

from pinncurv.diffops import Bilaplacian, Directional, Value
from pinncurv.problems.domains import Box
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.problem import Problem, TensorOrJet


def biharmonic_plate(n_interior: int = 900, n_boundary: int = 200) -> Problem:
    """A clamped plate on the unit square.

    Δ²u = 4π⁴ (4 cos 2πx₁ cos 2πx₂ - cos 2πx₁ - cos 2πx₂),    u = sin²(πx₁) sin²(πx₂)

    with u = 0 and ∂u/∂n = 0 on the faces, as one term of two components. The weight of the equation
    is 1e-4, since its right hand side has a root mean square of 870.

    Args:
        n_interior: Number of points in the domain.
        n_boundary: Number of points on the faces.
    """
    domain = Box.unit(2)
    interior = LossTerm(
        operators={"bilap_u": Bilaplacian()},
        residual=_residual,
        points=domain.interior(n_interior),
        weight=1e-4,
        name="interior",
    )
    clamped = LossTerm(
        operators={"u": Value(), "u_n": Directional(domain.normal)},
        residual=_clamped,
        points=domain.faces(n_boundary),
        name="boundary",
    )
    return Problem(
        name="biharmonic_plate",
        terms=(interior, clamped),
        d_in=2,
        evaluation=domain.interior(10_000),
        solution=_squared_sines,
    )


def _residual(x: Tensor, bilap_u: Tensor) -> Tensor:
    first, second = (torch.cos(2 * math.pi * x[:, i : i + 1]) for i in (0, 1))
    return bilap_u - 4 * math.pi**4 * (4 * first * second - first - second)


def _clamped(x: Tensor, u: Tensor, u_n: Tensor) -> Tensor:
    return torch.cat([u, u_n], 1)


def _squared_sines(x: TensorOrJet) -> TensorOrJet:
    return (torch.sin(math.pi * x[:, :1]) * torch.sin(math.pi * x[:, 1:])) ** 2
