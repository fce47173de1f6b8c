"""How many points fit into the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pinncurv.linearization.bound import BoundTerm
from pinncurv.machine import free_memory

# Which part of the free memory Z and G may take, next to factors, kernels and temporaries.
_SHARE = 0.25


def numbers_per_point(bound: BoundTerm) -> int:
    """Return how many numbers of each point a linearization keeps.

    S Σ_l (d_in + V d_out),  and V for each entry of a parameter outside of linear layers
    """
    structure, S = bound.structure, bound.whole.plan.layout.S
    V = structure.components
    total = V + sum(V * bound.parameters[name].numel() for name in structure.dense)
    for layer in structure.layers:
        d_out, d_in = bound.parameters[layer.weight].shape[:: -1 if layer.transposed else 1]
        total += len(layer.calls) * S * (d_in + V * d_out)
    return total


def fitting_chunk_size(terms: Sequence[BoundTerm]) -> int | None:
    """Return how many points to process at a time; None if all are kept in the free memory.

    Args:
        terms: The terms, bound to all of their points.
    """
    of_points = [bound for bound in terms if not bound.structure.entrywise]
    if not of_points:
        return None
    x = of_points[0].x
    free = free_memory(x.device)
    if free is None:
        return None
    budget = _SHARE * free / x.element_size()
    numbers = [numbers_per_point(bound) for bound in of_points]
    if sum(n * len(b.x) for n, b in zip(numbers, of_points, strict=True)) <= budget:
        return None
    return max(1, math.floor(budget / max(numbers)))
