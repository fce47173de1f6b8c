"""Whether a network is periodic where a problem leaves that to it."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pinncurv.problems.conditions import PeriodicPairs
from pinncurv.problems.problem import Problem

_POINTS = 16


class NotPeriodic(UserWarning):
    """A network has other values at one end of a period than at the other, and no term about it."""


@torch.no_grad()
def warn_unless_periodic(
    problem: Problem, model: Callable[[Tensor], Any], points: Sequence[Tensor]
) -> None:
    """Warn if a network misses a periodic condition that its problem has no term for.

    |u(x) - u(y)| <= √ε max |u|,  x_i and y_i the ends of a period,  x_j = y_j else

    Args:
        problem: The problem, with ``periodic`` coordinates.
        model: The network; if it has several outputs, it is not looked at.
        points: The points of each term, of which the first few are moved to the ends.
    """
    x = torch.cat([part[:_POINTS] for part in points if part.shape[1] == problem.d_in])
    held = {t.residual.dim for t in problem.terms if isinstance(t.residual, PeriodicPairs)}
    for i in sorted(set(problem.periodic) - held):
        ends = x.new_tensor(problem.periodic[i])
        index = torch.tensor(i, device=x.device)
        left, right = (model(x.index_fill(1, index, end)) for end in ends)
        if not isinstance(left, Tensor):
            return
        difference, size = float((left - right).abs().max()), float(left.abs().max())
        if difference > torch.finfo(x.dtype).eps ** 0.5 * size:
            a, b = problem.periodic[i]
            warnings.warn(
                f"The network must be periodic in coordinate {i}, with equal values at {a:.6g} and "
                f"{b:.6g}, since no term of problem '{problem.name}' says so, got differences of "
                f"{difference:.1e}. Begin it with pinncurv.problems.PeriodicEmbedding, or add a "
                "term of pinncurv.problems.periodic. If another term makes it so, take "
                "dataclasses.replace(problem, periodic={}).",
                NotPeriodic,
                stacklevel=4,  # the caller of Objective.sample; torch wraps this
            )
