"""KFAC: one Kronecker product per layer and term, with expand or reduce weight sharing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.block_rows import layers_of
from pinncurv.curvature.parameters import ParameterSpace
from pinncurv.curvature.products import value_channels
from pinncurv.linearization import Fisher, LayerLinearization, Linearization, Type2
from pinncurv.linops import KroneckerFactors, LayerBlock, SumKroneckerLinearOperator, merge


def gram(X: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Return XᵀX."""
    return X.t() @ X


class WeightSharing(ABC):
    """How the S channels of a layer enter the two Kronecker factors."""

    @abstractmethod
    def input_moment(self, layer: LayerLinearization) -> Float[Tensor, "d_joint d_joint"]:
        """Return N times the factor A of the layer's inputs."""

    @abstractmethod
    def gradient_moment(self, layer: LayerLinearization) -> Float[Tensor, "d_out d_out"]:
        """Return the factor B of the layer's output gradients."""


@dataclass(frozen=True)
class Expand(WeightSharing):
    """Treat the channels as if they were further points.

    A = 1/(N S) Σ_ns z_ns z_nsᵀ,  B = Σ_ns g_ns g_nsᵀ

    Source: Eschenhagen et al. 2023 (KFAC-expand); Dangel, Müller, Zeinhofer 2024, section 3.3.
    """

    def input_moment(self, layer: LayerLinearization) -> Float[Tensor, "d_joint d_joint"]:
        """Return 1/S Σ_ns z_ns z_nsᵀ."""
        S, N, d_in = layer.Z.shape
        rows = layer.Z.reshape(-1, d_in)
        if layer.bias is None:
            return gram(rows).div_(S)
        moment = rows.new_empty(d_in + 1, d_in + 1)
        moment[:-1, :-1] = gram(rows)
        moment[-1, :-1] = moment[:-1, -1] = value_channels(layer, layer.Z, 0).sum(0)
        moment[-1, -1] = len(layer.value_channels) * N
        return moment.div_(S)

    def gradient_moment(self, layer: LayerLinearization) -> Float[Tensor, "d_out d_out"]:
        """Return Σ_ns g_ns g_nsᵀ, summed over the residual components."""
        assert layer.G is not None
        return gram(layer.G.reshape(-1, layer.d_out))


@dataclass(frozen=True)
class Reduce(WeightSharing):
    """Average the inputs and sum the gradients over the channels first.

    A = 1/N Σ_n (mean_s z_ns)(mean_s z_ns)ᵀ,  B = Σ_n (Σ_s g_ns)(Σ_s g_ns)ᵀ

    Source: Eschenhagen et al. 2023 (KFAC-reduce); Dangel, Müller, Zeinhofer 2024, section 3.3.
    """

    def input_moment(self, layer: LayerLinearization) -> Float[Tensor, "d_joint d_joint"]:
        """Return Σ_n (mean_s z_ns)(mean_s z_ns)ᵀ."""
        mean = layer.Z.mean(0)
        if layer.bias is not None:
            share = len(layer.value_channels) / layer.Z.shape[0]
            mean = torch.cat([mean, mean.new_full((mean.shape[0], 1), share)], 1)
        return gram(mean)

    def gradient_moment(self, layer: LayerLinearization) -> Float[Tensor, "d_out d_out"]:
        """Return Σ_n (Σ_s g_ns)(Σ_s g_ns)ᵀ, summed over the residual components."""
        assert layer.G is not None
        return gram(layer.G.sum(1).flatten(0, 1))


expand = Expand()
reduce = Reduce()


