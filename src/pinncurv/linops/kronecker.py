"""Sums of Kronecker products, one sum per layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops import policy
from pinncurv.linops.blocks import Block
from pinncurv.linops.eigenform import KroneckerBasis, KroneckerEigenLinearOperator
from pinncurv.linops.factors import (
    KroneckerFactors,
    add_dense,
    add_diagonals,
    check_factors,
    grouped,
)
from pinncurv.linops.inverses import factorize_damped_blocks
from pinncurv.linops.kronecker_inverse import cg_inverse, in_double
from pinncurv.linops.layerwise import Joint, LayerwiseLinearOperator, term_position
from pinncurv.linops.operator import SymmetricLinearOperator, check_damping
from pinncurv.linops.psd import EigenFactorization, eigh, symmetrize
from pinncurv.machine import Graphs


class SumKroneckerLinearOperator(LayerwiseLinearOperator):
    """Block diagonal over layers, each block a sum of Kronecker products over terms.

    C_l = Σ_t B_lt ⊗ A_lt, that is X_l ↦ Σ_t B_lt X_l A_lt

    KFAC for a loss with T terms has this form (Dangel, Müller, Zeinhofer 2024, section 3.3).

    Cost: d_in² + d_out² numbers and d_in d_out (d_in + d_out) per product, for each term.

    Args:
        factors: ``factors[l][t]`` are the factors of layer l and term t.
        terms: Names of the terms, by default ``"0"``, ``"1"``, ….
        graphs: Where what is done with the factors is compiled, if it shall be.

    Raises:
        ValueError: If the factors do not fit the layers and terms.
    """

    def __init__(
        self,
        factors: Sequence[Sequence[KroneckerFactors]],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        terms: Sequence[str] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        first = factors[0][0].A
        super().__init__(blocks, shapes, first.device, first.dtype)
        self.factors = tuple(tuple(layer) for layer in factors)
        self.terms = tuple(map(str, range(len(factors[0]))) if terms is None else terms)
        self.graphs = graphs
        check_factors(self.factors, self.blocks, self.terms)

    def factor_name(self, layer: int, term: int, factor: str) -> str:
        """Name factor ``"A"`` or ``"B"`` of a layer and term for error messages and reports."""
        return f"layer {self.blocks[layer].name}, term {self.terms[term]}, factor {factor}"

    def term(self, term: int | str) -> SumKroneckerLinearOperator:
        """Return the operator of one term, given by position or name, alone.

        diag_l(B_lt ⊗ A_lt)

        Raises:
            KeyError: If there is no such term.
        """
        t = term_position(self.terms, term)
        return SumKroneckerLinearOperator(
            [[layer[t]] for layer in self.factors], self.blocks, self._in_shape, [self.terms[t]]
        )

    def _apply(self, layer: int, X: Joint) -> Joint:
        first, *others = self.factors[layer]
        Y = first.B @ X @ first.A
        for pair in others:
            Y = Y + pair.B @ X @ pair.A
        return Y

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        return add_dense(self.factors[layer])

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        return add_diagonals(self.factors[layer])

    def trace(self) -> Float[Tensor, ""]:
        pairs = [pair for layer in self.factors for pair in layer]
        return torch.stack([pair.B.trace() * pair.A.trace() for pair in pairs]).sum()

    def tensors(self) -> list[Tensor]:
        return [M for layer in self.factors for pair in layer for M in (pair.A, pair.B)]

    def tensor_names(self, parameters: Sequence[str]) -> list[str]:
        """Names of ``tensors``, in their order, from those of the parameters."""
        weights = [parameters[block.weight] for block in self.blocks]
        return [f"{w} in {t}, {M}" for w in weights for t in self.terms for M in "AB"]

    def with_tensors(self, tensors: Sequence[Tensor]) -> SumKroneckerLinearOperator:
        factors = grouped(KroneckerFactors, tensors, len(self.terms))
        made = type(self)(factors, self.blocks, self._in_shape, self.terms)
        made.graphs = self.graphs  # a subclass may have other arguments
        return made

    def identity(self) -> SumKroneckerLinearOperator:
        return self.with_tensors([torch.eye(len(M)).to(M) for M in self.tensors()])

    @cached_property
    def eigendecompositions(self) -> tuple[tuple[EigenFactorization, EigenFactorization], ...]:
        """Eigendecompositions of the factors A and B of each layer of a one-term operator.

        A = U_A diag(a) U_Aᵀ, B = U_B diag(b) U_Bᵀ
        """
        return tuple(
            (self._eigh(pair.A, i, "A"), self._eigh(pair.B, i, "B"))
            for i, (pair,) in enumerate(self.factors)
        )

    def _eigh(self, matrix: Tensor, layer: int, factor: str) -> EigenFactorization:
        name = self.factor_name(layer, 0, factor)
        return eigh(symmetrize(matrix, name), name)

    def inverse(self, damping: float) -> SymmetricLinearOperator:
        """Return the damped inverse (C + λ I)⁻¹.

        With one term this is exact from the eigendecompositions of the factors,
        X ↦ U_B [(U_Bᵀ X U_A) / (b aᵀ + λ)] U_Aᵀ. With more terms there is no closed form: blocks
        are factorized as dense matrices if none is larger than ``policy.LARGEST_BLOCK``, otherwise
        each product solves with preconditioned conjugate gradients (see ``cg_inverse``).
        """
        damping = check_damping(damping)
        if len(self.terms) == 1:
            return self._eigenform().inverse(damping)
        if max(block.numel for block in self.blocks) <= policy.LARGEST_BLOCK:
            return factorize_damped_blocks(in_double(self), damping, self.dtype, checked=True)
        return cg_inverse(self, damping)

    def _eigenform(self) -> KroneckerEigenLinearOperator:
        """A one-term operator in the eigenbases of its factors."""
        pairs = self.eigendecompositions
        return KroneckerEigenLinearOperator(
            [KroneckerBasis(A.eigenvectors, B.eigenvectors) for A, B in pairs],
            [torch.outer(B.eigenvalues, A.eigenvalues) for A, B in pairs],
            self.blocks,
            self._in_shape,
            self.dtype,
            [factorization.report for pair in pairs for factorization in pair],
        )
