"""A PDE problem: the terms of its loss, its solution, and the error of a network."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from pinncurv.problems.l2 import L2
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.samplers import Sampler

# A tensor, or a jet: known solutions are made of torch functions, which run on both.
TensorOrJet = Any


def zero(x: Tensor) -> Tensor:
    """Return 0 at points [N, d], as [N, 1]: what a homogeneous condition prescribes."""
    return torch.zeros_like(x[:, :1])


@dataclass(frozen=True)
class Errors:
    """How far a network is from the solution.

    rmse = sqrt(1/N sum_n |u(x_n) - u*(x_n)|^2),    relative = rmse / sqrt(1/N sum_n |u*(x_n)|^2)

    Components that are free up to a constant are compared after subtracting their means over the
    points, from the network and from the solution.

    Args:
        rmse: The root mean square error, not divided by the norm of the solution.
        relative: The same, divided by the root mean square of the solution.
        components: The relative error of each component of u alone.
    """

    rmse: float
    relative: float
    components: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean of the relative errors of the components."""
        return sum(self.components) / len(self.components)


@dataclass(frozen=True, eq=False)
class Problem:
    """A PDE with its conditions, as the terms of a loss.

    L = sum_t w_t / (2 N_t) sum_n |r_t(x_n)|^2

    Args:
        name: What records and figures call the problem.
        terms: The terms of the loss, with distinct names.
        d_in: Dimension of a point (with time, where there is one).
        evaluation: Where errors are measured.
        d_out: Number of components of the unknown u.
        solution: The known solution u*, [N, d_in] -> [N, d_out], if there is one.
        coordinates: What figures call the coordinates, the first of them at least.
        free_constants: Components of u, from 0, that the terms determine up to a constant only,
            such as a pressure.
        periodic: Coordinates in which u has the same values at both ends, (lower, upper), though no
            term says so: the network must be periodic by itself. A network that is not gets the
            warning `NotPeriodic` from ``Objective.sample``.

    Raises:
        ValueError: If there is no term, two share a name, dimensions disagree, a component or a
            periodic coordinate does not exist, or the ends of a period do not increase.
    """

    name: str
    terms: tuple[LossTerm, ...]
    d_in: int
    evaluation: Sampler
    d_out: int = 1
    solution: Callable[[Tensor], Tensor] | None = None
    coordinates: tuple[str, ...] = ()
    free_constants: tuple[int, ...] = ()
    periodic: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the parts fit together."""
        object.__setattr__(self, "terms", tuple(self.terms))
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names):
            raise ValueError(
                f"Problem '{self.name}' must have at least one term and their names must differ, "
                f"got {names}. Pass LossTerm(..., name=...)."
            )
        samplers = {t.name: t.points for t in self.terms if not isinstance(t, L2)}
        for name, sampler in {**samplers, "evaluation": self.evaluation}.items():
            if sampler.dim != self.d_in:
                raise ValueError(
                    f"Problem '{self.name}': points of '{name}' must have dimension d_in = "
                    f"{self.d_in}, got {sampler.dim}. Use a domain of that dimension (time counts)."
                )
        if not set(self.free_constants) <= set(range(self.d_out)):
            raise ValueError(
                f"Problem '{self.name}': free_constants must name components of the unknown, from "
                f"0 to {self.d_out - 1}, got {self.free_constants}. Pass their positions."
            )
        if not set(self.periodic) <= set(range(self.d_in)):
            raise ValueError(
                f"Problem '{self.name}': periodic must name coordinates, from 0 to "
                f"{self.d_in - 1}, got {dict(self.periodic)}. Pass e.g. {{1: (-1.0, 1.0)}}."
            )
        for i, (lower, upper) in self.periodic.items():
            if not -math.inf < lower < upper < math.inf:
                raise ValueError(
                    f"Problem '{self.name}': the ends of the period in coordinate {i} must be "
                    f"finite and increase, got ({lower}, {upper}). Pass (lower, upper)."
                )

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Tensor, ...]:
        """Draw one batch of points [N_t, d_in] per term, in the order of the terms."""
        return tuple(term.points.sample(generator, dtype, device) for term in self.terms)

    @torch.no_grad()
    def errors(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Errors:
        """Measure the error of a network u, [N, d_in] -> [N, d_out], at points x, see `Errors`.

        The network is evaluated in the dtype of its parameters, the solution in the finer one of
        that and the points'.

        Raises:
            ValueError: If the solution is not known or the network's shape differs from its.
        """
        if self.solution is None:
            raise ValueError(
                f"The errors of problem '{self.name}' need its solution, got solution=None. "
                "Pass Problem(..., solution=...), e.g. an interpolated numerical reference."
            )
        like = next(model.parameters(), x) if isinstance(model, nn.Module) else x
        x = x.to(torch.promote_types(x.dtype, like.dtype))
        u, expected = model(x.to(like.dtype)), self.solution(x)
        if u.shape != (x.shape[0], self.d_out) or expected.shape != u.shape:
            raise ValueError(
                f"Problem '{self.name}': network and solution must return shape "
                f"[{x.shape[0]}, {self.d_out}], got {list(u.shape)} from the network and "
                f"{list(expected.shape)} from the solution. Return one column per component."
            )
        is_free = [i in self.free_constants for i in range(self.d_out)]
        free = torch.tensor(is_free, device=x.device)
        u, expected = (v - torch.where(free, v.mean(0), 0) for v in (u, expected))
        squares, norms = (u - expected).square().mean(0), expected.square().mean(0)
        rmse = squares.sum().sqrt()
        components = tuple((squares / norms).sqrt().tolist())
        return Errors(float(rmse), float(rmse / norms.sum().sqrt()), components)
