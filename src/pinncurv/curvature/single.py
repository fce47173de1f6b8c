"""Large symmetric products in single precision, for factorizations in double precision.

A matrix is divided by a power of two near its largest entry before it is rounded to float32, so
that neither its own size nor the square of it leaves the range of float32. Sums of products are
multiplied by it again in the precision of the parameters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linearization import DenseRows, EntryRows, JacobianBlock, LinearLayer
from pinncurv.machine import symmetric_product

# Narrower matrices stay as they are: rounding them saves nothing, and a few entries that are long
# sums would lose digits.
_NARROW = 16


def is_narrow(*widths: int) -> bool:
    """Whether a matrix is too narrow to be rounded."""
    return min(widths) < _NARROW


def check_single(single: Any) -> None:
    """Check that a recipe was told whether, and not what, to form in single precision.

    Raises:
        TypeError: If it is neither True nor False.
    """
    if not isinstance(single, bool):
        raise TypeError(
            f"single must be True or False, got {single!r}. True forms the products of the "
            "curvature in float32, False in the data type of the parameters; there is no other."
        )


@dataclass(frozen=True, eq=False)
class Scaled:
    """A matrix in float32 and its scale.

    X ≈ s Y,  max |Y| ∈ [½, 1)

    Args:
        values: Y.
        scale: s, a power of two in the data type of X; a tensor without axes.
    """

    values: Tensor
    scale: Float[Tensor, ""]

    @classmethod
    def of(cls, X: Tensor, least: float = 0.0) -> Scaled:
        """Round a matrix to float32; one that is not finite stays so.

        Args:
            X: The matrix.
            least: Size of an entry that is to join the matrix, which s is for, too.
        """
        # the norm of the largest entry takes ten times as long
        low, high = X.aminmax()
        size = torch.maximum(-low, high).clamp(min=least or torch.finfo(X.dtype).tiny)
        mantissa, _ = torch.frexp(size)
        return cls((X * (mantissa / size)).float(), size / mantissa)

    def gram(self) -> Float[Tensor, "d d"]:
        """Return XᵀX ≈ s² YᵀY, in the data type of X."""
        return widened(symmetric_product(self.values), self.scale, self.scale)


def widened(products: Tensor, s: Float[Tensor, ""], t: Float[Tensor, ""]) -> Tensor:
    """Return sums of products of two scaled matrices, s t P, in the data type of s."""
    return products.to(s.dtype).mul_(s).mul_(t)


def lifted_(matrix: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """Add to a positive semidefinite matrix what rounding may have taken from its eigenvalues.

    M + ε tr(M) I ⪰ 0,  ε of float32

    Without it, an inverse with less damping than that follows eigenvectors of the rounding errors.
    """
    matrix.diagonal().add_(torch.finfo(torch.float32).eps * matrix.trace())
    return matrix


def with_single_inputs(layer: LinearLayer) -> tuple[LinearLayer, Float[Tensor, ""]]:
    """Return a layer with the inputs Z' in float32, and z of Z ≈ z Z'.

    Z' has a column for the bias, which is scaled with the others; the layer has none any more.
    """
    if layer.bias is None:
        Z = Scaled.of(layer.Z)
        return replace(layer, Z=Z.values), Z.scale
    Z = Scaled.of(layer.Z, least=1.0)
    joint = layer.with_bias_column(Z.values, 0)
    joint[..., -1].div_(Z.scale)
    return replace(layer, bias=None, Z=joint), Z.scale


def with_single_gradients(layer: LinearLayer) -> tuple[LinearLayer, Float[Tensor, ""]]:
    """Return a layer with the gradients G' in float32, and g of G ≈ g G'."""
    G = Scaled.of(layer.gradients)
    return replace(layer, G=G.values), G.scale


@dataclass(frozen=True, eq=False)
class SingleBlock:
    """The columns of the Jacobian that belong to a block, in float32.

    J_l ≈ s J_l',  on the joint matrix [W, b] of a layer

    Args:
        block: J_l', or J_l as it is where there is nothing to multiply.
        scale: s.
    """

    block: JacobianBlock
    scale: Float[Tensor, ""]

    @classmethod
    def of(cls, block: JacobianBlock) -> SingleBlock:
        """Round a block."""
        if isinstance(block, DenseRows):
            rows = Scaled.of(block.matrix)
            return cls(replace(block, matrix=rows.values), rows.scale)
        layer, z = with_single_inputs(block.as_layer())
        layer, g = with_single_gradients(layer)
        return cls(layer, z * g)


def add_gram_(
    total: Float[Tensor, "n n"], block: JacobianBlock, single: bool
) -> Float[Tensor, "n n"]:
    """Add J_lᵀJ_l on the joint matrix, flattened, and return the sum."""
    # the product of entry rows is diagonal
    if not single or is_narrow(len(total)) or isinstance(block, EntryRows):
        return block.add_gram_(total)
    small = SingleBlock.of(block)
    part = torch.zeros_like(total, dtype=torch.float32)
    return total.add_(widened(small.block.add_gram_(part), small.scale, small.scale))