class KFACLinearOperator(SumKroneckerLinearOperator):
    """KFAC of a loss with any number of terms.

    diag_l Σ_t B_lt ⊗ A_lt

    The channels are part of its definition: standard-basis directions, each once, and collapsed
    second derivatives.

    Cost: ``expand`` takes N S (d_in² + V d_out²) to build, ``reduce`` N (d_in² + V d_out²) and a
    sum over channels; d_in² + d_out² numbers per layer and term. A product takes d_in d_out (d_in +
    d_out) per layer and term. ``FactorDamping`` takes O(d_in³ + d_out³) per layer to build and as
    much as two terms per product.
    """

    @classmethod
    def from_linearizations(
        cls,
        linearizations: Sequence[Linearization],
        sharing: WeightSharing = expand,
        fisher: Fisher | None = None,
        merge_terms: bool = False,
    ) -> KFACLinearOperator:
        """Build the operator.

        Args:
            linearizations: One per term.
            sharing: How the channels enter the factors: ``expand`` or ``reduce``.
            fisher: Which output gradients to take; those of the linearizations by default.
            merge_terms: Whether one product per layer approximates the sum over the terms, see
                ``linops.merge``. It preserves the trace, and its damped inverse is cheap.

        Raises:
            ValueError: If the linearizations were made with another choice than ``fisher``.
        """
        space = ParameterSpace.from_linearizations(linearizations)
        by_term = [
            _term_factors(linearization, space, sharing, fisher) for linearization in linearizations
        ]
        factors = list(zip(*by_term, strict=True))
        names = [linearization.term.name for linearization in linearizations]
        if merge_terms:
            factors, names = [(merge(layer),) for layer in factors], ["+".join(names)]
        return cls(factors, space.blocks, space.shapes, names)


def _term_factors(
    linearization: Linearization,
    space: ParameterSpace,
    sharing: WeightSharing,
    fisher: Fisher | None,
) -> list[KroneckerFactors]:
    """Sum the factors of every layer over the chunks of one term."""
    sums: list[tuple[Tensor, Tensor] | None] = [None] * len(space.blocks)
    for i, layer in layers_of(linearization, space, fisher):
        A = sharing.input_moment(layer)
        B = A.new_zeros(()) if layer.G is None else sharing.gradient_moment(layer)
        known = sums[i]
        sums[i] = (A, B) if known is None else (known[0].add_(A), known[1].add_(B))
        del layer  # or it would live on while the next chunk is computed
    return [
        _factors(total, block, linearization, space)
        for total, block in zip(sums, space.blocks, strict=True)
    ]


def _factors(
    total: tuple[Tensor, Tensor] | None,
    block: LayerBlock,
    linearization: Linearization,
    space: ParameterSpace,
) -> KroneckerFactors:
    """Normalize the sums; zero factors where the term does not use the layer."""
    d_out, d_joint = block.shape
    options: dict[str, Any] = {"dtype": space.dtype, "device": space.device}
    if total is None:
        return KroneckerFactors(
            torch.zeros(d_joint, d_joint, **options), torch.zeros(d_out, d_out, **options)
        )
    A, B = total
    if B.ndim == 0:
        B = linearization.mean_weight * torch.eye(d_out, **options)
    return KroneckerFactors(A.div_(len(linearization.x)), B)


@dataclass(frozen=True)
class KFAC:
    """Recipe: KFAC of the linearized terms.

    diag_l Σ_t B_lt ⊗ A_lt

    Cost: see ``KFACLinearOperator``.

    Args:
        sharing: How the channels enter the factors: ``expand`` or ``reduce``.
        fisher: Which output gradients to take.
        merge_terms: Whether one product per layer approximates the sum over the terms:
            Σ_t B_t ⊗ A_t ≈ (Σ_t B_t) ⊗ (Σ_t tr(B_t) A_t / Σ_t tr(B_t)).
    """

    sharing: WeightSharing = expand
    fisher: Fisher = field(default_factory=Type2)
    merge_terms: bool = False

    def __call__(self, linearizations: Sequence[Linearization]) -> KFACLinearOperator:
        """Build the operator."""
        return KFACLinearOperator.from_linearizations(
            linearizations, self.sharing, self.fisher, self.merge_terms
        )
