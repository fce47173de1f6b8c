"""Evaluation of several operators in one pass, with shared derivatives propagated once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.diffops.operator import DifferentialOperator
from pinncurv.jets import Jet, Layout, check_output, merge, seed

Operators = Mapping[str, DifferentialOperator]


@dataclass(frozen=True, eq=False)
class Plan:
    """Which channels to propagate for a set of operators, and where each finds its own.

    Args:
        layout: The merged channels at the points.
        readers: Per operator its name, itself, and the channel of each of its requests.
    """

    layout: Layout
    readers: tuple[tuple[str, DifferentialOperator, dict[str, int]], ...]

    @classmethod
    def of(cls, operators: Operators, x: Float[Tensor, "N d"]) -> Plan:
        """Merge what the operators need at points x."""
        with torch.enable_grad():  # or what is trained would not show under torch.no_grad
            requests = {name: operator.requests(x) for name, operator in operators.items()}
        layout, channels = merge((r for asked in requests.values() for r in asked.values()), x)
        positions = iter(channels)
        return cls(
            layout,
            tuple(
                (name, operators[name], {key: next(positions) for key in asked})
                for name, asked in requests.items()
            ),
        )

    @cached_property
    def without_derivatives(self) -> Layout:
        """The layout of jets that carry a value only."""
        return Layout(self.layout.directions[:0])

    def at(self, points: slice | Tensor) -> Plan:
        """Return the plan at some of the points."""
        return replace(self, layout=self.layout.at(points))

    def read(self, x: Any, output: Any, as_jets: bool = False) -> dict[str, Any]:
        """Return the value of every operator from the network's output, one jet or several.

        Trained coefficients depend on x. With ``as_jets`` the values are jets without derivatives,
        on which trained tensors can be recorded.
        """
        values = {}
        for name, operator, positions in self.readers:
            data = _output(name, operator, output).channels
            derivatives: dict[str, Any] = {
                key: Jet(data[c : c + 1], self.without_derivatives) if as_jets else data[c]
                for key, c in positions.items()
            }
            values[name] = operator.read(x, derivatives)
        return values


def _output(name: str, operator: DifferentialOperator, output: Any) -> Jet:
    """Return the output of the network that an operator acts on.

    Raises:
        TypeError: If it is no jet, or the operator does not say which of several.
        KeyError: If there is no such output.
    """
    several = isinstance(output, tuple | list | dict)
    if several and operator.of is None:
        keys = list(output) if isinstance(output, dict) else list(range(len(output)))
        raise TypeError(
            f"Operator '{name}' must say which of the network's outputs it acts on, one of {keys}. "
            f"Write {type(operator).__name__}(..., of={keys[0]!r})."
        )
    if operator.of is not None:
        try:
            output = output[operator.of] if several else None
        except (KeyError, IndexError, TypeError):
            output = None
        if output is None:
            raise KeyError(
                f"Operator '{name}' acts on the network's output {operator.of!r}, but the network "
                "has no such output. Return a dictionary or a tuple that has it."
            )
    if not isinstance(output, Jet):
        raise TypeError(
            "The network must return a function of its input, got "
            f"{type(output).__name__}, which carries no derivatives. Compute the output from the "
            "input with torch functions, without detaching to numbers or numpy."
        )
    return output


def evaluate(
    operators: Operators, model: Callable[[Any], Any], x: Float[Tensor, "N d"]
) -> dict[str, Tensor]:
    """Evaluate differential operators of a network in one forward pass.

    {name: (D_name u)(x)}

    Args:
        operators: The operators by name.
        model: The network u: an ``nn.Module`` or any function made of torch functions.
        x: Points, ``[N, d]``.

    Raises:
        KeyError: If an operator acts on an output that the network does not have.
        TypeError: If the network's output does not depend on its input.
        ValueError: If the network does on jets something else than on tensors.
    """
    plan = Plan.of(operators, x)
    output = model(seed(x, plan.layout))
    check_output(model, x, output)
    return plan.read(x, output)
