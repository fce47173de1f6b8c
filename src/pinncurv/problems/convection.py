"""A wave that is carried along without changing its shape."""

import math
from functools import partial

import torch
from torch import Tensor

from pinncurv.diffops import Partial
from pinncurv.problems.conditions import initial_and_lateral
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.numbers import check_finite
from pinncurv.problems.problem import Problem, TensorOrJet


def convection(
    speed: float = 30.0, n_interior: int = 1000, n_boundary: int = 100, n_initial: int = 256
) -> Problem:
    """A sine that moves to the right.

    u_t + β u_x = 0,    u = sin(x - βt),    on [0, 1] x [0, 2π]

    Args:
        speed: The number β.
        n_interior: Number of points in space and time.
        n_boundary: Number of points at both ends, where u is prescribed; 0 for networks that have
            the period 2π by themselves.
        n_initial: Number of points at the start.

    Raises:
        ValueError: If the speed is not finite.

    Source: A. S. Krishnapriyan et al., Characterizing possible failure modes in physics-informed
    neural networks, NeurIPS 2021 (arXiv 2109.01050).
    """
    check_finite("speed", speed)
    domain = SpaceTimeBox(Box((0.0,), (2 * math.pi,)))
    solution = partial(_moved_sine, speed)
    interior = LossTerm(
        operators={"u_t": Partial(0), "u_x": Partial(1)},
        residual=partial(_residual, speed),
        points=domain.interior(n_interior),
        name="interior",
    )
    return Problem(
        name="convection",
        terms=(interior, *initial_and_lateral(solution, domain, n_initial, n_boundary)),
        d_in=2,
        evaluation=domain.interior(10_000),
        solution=solution,
        coordinates=("$t$", "$x$"),
        periodic={} if n_boundary else {1: (0.0, 2 * math.pi)},
    )


def _residual(speed: float, x: Tensor, u_t: Tensor, u_x: Tensor) -> Tensor:
    return u_t + speed * u_x


def _moved_sine(speed: float, x: TensorOrJet) -> TensorOrJet:
    return torch.sin(x[:, 1:] - speed * x[:, :1])
