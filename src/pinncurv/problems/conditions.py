"""Conditions on the unknown at points of a boundary, a start or a measurement."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from pinncurv.diffops import Directional, Partial, Value
from pinncurv.jets import derivative
from pinncurv.problems.domains import SpaceTimeBox
from pinncurv.problems.loss_term import LossTerm, Weight
from pinncurv.problems.numbers import check_finite, check_positive
from pinncurv.problems.problem import TensorOrJet
from pinncurv.problems.samplers import Fixed, Sampler

Field = Callable[[Tensor], Tensor]
Components = int | Sequence[int] | None
Of = int | str | None


def dirichlet(
    values: Field,
    points: Sampler,
    weight: Weight = 1.0,
    name: str = "boundary",
    components: Components = None,
    of: Of = None,
) -> LossTerm:
    """Prescribe the values of u at points (of a boundary, a start, a measurement).

    u = g

    Args:
        values: The function g, [N, d_in] -> [N, d_out], one column per prescribed component.
        points: Where the condition holds.
        weight: The weight of the term.
        name: The name of the term.
        components: Which components of u are prescribed, one or several; None for all.
        of: Which output of the network is u, if that returns a tuple or a dictionary.

    Raises:
        TypeError: If the values are no function.
    """
    residual = partial(_difference, _checked(values, name), components)
    return LossTerm({"u": Value(of=of)}, residual, points, weight, name)


def initial_and_lateral(
    values: Field,
    domain: SpaceTimeBox,
    n_initial: int,
    n_boundary: int,
    initial: Field | None = None,
    initial_weight: float = 1.0,
    components: Components = None,
    of: Of = None,
) -> tuple[LossTerm, ...]:
    """Prescribe the values of u at the start of a box in space and time, and on its spatial faces.

    u = g

    Args:
        values: The function g, [N, 1 + d] -> [N, d_out], one column per prescribed component.
        domain: The box.
        n_initial: Number of points at the start.
        n_boundary: Number of points on the spatial faces; 0 leaves that condition out, for networks
            that are periodic by themselves.
        initial: The values at the start, if others: those of the time window before.
        initial_weight: The weight of the term at the start.
        components: Which components of u are prescribed, one or several; None for all.
        of: Which output of the network is u, if that returns a tuple or a dictionary.
    """
    prescribe = partial(dirichlet, components=components, of=of)
    begin = values if initial is None else initial
    start = prescribe(begin, domain.initial(n_initial), initial_weight, "initial")
    return (start, prescribe(values, domain.lateral(n_boundary))) if n_boundary else (start,)


def neumann(
    values: Field,
    normal: Tensor | Field,
    points: Sampler,
    weight: Weight = 1.0,
    name: str = "boundary",
    components: Components = None,
    of: Of = None,
) -> LossTerm:
    """Prescribe the derivative of u along the normal.

    ∂u/∂n = g

    Args:
        values: The function g, [N, d_in] -> [N, d_out], one column per prescribed component.
        normal: n, [d_in], or a function [N, d_in] -> [N, d_in], such as `Box.normal`.
        points: Where the condition holds.
        weight: The weight of the term.
        name: The name of the term.
        components: Which components of u are prescribed, one or several; None for all.
        of: Which output of the network is u, if that returns a tuple or a dictionary.

    Raises:
        TypeError: If the values are no function.
    """
    operators = {"u_n": Directional(normal, of=of)}
    residual = partial(_flux_difference, _checked(values, name), components)
    return LossTerm(operators, residual, points, weight, name)


def robin(
    values: Field,
    coefficient: float,
    normal: Tensor | Field,
    points: Sampler,
    weight: Weight = 1.0,
    name: str = "boundary",
    components: Components = None,
    of: Of = None,
) -> LossTerm:
    """Prescribe a sum of u and its derivative along the normal.

    ∂u/∂n + α u = g

    Args:
        values: The function g, [N, d_in] -> [N, d_out], one column per prescribed component.
        coefficient: The number α.
        normal: n, [d_in], or a function [N, d_in] -> [N, d_in], such as `Disk.normal`.
        points: Where the condition holds.
        weight: The weight of the term.
        name: The name of the term.
        components: Which components of u are prescribed, one or several; None for all.
        of: Which output of the network is u, if that returns a tuple or a dictionary.

    Raises:
        TypeError: If the values are no function.
        ValueError: If the coefficient is not finite.
    """
    check_finite("coefficient of a Robin condition", coefficient)
    operators = {"u": Value(of=of), "u_n": Directional(normal, of=of)}
    residual = partial(_robin_difference, _checked(values, name), components, coefficient)
    return LossTerm(operators, residual, points, weight, name)


def periodic(
    network: nn.Module,
    dim: int,
    period: float,
    points: Sampler,
    weight: Weight = 1.0,
    name: str = "periodic",
    components: Components = None,
    of: Of = None,
) -> LossTerm:
    """Let u and its derivative along a coordinate agree at pairs of points, a period apart.

    u(x) = u(x + period e_i),    ∂_i u(x) = ∂_i u(x + period e_i)

    The second point of a pair is out of reach of the operators, so that the term needs the network.
    A network that starts with a `PeriodicEmbedding` has every derivative periodic, without a term.

    Args:
        network: The network that is trained.
        dim: The coordinate i.
        period: The period, negative if the points are at the upper end.
        points: The first point of every pair.
        weight: The weight of the term.
        name: The name of the term.
        components: Which components of u are periodic, one or several; None for all.
        of: Which output of the network is u, if that returns a tuple or a dictionary.

    Raises:
        ValueError: If the period is zero or not finite, or the coordinate negative.
    """
    check_positive("size of a period", abs(period))
    if dim < 0:
        raise ValueError(f"The coordinate of a period must count from 0, got {dim}.")
    return LossTerm(
        operators={"u": Value(of=of), "slope": Partial(dim, of=of)},
        residual=PeriodicPairs(network, dim, period, components, of),
        points=points,
        weight=weight,
        name=name,
    )


def point(
    values: Tensor,
    x: Tensor,
    weight: Weight = 1.0,
    name: str = "point",
    components: Components = None,
    of: Of = None,
) -> LossTerm:
    """Prescribe the values of u at single points, such as a pressure of 0 in a corner.

    u(x_k) = y_k

    Args:
        values: The values y, [K, d_out], one column per prescribed component.
        x: The points, [K, d_in].
        weight: The weight of the term.
        name: The name of the term.
        components: Which components of u are prescribed, one or several; None for all.
        of: Which output of the network is u, if that returns a tuple or a dictionary.
    """
    return LossTerm(
        operators={"u": Value(of=of)},
        residual=partial(_data_difference, components),
        points=Fixed(x),
        weight=weight,
        name=name,
        data={"y": values},
    )


class PeriodicPairs(nn.Module):
    """The residual of a periodic condition, which owns the network."""

    def __init__(
        self, network: nn.Module, dim: int, period: float, components: Components, of: Of
    ) -> None:
        super().__init__()
        self.network, self.dim, self.period = network, dim, period
        self.components, self.of = components, of

    def forward(self, x: TensorOrJet, u: TensorOrJet, slope: TensorOrJet) -> TensorOrJet:
        before, after = x[:, : self.dim], x[:, self.dim + 1 :]
        partner = torch.cat([before, x[:, self.dim : self.dim + 1] + self.period, after], 1)
        there = self._u(partner), derivative(self._u, partner, self.dim)
        differences = u - there[0], slope - there[1]
        return torch.cat([_chosen(self.components, part) for part in differences], 1)

    def _u(self, x: TensorOrJet) -> TensorOrJet:
        output = self.network(x)
        return output if self.of is None else output[self.of]


def _checked(values: Field, term: str) -> Field:
    if not callable(values):
        raise TypeError(
            f"Term '{term}': the prescribed values must be a function of the points [N, d_in], got "
            f"{type(values).__name__}. Write lambda x: torch.zeros_like(x[:, :1]) for zeros."
        )
    return values


def _chosen(components: Components, u: TensorOrJet) -> TensorOrJet:
    if components is None:
        return u
    chosen = tuple(components) if isinstance(components, Sequence) else (components,)
    last = u.shape[1] - 1
    valid = all(type(i) is int and 0 <= i <= last for i in chosen)
    if not (chosen and valid and len(set(chosen)) == len(chosen)):
        raise ValueError(
            f"Components must be different positions in the unknown, from 0 to {last}, at "
            f"least one, got {chosen}. Leave them out for all."
        )
    return torch.stack([u[:, i] for i in chosen], 1)


def _difference(values: Field, components: Components, x: Tensor, u: Tensor) -> Tensor:
    return _minus(_chosen(components, u), values(x))


def _flux_difference(values: Field, components: Components, x: Tensor, u_n: Tensor) -> Tensor:
    return _difference(values, components, x, u_n)


def _robin_difference(
    values: Field, components: Components, coefficient: float, x: Tensor, u: Tensor, u_n: Tensor
) -> Tensor:
    return _difference(values, components, x, u_n + coefficient * u)


def _data_difference(components: Components, x: Tensor, u: Tensor, y: Tensor) -> Tensor:
    return _minus(_chosen(components, u), y)


def _minus(u: TensorOrJet, values: TensorOrJet) -> TensorOrJet:
    """Subtract prescribed values; a column less or more would be broadcast in silence."""
    shape = list(getattr(values, "shape", ()))
    if shape != list(u.shape):
        raise ValueError(
            "The prescribed values must have one row per point and one column per component that "
            f"is prescribed, shape {list(u.shape)}, got {shape}. Write e.g. g(x)[:, None], or "
            "torch.zeros_like(x[:, :1]) for zeros, or name the components by components=."
        )
    return u - values
