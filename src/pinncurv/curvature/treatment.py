"""A report on how every parameter is treated."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch.nn import Module

from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.linearization import Linearization, plain_network


@dataclass(frozen=True)
class ParameterCoverage:
    """How one parameter is treated.

    Args:
        name: The parameter.
        shape: Its shape.
        treatment: ``"weight"`` or ``"bias"`` of a linear layer, ``"dense"`` with an exact block,
            ``"unused"`` by every term, or ``"frozen"``.
        channels: For each term that uses it, the number S of channels it is shared over; 0 for
            a dense block, which has none.
    """

    name: str
    shape: tuple[int, ...]
    treatment: str
    channels: dict[str, int]

    def __str__(self) -> str:
        """Return one line of the report."""
        uses = ", ".join(f"{t} (S = {S})" if S else t for t, S in self.channels.items())
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
    space = ParameterSpace.of_bound(linearizations, check=False)
    for place in space.blocks:
        kinds = ("weight", "bias") if place.kronecker else ("dense",)
        for position, kind in zip(place.positions, kinds, strict=False):
            roles[space.names[position]] = kind
    for linearization in linearizations:
        chunk = next(iter(linearization))
        for place, block in zip(space.blocks, space.arrange(linearization, chunk), strict=True):
            if block is not None:
                S = block.as_layer().Z.shape[0] if place.kronecker else 0
                for position in place.positions:
                    uses = channels.setdefault(space.names[position], {})
                    uses[linearization.term.name] = S
    named = {**dict(plain_network(model).named_parameters()), **space.parameters}
    return Coverage(
        tuple(
            ParameterCoverage(
                name,
                tuple(parameter.shape),
                roles.get(name, "unused") if parameter.requires_grad else "frozen",
                channels.get(name, {}),
            )
            for name, parameter in named.items()
        )
    )
