"""One term of a PINN loss, as data: derivatives, residual, points and weight."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.diffops import DifferentialOperator, evaluate
from pinncurv.problems.samplers import Sampler
from pinncurv.problems.signature import check_operators, check_signature

Residual = Callable[..., Tensor]
Weight = float | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LossTerm:
    """A weighted least squares term of the loss.

    1 / (2 N) sum_n w_n |r(x_n, D_1 u(x_n), D_2 u(x_n), ...)|^2

    Args:
        operators: The differential operators D_k, declared by name.
        residual: The pointwise function r. It is called with all points, [N, d], and, by keyword,
            the values of the operators, e.g. [N, d_out]; it returns [N] or [N, V].
        points: Where the points come from.
        weight: One non-negative number, one per point [N], or a function of the points that returns
            one per point.
        name: How errors and records call this term.

    Raises:
        TypeError: If the residual is not callable or an operator is a class, not an object.
        ValueError: If the operators' names are no keyword arguments of the residual, or a weight is
            negative or not finite.
    """

    operators: Mapping[str, DifferentialOperator]
    residual: Residual
    points: Sampler
    weight: Weight = 1.0
    name: str = "term"

    def __post_init__(self) -> None:
        """Check the declaration once, so that evaluations need not."""
        object.__setattr__(self, "operators", dict(self.operators))
        if not callable(self.residual):
            raise TypeError(
                f"Term '{self.name}': the residual must be callable, got "
                f"{type(self.residual).__name__}. Pass a function of x and the operators' values."
            )
        check_operators(self.name, self.operators)
        check_signature(self.name, self.residual, self.operators)
        if isinstance(self.weight, Tensor):
            _check_weights(self.name, self.weight)
        elif not callable(self.weight):
            object.__setattr__(self, "weight", _checked_number(self.name, self.weight))

    def at(self, part: slice) -> "LossTerm":
        """Return the term with the operators at a part of the points.

        Only coefficients that are given as tensors, one per point, make a difference. Weights stay
        those of all points.

        Args:
            part: Which of the points.

        Returns:
            The term, to be evaluated at ``x[part]``.
        """
        operators = {name: operator.at(part) for name, operator in self.operators.items()}
        if all(operators[name] is operator for name, operator in self.operators.items()):
            return self
        return replace(self, operators=operators)

    def evaluate(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "N V"]:
        """Evaluate the residual of a model, with all derivatives from one jet pass.

        r(x_n, D_1 u(x_n), D_2 u(x_n), ...)

        Args:
            model: The network u, [N, d] -> [N, d_out].
            x: The points, [N, d].

        Returns:
            The residual; one column per component.

        Raises:
            ValueError: If the residual has not one row per point, or mixes the points.
        """
        return self.apply(x, evaluate(self.operators, model, x))

    def apply(self, x: Tensor, values: Mapping[str, Tensor]) -> Float[Tensor, "N V"]:
        """Apply the residual function to given values of the operators.

        r(x_n, values_n)

        Args:
            x: The points, [N, d].
            values: The values of the operators by name, as `diffops.evaluate` returns them.

        Returns:
            The residual; one column per component.

        Raises:
            ValueError: If the residual has not one row per point, or mixes the points.
        """
        residual = self.residual(x, **values)
        num_points = x.shape[0]
        if residual.ndim == 1:
            residual = residual.unsqueeze(1)
        if residual.ndim != 2 or residual.shape[0] != num_points:
            raise ValueError(
                f"Term '{self.name}': the residual must have shape [N] or [N, V] with N = "
                f"{num_points} points, got {list(residual.shape)} from values of shapes "
                f"{ {name: list(value.shape) for name, value in values.items()} }. "
                "Keep the points as first dimension and at most one more dimension."
            )
        if residual.shape[1] == num_points > 1:
            self._check_not_broadcast(x, values, residual.shape[1])
        return residual

    def weights(self, x: Tensor) -> float | Tensor:
        """Return the weights of the points.

        w_n = w(x_n)

        Args:
            x: The points, [N, d].

        Returns:
            One number for all points, or a tensor [N] on the points' device in their dtype.

        Raises:
            ValueError: If there is not one weight per point, or one is negative or not finite.
        """
        if isinstance(self.weight, float):
            return self.weight
        if isinstance(self.weight, Tensor):
            weights = self.weight
        else:
            weights = self.weight(x)
            _check_weights(self.name, weights)
        if weights.shape != x.shape[:1]:
            raise ValueError(
                f"Term '{self.name}': there must be one weight per point, shape [{x.shape[0]}], "
                f"got {list(weights.shape)}. Pass a function x -> [N] as weight if the number of "
                "points changes."
            )
        return weights.to(x)

    def scaled_residual(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "N V"]:
        """Evaluate the residual, scaled such that the loss is half its squared norm.

        sqrt(w_n / N) r_n

        Args:
            model: The network u, [N, d] -> [N, d_out].
            x: The points, [N, d].

        Returns:
            The scaled residual; one column per component.
        """
        return self.evaluate(model, x) * self.scale(x)

    def scale(self, x: Tensor) -> float | Float[Tensor, "N 1"]:
        """Return the factors that carry weights and 1/N, such that the loss is a sum of squares.

        sqrt(w_n / N)

        Args:
            x: The points, [N, d].

        Returns:
            One number for all points, or one per point, [N, 1].
        """
        weights = self.weights(x)
        if isinstance(weights, float):
            return math.sqrt(weights / x.shape[0])
        return (weights / x.shape[0]).sqrt().unsqueeze(1)

    def check_points(self, x: Tensor) -> None:
        """Check a batch of points: a non-empty, finite, floating point matrix [N, d].

        Raises:
            ValueError: If it is not; the error names the term.
        """
        expected = f"Term '{self.name}': points must form a matrix [N, {self.points.dim}]"
        if x.ndim != 2 or x.shape[1] != self.points.dim:
            raise ValueError(
                f"{expected}, got shape {list(x.shape)}. Use x[:, None] for points on a line, or "
                "declare the term with a sampler of this dimension."
            )
        if not x.shape[0]:
            raise ValueError(f"{expected} with N >= 1, got no points. Drop the term instead.")
        if not x.is_floating_point():
            raise ValueError(f"{expected} of floating point numbers, got {x.dtype}. Cast them.")
        finite = x.isfinite()
        if not finite.all():
            bad = int((~finite.all(dim=1)).sum())
            raise ValueError(
                f"{expected} of finite numbers, got NaN or infinity in {bad} of {x.shape[0]} "
                "points. Remove those points."
            )

    def _check_not_broadcast(self, x: Tensor, values: Mapping[str, Tensor], columns: int) -> None:
        """Raise if [N, N] came from [N] against [N, 1]: one point alone has fewer components."""
        with torch.no_grad():
            first = self.residual(x[:1], **{name: value[:1] for name, value in values.items()})
        components = first.shape[1] if first.ndim == 2 else 1
        if components != columns:
            raise ValueError(
                f"Term '{self.name}': the residual has shape [{columns}, {columns}] for "
                f"N = {columns} points, but {components} component(s) for the first point alone. "
                "A tensor of shape [N] was broadcast against one of shape [N, 1] to [N, N]. "
                "Values of operators have shape [N, d_out]; give your own data that shape too, "
                "e.g. by f[:, None] or sum(dim=-1, keepdim=True)."
            )


def _checked_number(term: str, weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(
            f"Term '{term}': a weight must be a finite number >= 0, a tensor [N] of such numbers "
            f"or a function that returns one, got {weight!r}. Use 0 to switch the term off."
        )
    return number


def _check_weights(term: str, weights: Tensor) -> None:
    if weights.ndim != 1:
        raise ValueError(
            f"Term '{term}': there must be one weight per point, shape [N], got "
            f"{list(weights.shape)}. Use squeeze(-1) for a column of weights."
        )
    valid = (weights >= 0) & (weights < math.inf)
    if not valid.all():
        bad = weights[~valid]
        raise ValueError(
            f"Term '{term}': weights must be finite and >= 0, got {bad[:3].tolist()} among "
            f"{len(bad)} such of {len(weights)}. Use 0 to switch points off."
        )
