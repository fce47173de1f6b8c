"""The linearization of a term at a part of the points."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from pinncurv.linearization.blocks import JacobianBlock
from pinncurv.linearization.fisher import Fisher


@dataclass(frozen=True, eq=False)
class Chunk:
    """The linearization at a part of the points.

    Args:
        residual: The scaled residual r̃ = sqrt(w_n / N) r_n, ``[n, V]``; the loss is ½‖r̃‖².
        unscaled: The residual r itself, ``[n, V]``.
        blocks: The blocks of the Jacobian by the name of their first parameter.
    """

    residual: Float[Tensor, "n V"]
    unscaled: Float[Tensor, "n V"]
    blocks: dict[str, JacobianBlock]

    @property
    def loss(self) -> Float[Tensor, ""]:
        """What the points contribute to the loss."""
        return 0.5 * self.residual.square().sum()

    @property
    def descent(self) -> Chunk:
        """The chunk that the gradient is Jᵀr̃ of."""
        return self

    def with_fisher(self, fisher: Fisher) -> Chunk:
        """Return the chunk with another choice of output gradients, from the exact one."""
        blocks = {
            name: block.with_fisher(fisher, self.unscaled) for name, block in self.blocks.items()
        }
        return replace(self, blocks=blocks)
