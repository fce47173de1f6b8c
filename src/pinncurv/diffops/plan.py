"""Evaluation of several operators in one pass, with shared directions propagated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.diffops.operator import Channels, DifferentialOperator, Requirement
from pinncurv.jets import Contraction, Jet, Layout, seed

Operators = Mapping[str, DifferentialOperator]
Items = tuple[tuple[str, DifferentialOperator], ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which channels to propagate for a set of operators, and where each finds its own.

    Args:
        layout: The merged channels.
        readers: Per operator its name, itself, and the positions of its directions and sums.
    """

    layout: Layout
    readers: tuple[tuple[str, DifferentialOperator, list[int], list[int]], ...]

    def read(self, output: Jet) -> dict[str, Tensor]:
        """Return the value of every operator from the network's output jet."""
        channels = output.data.unbind(0)
        R = self.layout.R
        return {
            name: operator.read(
                Channels(
                    channels[0],
                    [channels[1 + r] for r in directions],
                    [channels[1 + R + c] for c in sums],
                )
            )
            for name, operator, directions, sums in self.readers
        }


class _Merger:
    """Collects directions and contractions, each different one once."""

    def __init__(self) -> None:
        self.directions: list[Tensor] = []
        self.contractions: list[Contraction] = []

    def add(self, requirement: Requirement) -> tuple[list[int], list[int]]:
        """Add what one operator needs; return where its directions and sums are."""
        where = [self._direction(direction) for direction in requirement.directions]
        sums = []
        for contraction in requirement.contractions:
            indices = tuple(where[i] for i in contraction.indices)
            sums.append(self._contraction(replace(contraction, indices=indices)))
        return where, sums

    def _direction(self, direction: Tensor) -> int:
        return _position(self.directions, direction, torch.equal)

    def _contraction(self, contraction: Contraction) -> int:
        return _position(self.contractions, contraction, _same_contraction)

    def layout(self, x: Tensor) -> Layout:
        """Return the merged layout."""
        if not self.directions:
            return Layout(x.new_zeros(0, x.shape[-1]), tuple(self.contractions))
        if any(direction.ndim == 2 for direction in self.directions):
            stacked = torch.stack([direction.expand_as(x) for direction in self.directions])
        else:
            stacked = torch.stack(self.directions)
        return Layout(stacked, tuple(self.contractions))


def _position(known: list[Any], item: Any, same: Callable[[Any, Any], bool]) -> int:
    """Return where an item stands in a list, appending it if it is new."""
    for i, other in enumerate(known):
        if same(other, item):
            return i
    known.append(item)
    return len(known) - 1


def _same_contraction(first: Contraction, second: Contraction) -> bool:
    """Whether two contractions sum the same derivatives."""

    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return a is b or (a is not None and b is not None and torch.equal(a, b))

    return (
        first.indices == second.indices
        and same(first.weights, second.weights)
        and same(first.matrix, second.matrix)
    )


def make_plan(operators: Operators, x: Float[Tensor, "N d"]) -> Plan:
    """Merge what the operators need at points x into one layout.

    Without coefficients that differ from point to point the plan is made once and kept, if the
    operators can be hashed.
    """
    items = tuple(operators.items())
    if any(operator.per_point or operator.__hash__ is None for _, operator in items):
        return _merge(items, x)
    return _constant_plan(items, x.shape[-1], x.dtype, x.device)


@lru_cache(maxsize=128)
def _constant_plan(items: Items, d: int, dtype: torch.dtype, device: torch.device) -> Plan:
    """Make the plan of operators with constant coefficients."""
    # a plan made in inference mode must serve later passes that autograd follows, too
    with torch.inference_mode(False):
        return _merge(items, torch.zeros(1, d, dtype=dtype, device=device))


def _merge(items: Items, x: Tensor) -> Plan:
    """Merge what each operator needs."""
    merger = _Merger()
    readers = tuple((name, operator, *merger.add(operator.require(x))) for name, operator in items)
    return Plan(merger.layout(x), readers)


def evaluate(
    operators: Operators, model: Callable[[Any], Any], x: Float[Tensor, "N d"]
) -> dict[str, Tensor]:
    """Evaluate differential operators of a network in one forward pass.

    {name: (D_name u)(x)}

    Args:
        operators: The operators by name.
        model: The network u: an ``nn.Module`` or any function made of torch functions.
        x: Points, ``[N, d]``.

    Returns:
        The values by name; shapes as each operator says.

    Raises:
        TypeError: If the network's output does not depend on its input.
    """
    plan = make_plan(operators, x)
    output = model(seed(x, plan.layout))
    if not isinstance(output, Jet):
        raise TypeError(
            "The network must return a function of its input, got "
            f"{type(output).__name__}, which carries no derivatives. Compute the output from the "
            "input with torch functions, without detaching to numbers or numpy."
        )
    return plan.read(output)
