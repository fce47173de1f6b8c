"""The exact block of one layer from Z and G, without its rows N x d_out x d_in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linearization import Fisher, ForwardOnly, JacobianBlock, Linearization


@dataclass(frozen=True, eq=False)
class BlockRows:
    """The rows of one layer's Jacobian at some points, as products of its gradients and inputs.

    J_nv = G_nvᵀ Z_n ∈ ℝ^(d_out × d_joint)

    Sums over rows are taken by way of S × S matrices of each point; no row is formed.

    Args:
        Z: The inputs with their bias column, ``[n, S, d_joint]``.
        G: The output gradients, ``[n, V, S, d_out]``.
    """

    Z: Float[Tensor, "n S d_joint"]
    G: Float[Tensor, "n V S d_out"]

    @classmethod
    def of(cls, block: JacobianBlock, dtype: torch.dtype) -> BlockRows:
        """Take Z and G of a block, in a data type.

        Raises:
            ValueError: If the linearization is the forward-only one, which has no Jacobian.
        """
        layer = block.as_layer()
        Z, G = layer.Z.transpose(0, 1).to(dtype), layer.gradients.to(dtype)
        return cls(layer.with_bias_column(Z, 1), G.permute(2, 0, 1, 3).contiguous())

    def contract_inputs(
        self, A: Float[Tensor, "d_joint d_joint"] | None = None
    ) -> Float[Tensor, "d_out d_out"]:
        """Return Σ_nv J_nv A J_nvᵀ = Σ_nv G_nvᵀ (Z_n A Z_nᵀ) G_nv, with A = I by default."""
        M = (self.Z if A is None else self.Z @ A) @ self.Z.mT
        return self.G.flatten(0, 2).mT @ (M.unsqueeze(1) @ self.G).flatten(0, 2)

    def contract_outputs(
        self, B: Float[Tensor, "d_out d_out"] | None = None
    ) -> Float[Tensor, "d_joint d_joint"]:
        """Return Σ_nv J_nvᵀ B J_nv = Σ_n Z_nᵀ (Σ_v G_nv B G_nvᵀ) Z_n, with B = I by default."""
        M = ((self.G if B is None else self.G @ B) @ self.G.mT).sum(1)
        return self.Z.flatten(0, 1).mT @ (M @ self.Z).flatten(0, 1)


def check_gradients(
    what: str, linearizations: Sequence[Linearization], fisher: Fisher | None
) -> None:
    """Check that there are output gradients, of which the rows of the Jacobian are made.

    Raises:
        ValueError: If there are none; names the term, and what needs them.
    """
    for linearization in linearizations:
        if ForwardOnly() in (linearization.fisher, fisher):
            raise ValueError(
                f"{what} must have output gradients, but term '{linearization.term.name}' has none "
                "with ForwardOnly(). Use fisher=Type2() or Empirical(), or KFAC, which needs none."
            )
