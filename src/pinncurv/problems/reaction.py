"""A reaction that ends in saturation, at every point for itself."""

import math
from functools import partial

import torch
from torch import Tensor

from pinncurv.diffops import Partial, Value
from pinncurv.problems.conditions import initial_and_lateral
from pinncurv.problems.domains import Box, SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.numbers import check_finite
from pinncurv.problems.problem import Problem, TensorOrJet


def reaction(
    rate: float = 5.0, n_interior: int = 1000, n_boundary: int = 100, n_initial: int = 256
) -> Problem:
    """The logistic growth of a Gaussian.

    u_t = ρ u (1 - u),    u = h e^{ρt} / (h e^{ρt} + 1 - h),    h = exp(-(x - π)² / (2 (π/4)²)),
    on [0, 1] x [0, 2π]

    Args:
        rate: The number ρ.
        n_interior: Number of points in space and time.
        n_boundary: Number of points at both ends, where u is prescribed; 0 leaves that out, as the
            start determines u. A network of period 2π cannot match it: h has a kink of 3e-3 there.
        n_initial: Number of points at the start.

    Raises:
        ValueError: If the rate is not finite.

    Source: A. S. Krishnapriyan et al., Characterizing possible failure modes in physics-informed
    neural networks, NeurIPS 2021 (arXiv 2109.01050).
    """
    check_finite("rate", rate)
    domain = SpaceTimeBox(Box((0.0,), (2 * math.pi,)))
    solution = partial(_logistic, rate)
    interior = LossTerm(
        operators={"u": Value(), "u_t": Partial(0)},
        residual=partial(_residual, rate),
        points=domain.interior(n_interior),
        name="interior",
    )
    return Problem(
        name="reaction",
        terms=(interior, *initial_and_lateral(solution, domain, n_initial, n_boundary)),
        d_in=2,
        evaluation=domain.interior(10_000),
        solution=solution,
        coordinates=("$t$", "$x$"),
    )


def _residual(rate: float, x: Tensor, u: Tensor, u_t: Tensor) -> Tensor:
    return u_t - rate * u * (1 - u)


def _logistic(rate: float, x: TensorOrJet) -> TensorOrJet:
    start = torch.exp(-((x[:, 1:] - math.pi) ** 2) / (2 * (math.pi / 4) ** 2))
    grown = start * torch.exp(rate * x[:, :1])
    return grown / (grown + 1 - start)
