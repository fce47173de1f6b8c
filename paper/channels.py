"""The same loss on other channels: what KFAC is when derivatives are propagated differently.

``python experiments/compare.py --operators kfac_expand paper/channels.py:kfac_uncollapsed``
``python experiments/train.py --optimizers kfac_star paper/channels.py:kfac_star_uncollapsed``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pinncurv.curvature import KFAC, reduce
from pinncurv.diffops import Derivative, DifferentialOperator
from pinncurv.linearization import Linearization, linearize
from pinncurv.linops import FactorDamping, PyTorchLinearOperator
from pinncurv.optim import Curvature, CurvatureOptimizer, ExponentialAverage, from_identity

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
        return {
            f"{name}/{alpha}": Derivative(asked.directions, {alpha: c})
            for name, asked in self.operator.requests(x).items()
            for alpha, c in asked.terms.items()
        }

    def read(self, x: Tensor, derivatives: Mapping[str, Tensor]) -> Tensor:
        sums: dict[str, Tensor] = {}
        for name, part in derivatives.items():
            key = name.rpartition("/")[0]
            sums[key] = sums[key] + part if key in sums else part
        return self.operator.read(x, sums)


@dataclass(frozen=True, eq=False)
class Unmerged(DifferentialOperator):
    """An operator with directions of its own, slightly longer, which it shares with no other.

    Args:
        operator: The operator.
        length: The length of its directions.
    """

    operator: DifferentialOperator
    length: float

    def requests(self, x: Tensor) -> dict[str, Derivative]:
        return {
            name: Derivative(tuple(v * self.length for v in asked.directions), asked.terms)
            for name, asked in self.operator.requests(x).items()
        }

    def read(self, x: Tensor, derivatives: Mapping[str, Tensor]) -> Tensor:
        asked = self.operator.requests(x)
        scaled = {n: part / self.length ** asked[n].order for n, part in derivatives.items()}
        return self.operator.read(x, scaled)


def uncollapsed(position: int, operator: DifferentialOperator) -> DifferentialOperator:
    """Give every second derivative a channel of its own."""
    return Uncollapsed(operator)


def unmerged(position: int, operator: DifferentialOperator) -> DifferentialOperator:
    """Give every operator channels of its own."""
    return Unmerged(operator, 1 + position * _DIFFERENCE)


@dataclass(frozen=True)
class OnChannels:
    """Curvature recipe: the one of the same loss, linearized on other channels.

    The exact Gauss-Newton matrix is the same. What averages over the channels is not.

    Args:
        curvature: The recipe.
        change: Returns, for the i-th operator of a term, the one on other channels.
    """

    curvature: Curvature
    change: Callable[[int, DifferentialOperator], DifferentialOperator]

    def __call__(self, linearizations: Sequence[Linearization]) -> PyTorchLinearOperator:
        """Build the operator."""
        return self.curvature([self._linearized(old) for old in linearizations])

    def _linearized(self, old: Linearization) -> Linearization:
        known = old.term.operators.items()
        operators = {name: self.change(i, operator) for i, (name, operator) in enumerate(known)}
        term = replace(old.term, operators=operators)
        return linearize(term, old.model, old.x, old.fisher, old.chunk_size)


kfac_uncollapsed = OnChannels(KFAC(), uncollapsed)
kfac_reduce_uncollapsed = OnChannels(KFAC(reduce), uncollapsed)
kfac_unmerged = OnChannels(KFAC(), unmerged)
kfac_reduce_unmerged = OnChannels(KFAC(reduce), unmerged)


def kfac_star_uncollapsed(
    params: Iterable[Any], damping: float = 1e-8, decay: float = 0.95
) -> CurvatureOptimizer:
    """Return KFAC* whose factors have a channel for every second derivative."""
    return _kfac_star(params, kfac_uncollapsed, damping, decay)


def kfac_star_unmerged(
    params: Iterable[Any], damping: float = 1e-8, decay: float = 0.95
) -> CurvatureOptimizer:
    """Return KFAC* whose factors have channels of their own for every differential operator."""
    return _kfac_star(params, kfac_unmerged, damping, decay)


def _kfac_star(
    params: Iterable[Any], curvature: Curvature, damping: float, decay: float
) -> CurvatureOptimizer:
    """Compose KFAC* with factors on other channels, for which every term is linearized again."""
    average = ExponentialAverage(decay, from_identity)
    return CurvatureOptimizer(params, curvature, FactorDamping(damping), average=average)
