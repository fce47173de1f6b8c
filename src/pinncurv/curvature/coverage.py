"""A report on how every parameter is treated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Module

from pinncurv.linearization import Linearization


@dataclass(frozen=True)
class ParameterCoverage:
    """How one parameter is treated.

    Args:
        name: The parameter.
        shape: Its shape.
        treatment: ``"weight"`` or ``"bias"`` of a captured linear layer, ``"unused"`` by every
            term, or ``"frozen"``.
        channels: For each term that uses it, the number S of channels it is shared over.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    channels: dict[str, int]

    def __str__(self) -> str:
        """Return one line of the report."""
        uses = ", ".join(f"{term} (S = {S})" for term, S in self.channels.items())
        return f"{self.name} {list(self.shape)}: {self.treatment}" + (f" in {uses}" if uses else "")


@dataclass(frozen=True)
class Coverage:
    """How every parameter of a network is treated; print it for a table.

    Args:
        parameters: One entry per parameter, in the network's order.
    """

    parameters: tuple[ParameterCoverage, ...]

    def __str__(self) -> str:
        """Return one line per parameter."""
        return "\n".join(str(parameter) for parameter in self.parameters)


def coverage(model: Module, linearizations: Sequence[Linearization]) -> Coverage:
    """Say for every parameter of a network how the operators treat it.

    Args:
        model: The network.
        linearizations: One per term.
    """
    channels: dict[str, dict[str, int]] = {}
    roles: dict[str, str] = {}
    for linearization in linearizations:
        chunk = next(iter(linearization))
        for layer in chunk.layers.values():
            for name, role in ((layer.weight, "weight"), (layer.bias, "bias")):
                if name is not None:
                    roles[name] = role
                    channels.setdefault(name, {})[linearization.term.name] = layer.Z.shape[0]
    return Coverage(
        tuple(
            ParameterCoverage(
                name,
                tuple(parameter.shape),
                roles.get(name, "unused") if parameter.requires_grad else "frozen",
                channels.get(name, {}),
            )
            for name, parameter in model.named_parameters()
        )
    )
