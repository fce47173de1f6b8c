"""Where the mass of a matrix lies: the share of each pair of layers in its Frobenius norm."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.comparison.checks import check_finite
from pinncurv.comparison.frobenius import frobenius_by_layer_pair
from pinncurv.linops import Block, PyTorchLinearOperator


def squared_block_norms(
    operator: PyTorchLinearOperator, blocks: Sequence[Block] | None = None
) -> Float[Tensor, "L L"]:
    """Return the squared Frobenius norm of each block.

    ‖C_kl‖²

    Exact, from D products of which a few columns are held at a time. For a Gauss-Newton matrix of
    few residuals ``squared_block_norms_from_kernels`` is cheaper.
    """
    return frobenius_by_layer_pair(operator, operator, blocks).squared_norm


def squared_block_norms_from_kernels(
    kernels: Sequence[Float[Tensor, "R R"]],
) -> Float[Tensor, "L L"]:
    """Return the squared Frobenius norm of each block of a Gauss-Newton matrix JᵀJ.

    ‖J_kᵀJ_l‖² = Σ_ij (J_k J_kᵀ)_ij (J_l J_lᵀ)_ij
    """
    sizes = [tuple(kernel.shape) for kernel in kernels]
    if len(set(sizes)) != 1:
        raise ValueError(
            f"There must be one or more kernels of one size [R, R], got sizes {sizes}. "
            "Pass J_l J_lᵀ of each layer, for the residuals of all terms."
        )
    names = [f"Kernel {i}" for i in range(len(kernels))]
    pairs = zip(kernels, names, strict=True)
    flat = torch.stack([check_finite(kernel, name).double().flatten() for kernel, name in pairs])
    return flat @ flat.mT


def mass(squared_norms: Float[Tensor, "L L"]) -> Float[Tensor, "L L"]:
    """Return the share of each block in the squared Frobenius norm.

    ‖C_kl‖² / Σ_kl ‖C_kl‖²

    The sum of its diagonal says how much of the matrix a block-diagonal approximation can hold.
    """
    total = check_finite(squared_norms, "squared_norms").sum()
    if bool((squared_norms < 0).any()) or not bool(total > 0):
        raise ValueError(
            "squared_norms must be >= 0 and not all zero, got entries in "
            f"[{squared_norms.min().item():.1e}, {squared_norms.max().item():.1e}]. "
            "Look for an operator that is zero."
        )
    return squared_norms / total
