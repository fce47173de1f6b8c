"""The same loss on other channels: what KFAC is when derivatives are propagated differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from torch import Tensor

from pinncurv.diffops import DifferentialOperator
from pinncurv.diffops.operator import Channels, Requirement
from pinncurv.jets import Contraction
from pinncurv.linearization import Linearization, linearize
from pinncurv.optim import Curvature

# Directions that differ by that part are not merged. Derivatives are scaled back.
_DIFFERENCE = 2.0**-20


@dataclass(frozen=True)
class _Wrapped(DifferentialOperator):
    """An operator that gets its derivatives from other channels.

    Args:
        operator: The operator.
    """

    operator: DifferentialOperator

    @property
    def per_point(self) -> bool:
        """Whether ``require`` depends on more than the points' number of coordinates."""
        return self.operator.per_point

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        """Return the operator at a part of the points."""
        return replace(self, operator=self.operator.at(part))


@dataclass(frozen=True)
class Uncollapsed(_Wrapped):
    """An operator with a channel for each of the second derivatives that it sums.

    Σ_rs Q_rs ∂_r ∂_s u,  from the channels  Q_rr ∂_r ∂_r u  and  2 Q_rs ∂_r ∂_s u, r < s
    """

    def require(self, x: Tensor) -> Requirement:
        """Need every part of the sum of second derivatives."""
        needed = self.operator.require(x)
        if not needed.contractions:
            return needed
        (contraction,) = needed.contractions
        return Requirement(needed.directions, tuple(_summands(contraction)))

    def read(self, channels: Channels) -> Tensor:
        """Add up the parts."""
        second = [sum(channels.second[1:], channels.second[0])] if channels.second else []
        return self.operator.read(replace(channels, second=second))


def _summands(contraction: Contraction) -> Iterator[Contraction]:
    """Split a sum of second derivatives."""
    Q, weights = contraction.matrix, contraction.weights
    for k, r in enumerate(contraction.indices):
        if Q is None:
            yield Contraction((r,), weights=None if weights is None else weights[k : k + 1])
            continue
        yield Contraction((r,), weights=Q[..., k, k].unsqueeze(0))
        for m, s in enumerate(contraction.indices[:k]):
            swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).to(Q)
            yield Contraction((s, r), matrix=Q[..., k, m, None, None] * swap)


@dataclass(frozen=True)
class Unmerged(_Wrapped):
    """An operator with directions of its own, which it shares with no other operator.

    Args:
        position: Its position among the operators of its term.
    """

    position: int

    @property
    def _length(self) -> float:
        return 1 + self.position * _DIFFERENCE

    def require(self, x: Tensor) -> Requirement:
        """Need the same directions with a slightly different length."""
        needed = self.operator.require(x)
        return replace(needed, directions=tuple(v * self._length for v in needed.directions))

    def read(self, channels: Channels) -> Tensor:
        """Read derivatives along the directions of the right length."""
        first = [derivative / self._length for derivative in channels.first]
        second = [derivative / self._length**2 for derivative in channels.second]
        return self.operator.read(replace(channels, first=first, second=second))


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
