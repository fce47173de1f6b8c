"""The linearization of a term at a part of the points."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Float
from torch import Tensor

from pinncurv.linearization.blocks import JacobianBlock
from pinncurv.linearization.fisher import Fisher, Type2


@dataclass(frozen=True, eq=False)
class Chunk:
    """The linearization at a part of the points.

    Of an energy they are J_n = sqrt(w_n / N) Lᵀ ∂y/∂θ with L Lᵀ = ∂²ℓ, for the values y of the
    operators, and the gradient is that of another chunk, with one row per point. The residual is
    then sqrt(w_n / N) Lᵀy, of no meaning but its shape and derivative.

    Args:
        residual: The scaled residual r̃ = sqrt(w_n / N) r_n, ``[n, V]``; the loss is ½‖r̃‖².
        unscaled: The residual r itself, ``[n, V]``.
        blocks: The blocks of the Jacobian by the name of their first parameter.
        slope: Of an energy, the chunk that the gradient is Jᵀr̃ of, J_n = sqrt(w_n / N) ∂ℓ/∂θ.
        energy: Of an energy, what these points contribute to the loss.
        gradient: Jᵀr̃ by the names of the parameters, if the pass has computed it along.
    """

    residual: Float[Tensor, "n V"]
    unscaled: Float[Tensor, "n V"]
    blocks: dict[str, JacobianBlock]
    slope: Chunk | None = None
    energy: Float[Tensor, ""] | None = None
    gradient: dict[str, Tensor] | None = None

    def with_gradient(self) -> Chunk:
        """Return the chunk with Jᵀr̃, the gradient of what these points contribute to the loss."""
        u = self.residual.t()[..., None]
        gradient = {
            name: part[0]
            for block in self.blocks.values()
            for name, part in zip(block.names, block.adjoint_product(u), strict=True)
        }
        return replace(self, gradient=gradient)

    def with_fisher(self, fisher: Fisher) -> Chunk:
        """Return the chunk with another choice of output gradients, from the exact one."""
        of = self if self.slope is None or isinstance(fisher, Type2) else self.slope
        blocks = {name: block.with_fisher(fisher, of.unscaled) for name, block in of.blocks.items()}
        return replace(self, blocks=blocks)
