"""The same loss on other channels: what KFAC is when derivatives are propagated differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from pinncurv.diffops import Derivative, DifferentialOperator
from pinncurv.linearization import Linearization, linearize
from pinncurv.linops import PyTorchLinearOperator
from pinncurv.optim import Curvature

# Directions that differ by that part are not merged. Derivatives are scaled back.
_DIFFERENCE = 2.0**-20


@dataclass(frozen=True, eq=False)
class Uncollapsed(DifferentialOperator):
    """An operator with a channel for each of the derivatives that it sums.

    Σ_α c_α ∂^α u,  from the channels  c_α ∂^α u

    Args:
        operator: The operator.
    """

    operator: DifferentialOperator

    def requests(self, x: Tensor) -> dict[str, Derivative]:
        """Request every part of a sum."""
        return {
            f"{name}/{alpha}": Derivative(asked.directions, {alpha: c})
            for name, asked in self.operator.requests(x).items()
            for alpha, c in asked.terms.items()
        }

    def read(self, x: Tensor, derivatives: Mapping[str, Tensor]) -> Tensor:
        """Add up the parts."""
        sums: dict[str, Tensor] = {}
        for name, part in derivatives.items():
            key = name.rpartition("/")[0]
            sums[key] = sums[key] + part if key in sums else part
        return self.operator.read(x, sums)


@dataclass(frozen=True, eq=False)
class Unmerged(DifferentialOperator):
    """An operator with directions of its own, which it shares with no other operator.

    Args:
        operator: The operator.
        position: Its position among the operators of its term.
    """

    operator: DifferentialOperator
    position: int

    @property
    def _length(self) -> float:
        return 1 + self.position * _DIFFERENCE

    def requests(self, x: Tensor) -> dict[str, Derivative]:
        """Request derivatives along the same directions with a slightly different length."""
        return {
            name: Derivative(tuple(v * self._length for v in asked.directions), asked.terms)
            for name, asked in self.operator.requests(x).items()
        }

    def read(self, x: Tensor, derivatives: Mapping[str, Tensor]) -> Tensor:
        """Read derivatives along the directions of the right length."""
        asked = self.operator.requests(x)
        scaled = {
            name: part / self._length ** asked[name].order for name, part in derivatives.items()
        }
        return self.operator.read(x, scaled)


def uncollapsed(operators: Sequence[DifferentialOperator]) -> list[DifferentialOperator]:
    """Give every second derivative a channel of its own."""
    return [Uncollapsed(operator) for operator in operators]


def unmerged(operators: Sequence[DifferentialOperator]) -> list[DifferentialOperator]:
    """Give every operator channels of its own."""
    return [Unmerged(operator, position) for position, operator in enumerate(operators)]


@dataclass(frozen=True)
class OnChannels:
    """Curvature recipe: the one of the same loss, linearized on other channels.

    The exact Gauss-Newton matrix is the same. What averages over the channels is not.

    Args:
        curvature: The recipe.
        change: Says for the operators of a term which channels they get.
    """

    curvature: Curvature
    change: Callable[[Sequence[DifferentialOperator]], Sequence[DifferentialOperator]]

    def __call__(self, linearizations: Sequence[Linearization]) -> PyTorchLinearOperator:
        """Build the operator."""
        return self.curvature([self._linearized(old) for old in linearizations])

    def _linearized(self, old: Linearization) -> Linearization:
        operators = dict(
            zip(old.term.operators, self.change(list(old.term.operators.values())), strict=True)
        )
        term = replace(old.term, operators=operators)
        return linearize(term, old.model, old.x, old.fisher, old.chunk_size)
