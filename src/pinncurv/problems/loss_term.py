"""One term of a PINN loss, as data: derivatives, residual, points and weight."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.diffops import DifferentialOperator, evaluate, named_parameters_of
from pinncurv.problems.residual import Residual, call_residual
from pinncurv.problems.samplers import Sampler, is_fixed
from pinncurv.problems.signature import check_data, check_operators, check_signature

Weight = float | Sequence[float] | Tensor | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class LossTerm:
    """A weighted least squares term of the loss.

    1 / (2 N) sum_n w_n |r(x_n, D_1 u(x_n), D_2 u(x_n), ..., data_n)|^2

    Args:
        operators: The differential operators D_k, declared by name.
        residual: The pointwise function r, or an nn.Module whose parameters (a coefficient of the
            PDE, a network for an unknown source) are trained along. It is called with points,
            [N, d], and, by keyword, the values of the operators, e.g. [N, d_out], and the data; it
            returns [N] or [N, V]. Large batches are processed in blocks of points, so it must not
            capture tensors with one row per point: they are data.
        points: Where the points come from.
        weight: One non-negative number, or a tensor without axes, which may be written to as
            training goes on; a sequence of V numbers, one per component of the residual;
            a tensor with one per point, [N], or per point and component, [N, V]; or a function of
            the points that returns such a tensor.
        name: How errors and records call this term.
        data: What is known at each point (measurements, forcing, ...), by name: tensors with one
            row per point, [N, ...].

    Raises:
        TypeError: If the residual is not callable, the points are no sampler, an operator is a
            class, not an object, or data is no tensor.
        ValueError: If the names of operators and data are no keyword arguments of the residual,
            a weight is negative or not finite, or tensors with one row per point come with a
            sampler that draws new points.
    """

    operators: Mapping[str, DifferentialOperator]
    residual: Residual
    points: Sampler
    weight: Weight = 1.0
    name: str = "term"
    data: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the declaration once, so that evaluations need not."""
        if not isinstance(self.operators, Mapping):
            raise TypeError(
                f"Term '{self.name}': the operators must be a dictionary, got "
                f"{type(self.operators).__name__}. Name them: {{'u': Value(), 'lap': Laplacian()}}."
            )
        _check_sampler(self.name, self.points)
        object.__setattr__(self, "operators", dict(self.operators))
        object.__setattr__(self, "data", dict(self.data))
        if not callable(self.residual):
            raise TypeError(
                f"Term '{self.name}': the residual must be callable, got "
                f"{type(self.residual).__name__}. Pass a function of x and the operators' values."
            )
        check_operators(self.name, self.operators)
        check_data(self.name, self.data, self.operators)
        check_signature(self.name, self.residual, self.operators, self.data)
        if isinstance(self.weight, Tensor):
            _check_weights(self.name, self.weight)
        elif isinstance(self.weight, Sequence) and not isinstance(self.weight, str):
            numbers = tuple(checked_number(self.name, weight) for weight in self.weight)
            object.__setattr__(self, "weight", numbers)
        elif not callable(self.weight):
            object.__setattr__(self, "weight", checked_number(self.name, self.weight))
        if not is_fixed(self.points) and (per_point := list(self._per_point())):
            raise ValueError(
                f"Term '{self.name}': tensors with one row per point must belong to points that "
                f"stay, but {', '.join(per_point)} would meet new points from "
                f"{type(self.points).__name__} with every sample. Use points=Fixed(x) with the "
                "points that they belong to, or functions of x. A sampler of your own that always "
                "gives the same points says so by an attribute fixed = True."
            )

    def _per_point(self) -> Iterator[str]:
        """Yield what is given as a tensor with one row per point."""
        yield from (f"data '{name}'" for name in self.data)
        if isinstance(self.weight, Tensor) and self.weight.ndim:
            yield "the weight"
        for name, operator in self.operators.items():
            given = {k: v for k, v in vars(operator).items() if isinstance(v, Tensor) and v.ndim}
            cut = operator.at(slice(0, 0)) if given else operator
            if any(getattr(cut, k).shape != v.shape for k, v in given.items()):
                yield f"operator '{name}'"

    def at(self, part: slice | Tensor) -> "LossTerm":
        """Return the term with the operators and the data at a part of the points.

        Only data and coefficients that are given as tensors, one per point, make a difference.
        Weights stay those of all points.

        Args:
            part: Which of the points.
        """
        operators = {name: operator.at(part) for name, operator in self.operators.items()}
        if not self.data and all(operators[name] is self.operators[name] for name in operators):
            return self
        data = {name: tensor[part] for name, tensor in self.data.items()}
        return self.with_fields(operators=operators, data=data)

    def redrawn(self, generator: torch.Generator) -> "LossTerm":
        """Return the term with new random directions of the operators that have any.

        Args:
            generator: Randomness; not used where no operator has random directions.
        """
        if all(operator.sampling is None for operator in self.operators.values()):
            return self
        # one number for all, so that operators that share directions go on to do so
        seed = int(torch.randint((1 << 63) - 1, (), generator=generator, device=generator.device))
        operators = {name: operator.redrawn(seed) for name, operator in self.operators.items()}
        return self.with_fields(operators=operators)

    def to(self, x: Tensor) -> "LossTerm":
        """Return the term with its data on the points' device and, if real, in their dtype.

        Args:
            x: The points, [N, d].
        """
        data = {
            name: tensor.to(x.device, x.dtype if tensor.is_floating_point() else tensor.dtype)
            for name, tensor in self.data.items()
        }
        if all(data[name] is self.data[name] for name in data):
            return self
        return self.with_fields(data=data)

    def with_fields(self, **fields: Any) -> "LossTerm":
        """Return a copy with other fields, which have been checked before."""
        term = copy.copy(self)
        for name, value in fields.items():
            object.__setattr__(term, name, value)
        return term

    def evaluate(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "N V"]:
        """Evaluate the residual of a model, with all derivatives from one jet pass.

        r(x_n, D_1 u(x_n), D_2 u(x_n), ..., data_n)

        Args:
            model: The network u, [N, d] -> [N, d_out].
            x: The points, [N, d].

        Raises:
            TypeError: If the residual returns no tensor.
            ValueError: If the shapes of values and data do not fit together, or the residual has
                not one row per point, another dtype than the points, or mixes the points.
        """
        return self.to(x).apply(x, evaluate(self.operators, model, x))

    def apply(self, x: Tensor, values: Mapping[str, Tensor]) -> Float[Tensor, "N V"]:
        """Apply the residual function to given values of the operators.

        r(x_n, values_n, data_n)

        Args:
            x: The points, [N, d].
            values: The values of the operators by name, as `diffops.evaluate` returns them.

        Raises:
            TypeError: If the residual returns no tensor.
            ValueError: If the shapes of values and data do not fit together, or the residual has
                not one row per point, another dtype than the points, or mixes the points.
        """
        return call_residual(self.name, self.residual, x, {**values, **self.data})

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is trained in residual and coefficients, by names like TERM.residual.nu."""
        yield from named_parameters_of(self.residual, f"{self.name}.residual")
        for name, operator in self.operators.items():
            for inner, parameter in operator.named_parameters():
                yield f"{self.name}.{name}.{inner}", parameter

    def weights(self, x: Tensor) -> float | Tensor:
        """Return the weights of the points.

        w_n = w(x_n)

        Args:
            x: The points, [N, d].

        Raises:
            ValueError: If there is not one weight per point, or one is negative or not finite.
        """
        if isinstance(self.weight, float):
            return self.weight
        if isinstance(self.weight, tuple):
            return x.new_tensor([self.weight])
        assert not isinstance(self.weight, Sequence)
        with torch.enable_grad():  # or what is trained would not show under torch.no_grad
            weights = self.weight if isinstance(self.weight, Tensor) else self.weight(x)
        if isinstance(self.weight, Tensor) and not weights.ndim:
            _check_weights(self.name, weights)  # again: it may have been written to
            return float(weights)
        if not isinstance(weights, Tensor):
            raise TypeError(
                f"Term '{self.name}': a function as weight must return a tensor, [N] or [N, V], "
                f"got {type(weights).__name__}. Pass a number as it is, or a tensor without axes "
                "for one that changes, not as a function."
            )
        _check_weights(self.name, weights)
        if weights.shape[0] != x.shape[0]:
            raise ValueError(
                f"Term '{self.name}': there must be one weight per point, shape [{x.shape[0]}] or "
                f"[{x.shape[0]}, V], got {list(weights.shape)}. Pass a function x -> [N] as weight "
                "if the number of points changes."
            )
        return weights.to(x)

    def scaled_residual(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "N V"]:
        """Evaluate the residual, scaled such that the loss is half its squared norm.

        sqrt(w_n / N) r_n

        Args:
            model: The network u, [N, d] -> [N, d_out].
            x: The points, [N, d].
        """
        return self.evaluate(model, x) * self.scale(x)

    def scale(self, x: Tensor) -> float | Float[Tensor, "_ _"]:
        """Return the factors that carry weights and 1/N, such that the loss is a sum of squares.

        sqrt(w_n / N)

        Args:
            x: The points, [N, d].
        """
        weights = self.weights(x)
        if isinstance(weights, float):
            return math.sqrt(weights / x.shape[0])
        scale = (weights / x.shape[0]).sqrt()
        return scale if scale.ndim == 2 else scale.unsqueeze(1)

    def check_points(self, x: Tensor) -> None:
        """Check a batch of points: a non-empty, finite, floating point matrix [N, d].

        Raises:
            TypeError: If it is no tensor.
            ValueError: If it is not, or the data have not one row per point; the error names the
                term.
        """
        expected = f"Term '{self.name}': points must form a matrix [N, {self.points.dim}]"
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{expected}, got {type(x).__name__}. Convert them with torch.as_tensor."
            )
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
        for name, tensor in self.data.items():
            if tensor.shape[0] != x.shape[0]:
                raise ValueError(
                    f"Term '{self.name}': data '{name}' must have one row per point, "
                    f"N = {x.shape[0]}, got shape {list(tensor.shape)}. Keep the data's points, "
                    "e.g. with points=Fixed(x), or use a function of x in the residual."
                )


def checked_number(term: str, weight: Any) -> float:
    """Return a weight as a number, after checking that it is finite and >= 0."""
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


def _check_sampler(term: str, points: Any) -> None:
    """Check that points come from a sampler, not from a tensor or a function."""
    if isinstance(points, type) or not (hasattr(points, "sample") and hasattr(points, "dim")):
        raise TypeError(
            f"Term '{term}': points must be a sampler, with the method sample(generator, dtype, "
            f"device) and the number dim, got {type(points).__name__}. Use Fixed(x) for a tensor "
            "of points, or e.g. Box.unit(2).interior(100)."
        )


def _check_weights(term: str, weights: Tensor) -> None:
    if weights.requires_grad:
        raise ValueError(
            f"Term '{term}': a weight must not require a gradient, which no operator would contain,"
            " got one that does. Pass weight.detach()."
        )
    if weights.ndim > 2:
        raise ValueError(
            f"Term '{term}': there must be one weight per point, shape [N], or per point and "
            f"component, [N, V], got {list(weights.shape)}."
        )
    valid = (weights >= 0) & (weights < math.inf)
    if not valid.all():
        bad = weights[~valid]
        raise ValueError(
            f"Term '{term}': weights must be finite and >= 0, got {bad[:3].tolist()} among "
            f"{len(bad)} such of {weights.numel()}. Use 0 to switch points off."
        )
