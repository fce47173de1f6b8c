"""The exact block of one layer from Z and G, without its rows N x d_out x d_in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.products import output_gradients, with_bias_column
from pinncurv.linearization import Fisher, ForwardOnly, LayerLinearization, Linearization, Type2


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
    def from_layer(cls, layer: LayerLinearization, dtype: torch.dtype) -> BlockRows:
        """Take Z and G of a layer, in a data type.

        Raises:
            ValueError: If the linearization is the forward-only one, which has no Jacobian.
        """
        Z, G = layer.Z.transpose(0, 1).to(dtype), output_gradients(layer).to(dtype)
        return cls(with_bias_column(layer, Z, 1), G.permute(2, 0, 1, 3).contiguous())

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

    Args:
        what: What needs them, for the error message.
        linearizations: One per term.
        fisher: Which output gradients to take; those of the linearizations by default.

    Raises:
        ValueError: If there are none; names the term.
    """
    for linearization in linearizations:
        if ForwardOnly() in (linearization.fisher, fisher):
            raise ValueError(
                f"{what} must have output gradients, but term '{linearization.term.name}' has none "
                "with ForwardOnly(). Use fisher=Type2() or Empirical(), or KFAC, which needs none."
            )


def layers_of(
    linearization: Linearization, space: ParameterSpace, fisher: Fisher | None = None
) -> Iterator[tuple[int, LayerLinearization]]:
    """Yield the layers of every chunk with their position in the space.

    Args:
        linearization: One term.
        space: The parameters.
        fisher: Which output gradients to take; those of the linearization by default.

    Raises:
        ValueError: If the linearization was made with another choice than ``fisher``.
    """
    made = linearization.fisher
    if fisher is not None and made not in (Type2(), fisher):
        raise ValueError(
            f"Term '{linearization.term.name}' was linearized with {made}, which can't be turned "
            f"into {fisher}. Linearize with fisher=Type2(), the default."
        )
    for chunk in linearization:
        layers = (chunk if fisher in (None, made) else chunk.with_fisher(fisher)).layers
        for i, block in enumerate(space.blocks):
            if space.weight_name(block) in layers:
                yield i, layers[space.weight_name(block)]
        del chunk, layers  # or they would live on while the next chunk is computed
