"""The choices of the output gradients G."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


class Fisher(ABC):
    """Which output gradients G stand in for the curvature of the squared loss."""

    @abstractmethod
    def output_gradients(
        self, G: Float[Tensor, "V S N d_out"], residual: Float[Tensor, "N V"]
    ) -> Float[Tensor, "W S N d_out"] | None:
        """Return the chosen gradients.

        Args:
            G: The gradients of the exact Gauss-Newton, one per residual component.
            residual: The residual r itself, without weights and 1/N.
        """


@dataclass(frozen=True)
class Type2(Fisher):
    """The exact Gauss-Newton: one gradient per residual component.

    g_nv = ∂(sqrt(w_n / N) r_nv) / ∂y_n
    """

    def output_gradients(self, G: Tensor, residual: Tensor) -> Tensor:
        """Return the gradients as they are."""
        return G


@dataclass(frozen=True)
class Empirical(Fisher):
    """The empirical choice: the gradient of each point's loss, scaled by the residual.

    g_n = Σ_v r_nv ∂(sqrt(w_n / N) r_nv) / ∂y_n
    """

    def output_gradients(self, G: Tensor, residual: Tensor) -> Tensor:
        """Sum the components, weighted by the residual."""
        return torch.einsum("vsno,nv->sno", G, residual)[None]


@dataclass(frozen=True)
class ForwardOnly(Fisher):
    """No gradients at all: KFAC then takes B = w I, with w the mean weight of the term."""

    def output_gradients(self, G: Tensor, residual: Tensor) -> None:
        """Return nothing."""
        return
