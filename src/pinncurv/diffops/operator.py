"""What a differential operator declares: the derivatives it needs and how to combine them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pinncurv.jets import Contraction


@dataclass(frozen=True, eq=False)
class Requirement:
    """The derivatives that an operator needs at given points.

    Args:
        directions: Directions of first derivatives, each ``[d]`` or, per point, ``[N, d]``.
        contractions: Sums of second derivatives; their indices count the directions above.
    """

    directions: tuple[Tensor, ...] = ()
    contractions: tuple[Contraction, ...] = ()


@dataclass(frozen=True, eq=False)
class Channels:
    """The derivatives that an operator asked for, in the order it asked.

    Args:
        value: The network's value, ``[N, ...]``.
        first: The first derivative along each direction, each ``[N, ...]``.
        second: The collapsed sums of second derivatives, each ``[N, ...]``.
    """

    value: Tensor
    first: Sequence[Tensor]
    second: Sequence[Tensor]


class DifferentialOperator(ABC):
    """A linear differential operator, as a declaration.

    (D u)(x) = read(u(x), ∂_{v_1} u(x), ..., Σ_rs Q_rs ∂_{v_r} ∂_{v_s} u(x), ...)

    A subclass says in ``require`` which derivatives it needs and in ``read`` how they combine.
    Directions that several operators share are propagated once.
    """

    @property
    def per_point(self) -> bool:
        """Whether ``require`` depends on more than the points' number of coordinates."""
        return False

    def at(self, part: slice | Tensor) -> DifferentialOperator:
        """Return the operator at a part of the points: cut the coefficients given per point."""
        return self

    @abstractmethod
    def require(self, x: Tensor) -> Requirement:
        """Return the derivatives needed at points x, ``[N, d]``."""

    @abstractmethod
    def read(self, channels: Channels) -> Tensor:
        """Return the operator's value at the points from the derivatives it asked for."""
