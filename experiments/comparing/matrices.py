"""How similar an approximation is to the exact matrix: cosine, relative error, spectrum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from experiments.comparing.block_part import block_part
from experiments.comparing.exact import Exact
from pinncurv.comparison import (
    FrobeniusComparison,
    FrobeniusEstimate,
    estimate_frobenius,
    estimate_frobenius_by_layer_pair,
    frobenius,
    frobenius_by_layer,
    frobenius_by_layer_pair,
    spectral_density,
    spectrum,
)
from pinncurv.curvature import GaussNewtonLinearOperator
from pinncurv.linops import LayerwiseLinearOperator, PyTorchLinearOperator

# Probes per estimate of a spectrum, each of as many Lanczos steps as condition numbers take.
_SPECTRUM_PROBES = 2
# The kernel of so many residuals gives the exact spectrum of the exact matrix.
_KERNEL_LIMIT = 2048


@dataclass(frozen=True)
class Similarity:
    """Cosine and relative error, with standard errors that are 0 where they are exact."""

    cosine: float
    cosine_se: float
    error: float
    error_se: float

    @classmethod
    def exactly(cls, comparison: FrobeniusComparison) -> Similarity:
        """Return what an exact comparison says."""
        return cls(comparison.cosine.item(), 0.0, comparison.relative_error.item(), 0.0)

    @classmethod
    def estimated(cls, estimate: FrobeniusEstimate) -> Similarity:
        """Return what an estimate says."""
        cosine, error = estimate.cosine, estimate.relative_error
        parts = (cosine.value, cosine.standard_error, error.value, error.standard_error)
        return cls(*(part.item() for part in parts))


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues in descending order.

    Args:
        ranks: How many eigenvalues are at least as large, fractions for estimates.
        values: The eigenvalues.
    """

    ranks: Float[Tensor, " n"]
    values: Float[Tensor, " n"]


@dataclass(frozen=True)
class MatrixComparison:
    """What can be said about an approximation without a damping.

    Args:
        whole: The whole matrix against the whole exact matrix.
        blocks: The diagonal blocks against those of the exact matrix.
        layer_cosines: The cosine of each pair of layers.
        spectrum: The eigenvalues.
    """

    whole: Similarity
    blocks: Similarity
    layer_cosines: Float[Tensor, "L L"]
    spectrum: Spectrum


def compare_matrices(
    operator: PyTorchLinearOperator, exact: Exact, lanczos_steps: int
) -> MatrixComparison:
    """Compare an approximation with the exact matrix, exactly where that is feasible.

    Args:
        operator: The approximation.
        exact: The exact matrix.
        lanczos_steps: Lanczos steps for spectra that are estimated.
    """
    eigenvalues = _spectrum(operator, exact, lanczos_steps)
    if exact.is_dense:
        pairs = frobenius_by_layer_pair(operator, exact.operator, exact.layers)
        return MatrixComparison(
            Similarity.exactly(pairs.total()),
            Similarity.exactly(pairs.diagonal().total()),
            pairs.cosine,
            eigenvalues,
        )
    if isinstance(operator, GaussNewtonLinearOperator):
        same = Similarity(1.0, 0.0, 0.0, 0.0)
        return MatrixComparison(same, same, torch.ones_like(exact.mass), eigenvalues)
    options = exact.limits.probing
    whole = estimate_frobenius(operator, exact.operator, **options)
    pairs_estimate = estimate_frobenius_by_layer_pair(
        operator, exact.operator, exact.layers, **exact.limits.probing
    )
    return MatrixComparison(
        Similarity.estimated(whole),
        _compare_blocks(operator, exact),
        pairs_estimate.cosine.value,
        eigenvalues,
    )


def cosine(first: PyTorchLinearOperator, second: PyTorchLinearOperator, exact: Exact) -> float:
    """Return the cosine of any two approximations, an estimate where they are no blocks.

    ⟨P, Q⟩ / (‖P‖ ‖Q‖)

    Args:
        first: P.
        second: Q.
        exact: The exact matrix, with the limits of what is compared entry by entry.
    """
    P, Q = (
        exact.operator if isinstance(operator, GaussNewtonLinearOperator) else operator
        for operator in (first, second)
    )
    if exact.is_dense:
        return frobenius(P, Q).cosine.item()
    if exact.has_blocks and all(isinstance(M, LayerwiseLinearOperator) for M in (P, Q)):
        return frobenius_by_layer(P, Q).total().cosine.item()
    return estimate_frobenius(P, Q, **exact.limits.probing).cosine.value.item()


def _compare_blocks(operator: PyTorchLinearOperator, exact: Exact) -> Similarity:
    """Compare diagonal blocks, exactly if both operators have them."""
    part, reference = block_part(operator, exact.layers), exact.blocks
    if isinstance(part, LayerwiseLinearOperator) and isinstance(reference, LayerwiseLinearOperator):
        return Similarity.exactly(frobenius_by_layer(part, reference).total())
    return Similarity.estimated(estimate_frobenius(part, reference, **exact.limits.probing))


def _spectrum(operator: PyTorchLinearOperator, exact: Exact, lanczos_steps: int) -> Spectrum:
    """Return all eigenvalues; above the limit an estimate, but for the exact matrix's kernel."""
    if exact.is_dense:
        return _all(spectrum(operator))
    residuals = exact.free.jacobian.shape[0]
    if isinstance(operator, GaussNewtonLinearOperator) and residuals <= _KERNEL_LIMIT:
        return _all(spectrum(operator.kernel)[: exact.dimension])
    density = spectral_density(
        operator,
        steps=lanczos_steps,
        vectors=_SPECTRUM_PROBES,
        generator=Generator().manual_seed(0),
    )
    values, order = density.nodes.flatten().sort(descending=True)
    shares = density.weights.flatten()[order] / len(density.weights)
    ranks = density.dimension * shares.cumsum(0)
    # the rank at the middle of a node's share is that of the eigenvalue it stands for
    middles = ranks - density.dimension * shares / 2
    return Spectrum(middles.clamp(min=0.5), values)


def _all(values: Tensor) -> Spectrum:
    ranks = torch.arange(1, len(values) + 1, dtype=torch.float64)
    return Spectrum(ranks, values)
