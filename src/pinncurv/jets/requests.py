"""A request for derivatives: what a channel of a jet carries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

# Derivatives as multisets: (0, 0, 1) is ∂²/∂v_0² ∂/∂v_1.
Multiset = tuple[int, ...]
Coefficient = float | Tensor

HIGHEST_ORDER = 4


@dataclass(frozen=True, eq=False)
class Derivative:
    """A weighted sum of derivatives of one order K along directions.

    Σ_α c_α ∂_{v_α1} ⋯ ∂_{v_αK} u

    Args:
        directions: The directions v, each ``[d]`` or, per point, ``[N, d]``.
        terms: The coefficients c_α, numbers or one per point, ``[N]``. α counts the directions.

    Raises:
        ValueError: If there is no term, the terms differ in order, an order is above four, or an
            index has no direction.
    """

    directions: tuple[Float[Tensor, ...], ...] = ()
    terms: Mapping[Multiset, Coefficient] = field(default_factory=lambda: {(): 1.0})

    def __post_init__(self) -> None:
        """Sort the indices and add up what is the same derivative."""
        terms: dict[Multiset, Coefficient] = {}
        for indices, coefficient in self.terms.items():
            alpha = tuple(sorted(indices))
            terms[alpha] = terms[alpha] + coefficient if alpha in terms else coefficient
        orders = {len(alpha) for alpha in terms}
        if len(orders) != 1 or max(orders) > HIGHEST_ORDER:
            raise ValueError(
                f"The terms of a derivative must have one common order from 0 to {HIGHEST_ORDER}, "
                f"got the orders {sorted(orders)}. Request derivatives of several orders by "
                "several names."
            )
        if any(not 0 <= i < len(self.directions) for alpha in terms for i in alpha):
            raise ValueError(
                f"The terms of a derivative must count its {len(self.directions)} directions from "
                f"0, got {list(terms)}."
            )
        object.__setattr__(self, "terms", terms)

    @classmethod
    def value(cls) -> Derivative:
        """Return the derivative of order zero."""
        return cls()

    @classmethod
    def along(cls, *directions: Tensor) -> Derivative:
        """Return ∂_{v_1} ⋯ ∂_{v_K} for the given directions; repeat one for a higher order."""
        distinct: list[Tensor] = []
        indices = []
        for v in directions:
            known = [i for i, w in enumerate(distinct) if w is v]
            indices.append(known[0] if known else len(distinct))
            distinct += [] if known else [v]
        return cls(tuple(distinct), {tuple(indices): 1.0})

    @property
    def order(self) -> int:
        """K."""
        return len(next(iter(self.terms)))


def splits(alpha: Multiset) -> dict[tuple[Multiset, Multiset], int]:
    """Return how often Leibniz' rule for ∂^α(ab) has ∂^β a ∂^γ b, for β and γ of lower order."""
    counts: dict[tuple[Multiset, Multiset], int] = {}
    for mask in range(1, 2 ** len(alpha) - 1):
        beta = tuple(a for i, a in enumerate(alpha) if mask >> i & 1)
        gamma = tuple(a for i, a in enumerate(alpha) if not mask >> i & 1)
        counts[beta, gamma] = counts.get((beta, gamma), 0) + 1
    return counts


def position(known: list[Tensor], item: Tensor, same: Callable[[Tensor, Tensor], bool]) -> int:
    """Return where an item stands in a list, appending it if it is new."""
    for i, other in enumerate(known):
        if other is item or same(other, item):
            return i
    known.append(item)
    return len(known) - 1


def lower_derivatives(tops: Sequence[Multiset]) -> list[Multiset]:
    """Return all derivatives of orders from two on that Leibniz' rule for some others needs."""
    needed: set[Multiset] = set()
    for alpha in tops:
        needed.update(beta for beta, _ in splits(alpha) if len(beta) > 1)
    return sorted(needed, key=lambda alpha: (len(alpha), alpha))
