"""Similarity in the Frobenius inner product from random probes, matrix-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pinncurv.comparison.checks import check_count, check_same_space
from pinncurv.comparison.estimates import Estimate, rademacher, standard_error
from pinncurv.comparison.frobenius import (
    FrobeniusComparison,
    entrywise_products,
    layer_positions,
    layers_of,
)
from pinncurv.comparison.products import apply
from pinncurv.linops import Block, PyTorchLinearOperator


@dataclass(frozen=True)
class FrobeniusEstimate:
    """Estimated inner products of two operators, and the similarities that follow.

    ⟨A, B⟩ = E (A z)ᵀ(B z)

    The first four are unbiased. Cosine and relative error are ratios of estimates, with a bias of
    order 1/m for m probes and standard errors by linearization (the delta method).

    Attributes:
        inner: ⟨A, B⟩, of shape ``[]`` or ``[L, L]`` over pairs of layers.
        squared_norm: ‖A‖².
        squared_reference_norm: ‖B‖².
        squared_error: ‖A − B‖².
        cosine: ⟨A, B⟩ / (‖A‖ ‖B‖).
        relative_error: ‖A − B‖ / ‖B‖.
    """

    inner: Estimate
    squared_norm: Estimate
    squared_reference_norm: Estimate
    squared_error: Estimate
    cosine: Estimate
    relative_error: Estimate

    @classmethod
    def from_samples(cls, samples: Float[Tensor, "4 m *layers"]) -> FrobeniusEstimate:
        """Return the estimates from m >= 2 samples of the four inner products."""
        comparison = FrobeniusComparison(*samples.mean(1))
        AB, AA, BB, EE = _relative(samples)
        cosine = comparison.cosine * (AB - AA / 2 - BB / 2)
        error = comparison.relative_error * (EE / 2 - BB / 2)
        inner, norm, reference, squared_error = map(Estimate.from_samples, samples)
        ratios = (
            Estimate(comparison.cosine, standard_error(cosine)),
            Estimate(comparison.relative_error, standard_error(error)),
        )
        return cls(inner, norm, reference, squared_error, *ratios)


def _relative(samples: Tensor) -> Tensor:
    """Samples over their mean; zero where the mean is, for which the ratios are exact."""
    mean = samples.mean(1, keepdim=True)
    return torch.where(mean == 0, 0.0, samples / mean)


def estimate_frobenius(
    A: PyTorchLinearOperator,
    B: PyTorchLinearOperator,
    *,
    vectors: int,
    generator: Generator,
    sketch: int = 0,
) -> FrobeniusEstimate:
    """Compare two operators by products with random signs.

    ⟨A, B⟩ = Σ_j (A q_j)ᵀ(B q_j) + E (A P z)ᵀ(B P z),  P = I − Q Qᵀ

    Without a sketch, Q = 0, the relative standard error is up to √(2/m), and close to that where
    few eigenvalues dominate, as they do in PINNs. A sketch takes the range Q of A and B on
    ``sketch`` random vectors out of the randomness and treats it exactly, as in Hutch++. Each probe
    is one product with A and one with B, each vector in the sketch is three and three.

    Source: Meyer, Musco, Musco, Woodruff 2021 (Hutch++).
    """
    D = check_same_space(A, B)
    samples = _samples(A, B, [torch.arange(D, device=A.device)], vectors, sketch, generator)
    return FrobeniusEstimate.from_samples(samples[..., 0, 0])


def estimate_frobenius_by_layer_pair(
    A: PyTorchLinearOperator,
    B: PyTorchLinearOperator,
    blocks: Sequence[Block] | None = None,
    *,
    vectors: int,
    generator: Generator,
    sketch: int = 0,
) -> FrobeniusEstimate:
    """Compare all blocks of two operators by products with random signs in one layer at a time.

    ⟨A_kl, B_kl⟩ = E (A z_l)_kᵀ(B z_l)_k

    ``vectors`` and ``sketch`` are counted per layer.
    """
    check_same_space(A, B)
    positions = layer_positions(A, layers_of(A, B, blocks=blocks))
    return FrobeniusEstimate.from_samples(_samples(A, B, positions, vectors, sketch, generator))


def _samples(
    A: PyTorchLinearOperator,
    B: PyTorchLinearOperator,
    positions: Sequence[Tensor],
    vectors: int,
    sketch: int,
    generator: Generator,
) -> Float[Tensor, "4 m L L"]:
    """Samples of the inner products of all blocks."""
    check_count("vectors", vectors, 2)
    check_count("sketch", sketch, 0)
    by_column = []
    for position in positions:

        def images(Z: Tensor, position: Tensor = position) -> tuple[Tensor, Tensor]:
            X = torch.zeros(A.shape[1], Z.shape[1], dtype=Z.dtype, device=Z.device)
            X[position] = Z
            Y = apply(A, X)
            return Y, Y if B is A else apply(B, X)

        Z = rademacher(len(position), vectors, generator, A.device)
        exact: Tensor | float = 0.0
        if sketch:
            S = rademacher(len(position), sketch, generator, A.device)
            Q = torch.linalg.qr(torch.cat([Y[position] for Y in images(S)], 1)).Q
            Z = Z - Q @ (Q.mT @ Z)
            exact = _block_sums(*images(Q), positions).sum(1, keepdim=True)
        by_column.append(_block_sums(*images(Z), positions) + exact)
    return torch.stack(by_column, -1)


def _block_sums(X: Tensor, Y: Tensor, positions: Sequence[Tensor]) -> Float[Tensor, "4 m L"]:
    """Inner products of the rows of each layer, per column of X and Y."""
    products = entrywise_products(X, Y)
    return torch.stack([products[:, rows].sum(1) for rows in positions], -1)
