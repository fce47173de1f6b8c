"""What is kept of each linear layer: inputs Z and output gradients G."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linearization.fisher import Fisher


@dataclass(frozen=True, eq=False)
class LayerLinearization:
    """What one linear layer contributes to the Jacobian of the scaled residual.

    J_n = Σ_s g_ns ⊗ [z_ns, 1 if s is a value channel else 0]

    The bias column of the mathematics is not stored: the value channels say where it is one.

    Args:
        weight: Name of the parameter ``[d_out, d_in]``.
        bias: Name of the parameter ``[d_out]``, or None.
        Z: Inputs of the layer, ``[S, N, d_in]``, the channels first.
        G: Gradients of the V residual components with respect to the layer's outputs,
            ``[V, S, N, d_out]``, or None for the forward-only choice.
        value_channels: Which of the S channels carry a value, on which the bias acts.
        d_out: Width of the layer's output.
    """

    weight: str
    bias: str | None
    Z: Float[Tensor, "S N d_in"]
    G: Float[Tensor, "V S N d_out"] | None
    value_channels: tuple[int, ...]
    d_out: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """The linearization at a part of the points.

    Args:
        residual: The scaled residual r̃ = sqrt(w_n / N) r_n, ``[n, V]``; the loss is ½‖r̃‖².
        unscaled: The residual r itself, ``[n, V]``.
        layers: The layers by the name of their weight.
    """

    residual: Float[Tensor, "n V"]
    unscaled: Float[Tensor, "n V"]
    layers: dict[str, LayerLinearization]

    def with_fisher(self, fisher: Fisher) -> Chunk:
        """Return the chunk with another choice of G, from the exact one."""
        layers = {
            name: layer
            if layer.G is None
            else replace(layer, G=fisher.output_gradients(layer.G, self.unscaled))
            for name, layer in self.layers.items()
        }
        return replace(self, layers=layers)


def join_points(parts: Sequence[dict[str, LayerLinearization]]) -> dict[str, LayerLinearization]:
    """Join the records of several sets of points into one per layer."""
    first, *others = parts
    if not others:
        return first
    return {
        name: replace(
            layer,
            Z=torch.cat([part[name].Z for part in parts], 1),
            G=None if layer.G is None else _cat_points([part[name].G for part in parts]),
        )
        for name, layer in first.items()
    }


def _cat_points(gradients: Sequence[Tensor | None]) -> Tensor:
    return torch.cat([gradient for gradient in gradients if gradient is not None], 2)
