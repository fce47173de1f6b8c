"""Operators that are diagonal in a Kronecker-factored basis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.blocks import Block
from pinncurv.linops.factors import KroneckerFactors
from pinncurv.linops.layerwise import Joint, LayerwiseLinearOperator
from pinncurv.linops.operator import check_damping
from pinncurv.linops.psd import FactorizationError, FactorizationReport, is_singular


@dataclass(frozen=True)
class KroneckerBasis:
    """A basis of joint matrices, the Kronecker product of two bases.

    E_B ⊗ E_A, that is Y ↦ E_B Y E_Aᵀ

    Attributes:
        A: The basis on the inputs' side, one vector per column ``[d_in + 1, d_in + 1]``.
        B: The basis on the outputs' side, one vector per column ``[d_out, d_out]``.
    """

    A: Float[Tensor, "d_joint d_joint"]
    B: Float[Tensor, "d_out d_out"]


class KroneckerCongruenceLinearOperator(LayerwiseLinearOperator):
    """Block diagonal over layers, each block congruent to a diagonal matrix by a Kronecker basis.

    C_l = (E_B ⊗ E_A) diag(S) (E_B ⊗ E_A)ᵀ, that is X ↦ E_B [(E_Bᵀ X E_A) ∘ S] E_Aᵀ

    The basis need not be orthogonal. It is kept in the precision that it comes in; products are
    computed in that precision and cast to the operator's data type.

    Cost: d_in² + d_out² + d_in d_out numbers; 2 d_in d_out (d_in + d_out) per product.

    Args:
        bases: One basis per layer.
        scales: One matrix S ``[d_out, d_in + 1]`` per layer.
        dtype: Data type of the vectors, by default that of the scales.
        reports: What was done to compute the bases.
    """

    def __init__(
        self,
        bases: Sequence[KroneckerBasis],
        scales: Sequence[Float[Tensor, "_ _"]],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        dtype: torch.dtype | None = None,
        reports: Sequence[FactorizationReport] = (),
    ) -> None:
        super().__init__(blocks, shapes, scales[0].device, dtype or scales[0].dtype)
        self.bases = tuple(bases)
        self.scales = tuple(scales)
        self.reports = tuple(reports)

    def _apply(self, layer: int, X: Joint) -> Joint:
        basis, scale = self.bases[layer], self.scales[layer]
        Y = (basis.B.mT @ X.to(scale.dtype) @ basis.A) * scale
        return basis.B @ Y @ basis.A.mT

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        E = KroneckerFactors(self.bases[layer].A, self.bases[layer].B).to_dense()
        return (E * self.scales[layer].flatten()) @ E.mT

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        basis = self.bases[layer]
        return basis.B.square() @ self.scales[layer] @ basis.A.square().mT

    def trace(self) -> Float[Tensor, ""]:
        traces = [
            basis.B.square().sum(0) @ scale @ basis.A.square().sum(0)
            for basis, scale in zip(self.bases, self.scales, strict=True)
        ]
        return torch.stack(traces).sum().to(self.dtype)


class KroneckerEigenLinearOperator(KroneckerCongruenceLinearOperator):
    """Block diagonal over layers, each block with a Kronecker-factored orthogonal eigenbasis.

    C_l = (U_B ⊗ U_A) diag(S) (U_B ⊗ U_A)ᵀ with orthogonal U_A, U_B

    Kronecker products and their damped inverses have this form with S a function of the outer
    product of eigenvalues; EKFAC (George et al. 2018) has it with corrected eigenvalues S.

    Cost: see ``KroneckerCongruenceLinearOperator``; the inverse takes d_in d_out and shares the
    bases.
    """

    def inverse(self, damping: float) -> KroneckerEigenLinearOperator:
        """Return the damped inverse.

        (C + λ I)⁻¹ = (U_B ⊗ U_A) diag(1 / (max(S, 0) + λ)) (U_B ⊗ U_A)ᵀ

        Raises:
            FactorizationError: If the damping is zero and a block is numerically singular.
        """
        damping = check_damping(damping)
        for block, S in zip(self.blocks, self.scales, strict=True):
            if damping == 0 and is_singular(S):
                smallest, largest = S.min().item(), S.max().item()
                raise FactorizationError(
                    f"The block of layer {block.name} must be nonsingular to be inverted without "
                    f"damping, got eigenvalues in [{smallest:.1e}, {largest:.1e}]. "
                    "Pass damping > 0."
                )
        scales = [1 / (S.clamp(min=0) + damping) for S in self.scales]
        return KroneckerEigenLinearOperator(
            self.bases, scales, self.blocks, self._in_shape, self.dtype, self.reports
        )

    def trace(self) -> Float[Tensor, ""]:
        return torch.stack([S.sum() for S in self.scales]).sum().to(self.dtype)
