"""Products with the Jacobian of one layer, from its inputs Z and output gradients G alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linearization import LayerLinearization

# Temporaries of about this many elements stay in the cache and are recycled by the allocator.
_BLOCK_ELEMENTS = 1 << 19


def output_gradients(layer: LayerLinearization) -> Float[Tensor, "V S N d_out"]:
    """Return G.

    Raises:
        ValueError: If the linearization is the forward-only one, which has no Jacobian.
    """
    if layer.G is None:
        raise ValueError(
            f"The Jacobian of layer {layer.weight} needs output gradients, but the linearization "
            "is forward-only. Linearize with fisher=Type2()."
        )
    return layer.G


def _channel_blocks(S: int, elements: int) -> Iterator[slice]:
    """Cut S channels such that a temporary with so many elements per channel stays small."""
    step = max(1, _BLOCK_ELEMENTS // max(1, elements))
    for start in range(0, S, step):
        yield slice(start, start + step)


def value_channels(layer: LayerLinearization, channels: Tensor, dim: int) -> Tensor:
    """Sum over the channels that carry a value, on which the bias acts."""
    if layer.value_channels == (0,):
        return channels.select(dim, 0)
    index = torch.tensor(layer.value_channels, device=channels.device)
    return channels.index_select(dim, index).sum(dim)


def with_bias_column(layer: LayerLinearization, Z: Tensor, dim: int) -> Tensor:
    """Append to inputs, ``[*, *, d_in]``, a 1 in the channels that carry a value.

    Args:
        layer: The layer; without bias, nothing is appended.
        Z: Its inputs, points and channels in either order.
        dim: Which axis the channels are, 0 or 1.
    """
    if layer.bias is None:
        return Z
    column = Z.new_zeros(*Z.shape[:2], 1)
    column.movedim(dim, 0)[list(layer.value_channels)] = 1
    return torch.cat([Z, column], -1)


def jacobian_product(
    layer: LayerLinearization,
    weight: Float[Tensor, "K d_out d_in"],
    bias: Float[Tensor, "K d_out"] | None,
) -> Float[Tensor, "V N K"]:
    """Multiply the layer's Jacobian onto K directions.

    (J v)_n = Σ_s g_nsᵀ (W z_ns + b [s is a value channel]) = Σ_s (Wᵀ g_ns)ᵀ z_ns + ...

    The narrower side of the layer is where the matrix product ends and the sum is taken.
    """
    G, Z = output_gradients(layer), layer.Z
    d_out, d_in = weight.shape[1:]
    if d_out <= d_in:
        stacked = weight.reshape(-1, d_in).t()
        products = [_transported_inner_product(Z, component, stacked) for component in G]
    else:
        stacked = weight.transpose(0, 1).reshape(d_out, -1)
        products = [_transported_inner_product(component, Z, stacked) for component in G]
    product = torch.stack(products) if len(products) > 1 else products[0][None]
    if bias is not None:
        product += value_channels(layer, G, 1) @ bias.t()
    return product


def _transported_inner_product(
    left: Float[Tensor, "S N a"], right: Float[Tensor, "S N b"], stacked: Float[Tensor, "a Kb"]
) -> Float[Tensor, "N K"]:
    """Return Σ_s (M_k left_ns) · right_ns for K matrices M_k, given as [M_1ᵀ, ..., M_Kᵀ]."""
    S, N, b = right.shape
    total = None
    for block in _channel_blocks(S, N * stacked.shape[1]):
        images = left[block].reshape(-1, left.shape[-1]) @ stacked
        images = images.view(-1, N, stacked.shape[1] // b, b)
        part = images.mul_(right[block].unsqueeze(2)).sum(-1).sum(0)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def jacobian_adjoint_product(
    layer: LayerLinearization, vectors: Float[Tensor, "V N K"]
) -> tuple[Float[Tensor, "K d_out d_in"], Float[Tensor, "K d_out"] | None]:
    """Multiply the transpose of the layer's Jacobian onto K vectors.

    Jᵀu = Σ_nv u_nv Σ_s g_nvs z_nsᵀ, for the bias the sum over the value channels
    """
    G, Z = output_gradients(layer), layer.Z
    columns = vectors.unbind(-1)
    weights = [_scaled_outer_sum(G, Z, column) for column in columns]
    weight = torch.stack(weights) if len(weights) > 1 else weights[0][None]
    if layer.bias is None:
        return weight, None
    summed = value_channels(layer, G, 1).flatten(0, 1)
    return weight, vectors.flatten(0, 1).t() @ summed


def _scaled_outer_sum(
    G: Float[Tensor, "V S N d_out"], Z: Float[Tensor, "S N d_in"], u: Float[Tensor, "V N"]
) -> Float[Tensor, "d_out d_in"]:
    """Return Σ_nsv u_vn g_vns z_nsᵀ; the narrower of the two is scaled and comes first."""
    d_in, d_out = Z.shape[-1], G.shape[-1]
    total = None
    for component, scale in zip(G, u.unsqueeze(-1), strict=True):
        narrow, wide = (component, Z) if d_out <= d_in else (Z, component)
        S, N, width = narrow.shape
        for block in _channel_blocks(S, N * width):
            left = (narrow[block] * scale).reshape(-1, width).t()
            right = wide[block].reshape(-1, wide.shape[-1])
            total = left @ right if total is None else total.addmm_(left, right)
    assert total is not None
    return total if d_out <= d_in else total.t()


def jacobian_rows(
    layer: LayerLinearization, points: slice
) -> tuple[Float[Tensor, "V n d_out d_in"], Float[Tensor, "V n d_out"] | None]:
    """Return the rows of the layer's Jacobian that belong to some points.

    J_n = Σ_s g_ns ⊗ z_ns
    """
    G, Z = output_gradients(layer)[:, :, points], layer.Z[:, points]
    inputs = Z.permute(1, 0, 2)
    weight = torch.stack([component.permute(1, 2, 0).matmul(inputs) for component in G])
    return weight, None if layer.bias is None else value_channels(layer, G, 1)


def joint_jacobian_rows(layer: LayerLinearization, points: slice) -> Float[Tensor, "rows block"]:
    """Return the same rows on the joint matrix [W, b], flattened."""
    weight, bias = jacobian_rows(layer, points)
    joint = weight if bias is None else torch.cat([weight, bias[..., None]], -1)
    return joint.flatten(0, 1).flatten(1)
