"""The parameter space that linearizations share: names, shapes and layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pinncurv.linearization import Linearization
from pinncurv.linops import LayerBlock


@dataclass(frozen=True, eq=False)
class ParameterSpace:
    """The trainable parameters of a network, in its own order, and the layers they belong to.

    Args:
        parameters: The parameters by name, in the order of ``named_parameters``.
        blocks: One block per layer, weight and bias together.
    """

    parameters: dict[str, Tensor]
    blocks: tuple[LayerBlock, ...]

    @classmethod
    def from_linearizations(cls, linearizations: Sequence[Linearization]) -> ParameterSpace:
        """Collect the layers of all terms.

        Raises:
            ValueError: If there is no linearization, the terms differ in their network, or a
                parameter is used by no term (names it).
        """
        if not linearizations:
            raise ValueError("There must be at least one linearization, got none.")
        parameters = linearizations[0].parameters
        for other in linearizations[1:]:
            if [id(p) for p in other.parameters.values()] != [id(p) for p in parameters.values()]:
                raise ValueError(
                    "All terms must be linearized in the same parameters, but term "
                    f"'{other.term.name}' has others than '{linearizations[0].term.name}'. Pass "
                    "one model that contains all networks."
                )
        biases: dict[str, str | None] = {}
        for linearization in linearizations:
            biases.update(linearization.layer_parameters)
        positions = {name: i for i, name in enumerate(parameters)}
        used = {*biases, *biases.values()}
        unused = [name for name in parameters if name not in used]
        if unused:
            raise ValueError(
                f"Every trainable parameter must be used by a term, but {', '.join(unused)} is "
                "used by none. Freeze it with requires_grad_(False)."
            )
        ordered = [name for name in parameters if name in biases]
        blocks = tuple(
            LayerBlock(
                weight.rpartition(".")[0] or weight,
                positions[weight],
                None if (bias := biases[weight]) is None else positions[bias],
                *parameters[weight].shape,
            )
            for weight in ordered
        )
        return cls(parameters, blocks)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(self.parameters)

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the parameters."""
        return [parameter.shape for parameter in self.parameters.values()]

    @property
    def dimension(self) -> int:
        """D, the number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return next(iter(self.parameters.values())).dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(iter(self.parameters.values())).device

    def weight_name(self, block: LayerBlock) -> str:
        """Return the name of a block's weight, by which linearizations call the layer."""
        return self.names[block.weight]
