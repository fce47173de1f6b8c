"""Second moments of the rows of one layer's Jacobian, also in a Kronecker-factored basis."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.products import output_gradients, with_bias_column
from pinncurv.linearization import LayerLinearization
from pinncurv.linops import KroneckerBasis

# Rows of the Jacobian are squared while this many of their entries are in the cache.
_ROW_ELEMENTS = 1 << 18
# Writing, squaring and summing an entry took as long as this many operations in a matrix product
# (900 points, 1 to 6 channels, layers of width 48 to 256, one CPU core).
_ENTRY_COST = 20


def second_moments(
    layer: LayerLinearization, basis: KroneckerBasis
) -> Float[Tensor, "d_out d_joint"]:
    """Return Σ_nv (U_Bᵀ J_nv U_A)² by entries, by whichever way takes fewer operations.

    Entries of rows cost V (2 S + c) operations per point and entry of S, c for handling them once;
    pairs of channels cost S (S + 1), and c for each of their d_out + d_joint products.
    """
    G, Z = output_gradients(layer) @ basis.B, layer.Z @ basis.A[: layer.Z.shape[-1]]
    if layer.bias is not None:
        for s in layer.value_channels:
            Z[s] += basis.A[-1]
    V, S, _, d_out = G.shape
    d_joint = Z.shape[-1]
    by_points = V * (2 * S + _ENTRY_COST) * d_out * d_joint
    by_pairs = S * (S + 1) * (d_out * d_joint + _ENTRY_COST * (V * d_out + d_joint) // 2)
    return _moments_by_pairs(G, Z) if by_pairs < by_points else _moments_by_points(G, Z)


def squared_rows(layer: LayerLinearization) -> Float[Tensor, "d_out d_joint"]:
    """Return Σ_nv J_nv² by entries, the diagonal of the layer's block."""
    return _moments_by_points(output_gradients(layer), with_bias_column(layer, layer.Z, 0))


def _moments_by_points(
    G: Float[Tensor, "V S N d_out"], Z: Float[Tensor, "S N d_joint"]
) -> Float[Tensor, "d_out d_joint"]:
    """Form the rows of a few points at a time, and sum their squares."""
    total = G.new_zeros(G.shape[-1], Z.shape[-1])
    step = max(1, _ROW_ELEMENTS // total.numel())
    inputs = Z.transpose(0, 1).split(step)
    for component in G:
        gradients = component.permute(1, 2, 0).split(step)
        for left, right in zip(gradients, inputs, strict=True):
            total += left.matmul(right).square_().sum(0)
    return total


def _moments_by_pairs(
    G: Float[Tensor, "V S N d_out"], Z: Float[Tensor, "S N d_joint"]
) -> Float[Tensor, "d_out d_joint"]:
    """Expand the squares: Σ_{s ≤ q} (2 − δ_sq) Σ_n (Σ_v g_vs ∘ g_vq) (z_s ∘ z_q)ᵀ.

    Up to rounding errors relative to the largest product of channels, below which S is cut at 0.
    """
    total = G.new_zeros(G.shape[-1], Z.shape[-1])
    for s in range(len(Z)):
        left = (G[:, s:] * G[:, s : s + 1]).sum(0)
        left[1:] *= 2
        right = Z[s:] * Z[s]
        total.addmm_(left.flatten(0, 1).mT, right.flatten(0, 1))
    return total.clamp_(min=0)
