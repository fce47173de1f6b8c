"""Conditions that prescribe the unknown itself: boundary, initial, data."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from pinncurv.diffops import Value
from pinncurv.problems.loss_term import LossTerm, Weight
from pinncurv.problems.samplers import Sampler


def dirichlet(
    values: Callable[[Tensor], Tensor],
    points: Sampler,
    weight: Weight = 1.0,
    name: str = "boundary",
) -> LossTerm:
    """Prescribe the values of u at points (of a boundary, a start, a measurement).

    u = g

    Args:
        values: The function g, [N, d_in] -> [N, d_out].
        points: Where the condition holds.
        weight: The weight of the term.
        name: The name of the term.
    """
    return LossTerm(
        operators={"u": Value()},
        residual=partial(_difference, values),
        points=points,
        weight=weight,
        name=name,
    )


def _difference(values: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> Tensor:
    return u - values(x)
