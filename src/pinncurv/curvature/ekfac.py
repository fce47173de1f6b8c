"""EKFAC: a Kronecker-factored eigenbasis with the exact second moments in that basis."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.block_rows import BlockRows, check_gradients
from pinncurv.curvature.kfac import KFAC, WeightSharing, check_dense_blocks, expand
from pinncurv.curvature.parameters import ParameterSpace, visit_blocks
from pinncurv.curvature.second_moments import second_moments
from pinncurv.linearization import Fisher, JacobianBlock, Linearization
from pinncurv.linops import (
    Block,
    FactorizationReport,
    KroneckerBasis,
    KroneckerEigenLinearOperator,
    KroneckerFactors,
    eigh,
    merge,
    policy,
    symmetrize,
    term_position,
)


class EigenBasis(ABC):
    """Which pair of symmetric matrices of each layer gives the eigenvectors."""

    @abstractmethod
    def factors(
        self,
        linearizations: Sequence[Linearization],
        sharing: WeightSharing,
        fisher: Fisher | None,
    ) -> list[KroneckerFactors]:
        """Return one pair per layer, common to all terms; arguments as ``EKFAC`` has them."""


@dataclass(frozen=True)
class KFACFactors(EigenBasis):
    """The factors of KFAC, those of several terms merged into one pair.

    A = Σ_t tr(B_t) A_t / Σ_t tr(B_t),  B = Σ_t B_t

    Cost: that of building KFAC.

    Source: George et al. 2018, section 3.
    """

    def factors(
        self,
        linearizations: Sequence[Linearization],
        sharing: WeightSharing,
        fisher: Fisher | None,
    ) -> list[KroneckerFactors]:
        kfac = KFAC(sharing, fisher)(linearizations)
        return [merge(layer) for layer in kfac.factors]


@dataclass(frozen=True)
class PartialTraces(EigenBasis):
    """The partial traces of the exact block, summed over the terms; ``sharing`` has no effect.

    A = Σ_tnv J_tnvᵀ J_tnv,  B = Σ_tnv J_tnv J_tnvᵀ

    This is the eigenbasis of Shampoo (Gupta et al. 2018), in which SOAP (Vyas et al. 2024) takes
    second moments.

    Cost: N S (d_in² + V d_out²) + 2 N S² (d_in + V d_out).
    """

    def factors(
        self,
        linearizations: Sequence[Linearization],
        sharing: WeightSharing,
        fisher: Fisher | None,
    ) -> list[KroneckerFactors]:
        space = ParameterSpace.of(linearizations)
        traces = [
            KroneckerFactors(*(space.zeros(d, d) for d in block.shape[::-1]))
            for block in space.blocks
        ]

        def visit(t: int, i: int, block: JacobianBlock) -> None:
            rows = BlockRows.of(block, space.dtype)
            traces[i].A.add_(rows.contract_outputs())
            traces[i].B.add_(rows.contract_inputs())

        visit_blocks(linearizations, space, visit, fisher)
        return traces


class EKFACLinearOperator(KroneckerEigenLinearOperator):
    """EKFAC of a loss with any number of terms.

    C_l = (U_B ⊗ U_A) diag(Σ_t S_lt) (U_B ⊗ U_A)ᵀ,  S_lt = Σ_nv (U_Bᵀ J_tnv U_A)²  (by entries)

    J_tnv = Σ_s g_tnvs z_tnsᵀ is the exact row of the block, channels summed. All terms share the
    basis of a layer. In this basis S is the diagonal of the exact block, hence no other choice of
    S has a smaller Frobenius error, KFAC's eigenvalues included, and the trace is exact.

    Where a factor has a repeated eigenvalue the basis is not unique, and C_l may depend on its
    choice. ``expand`` and the partial traces have S = 0 on the null space of a factor; ``reduce``
    need not, so take more points than a layer is wide.

    It can be kept for some steps, but not averaged over them: S would belong to another basis in
    every step.

    Cost: to build, that of the factors, O(d_in³ + d_out³) for their eigenvectors, N S (d_in² + V
    d_out²) to rotate Z and G, and N V (S + 10) d_in d_out or N S (S + 1) / 2 d_in d_out for the
    moments, whichever is less. With T terms d_in² + d_out² + (T + 1) d_in d_out numbers per layer.
    A product, also with the inverse, takes 2 d_in d_out (d_in + d_out), the inverse itself d_in
    d_out.

    Source: George et al. 2018, section 3.

    Args:
        bases: One orthogonal basis per layer.
        scales: ``scales[l][t]`` is the matrix S ``[d_out, d_in + 1]`` of layer l and term t.
        terms: Names of the terms.
    """

    def __init__(
        self,
        bases: Sequence[KroneckerBasis],
        scales: Sequence[Sequence[Float[Tensor, "_ _"]]],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        terms: Sequence[str],
        dtype: torch.dtype | None = None,
        reports: Sequence[FactorizationReport] = (),
    ) -> None:
        totals = [torch.stack(list(layer)).sum(0) for layer in scales]
        super().__init__(bases, totals, blocks, shapes, dtype, reports)
        self.term_scales = tuple(tuple(layer) for layer in scales)
        self.terms = tuple(terms)

    def term(self, term: int | str) -> EKFACLinearOperator:
        """Return the operator of one term alone, in the basis that all terms share.

        diag_l (U_B ⊗ U_A) diag(S_lt) (U_B ⊗ U_A)ᵀ

        These add up to the operator. For the term in a basis of its own, build the operator from
        its linearization alone.

        Raises:
            KeyError: If there is no term of that position or name.
        """
        t = term_position(self.terms, term)
        return self._with(self.bases, [[layer[t]] for layer in self.term_scales], [self.terms[t]])

    def tensors(self) -> list[Tensor]:
        """Bases and moments, in the order layer, (U_A, U_B, S of every term)."""
        layers = zip(self.bases, self.term_scales, strict=True)
        return [tensor for basis, scales in layers for tensor in (basis.A, basis.B, *scales)]

    def tensor_names(self, parameters: Sequence[str]) -> list[str]:
        """Names of ``tensors``, in their order, from those of the parameters."""
        weights = [parameters[block.weight] for block in self.blocks]
        return [f"{w}, {part}" for w in weights for part in ("A", "B", *self.terms)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> EKFACLinearOperator:
        width = 2 + len(self.terms)
        layers = [tensors[i : i + width] for i in range(0, len(tensors), width)]
        bases = [KroneckerBasis(A, B) for A, B, *_ in layers]
        return self._with(bases, [scales for _, _, *scales in layers], self.terms)

    def _with(
        self,
        bases: Sequence[KroneckerBasis],
        scales: Sequence[Sequence[Tensor]],
        terms: Sequence[str],
    ) -> EKFACLinearOperator:
        space = (self.blocks, self.shapes, terms, self.dtype, self.reports)
        return EKFACLinearOperator(bases, scales, *space)


@dataclass(frozen=True)
class EKFAC:
    """Recipe: EKFAC of the linearized terms.

    diag_l (U_B ⊗ U_A) diag(Σ_t S_lt) (U_B ⊗ U_A)ᵀ

    Args:
        sharing: How the channels enter the factors of the basis: ``expand`` or ``reduce``.
        fisher: Which output gradients to take; those of the linearizations by default.
        basis: What the eigenvectors are taken of.
    """

    sharing: WeightSharing = expand
    fisher: Fisher | None = None
    basis: EigenBasis = field(default_factory=KFACFactors)

    def __call__(self, linearizations: Sequence[Linearization]) -> EKFACLinearOperator:
        """Build the operator; with ``chunk_size`` every term is linearized twice.

        Raises:
            ValueError: If the choice is forward-only, or the linearizations were made with another
                choice than ``fisher``.
        """
        space = ParameterSpace.of(linearizations)
        check_dense_blocks(space, policy.LARGEST_PARAMETER)
        check_gradients("EKFAC", linearizations, self.fisher)
        bases, reports = [], []
        pairs = self.basis.factors(linearizations, self.sharing, self.fisher)
        for pair, block in zip(pairs, space.blocks, strict=True):
            names = [f"layer {block.name}, basis of EKFAC, factor {factor}" for factor in "AB"]
            A = eigh(symmetrize(pair.A, names[0]), names[0])
            B = eigh(symmetrize(pair.B, names[1]), names[1])
            bases.append(KroneckerBasis(A.eigenvectors, B.eigenvectors))
            reports += [A.report, B.report]
        casts = [KroneckerBasis(b.A.to(space.dtype), b.B.to(space.dtype)) for b in bases]
        scales = [[space.zeros(*block.shape) for _ in linearizations] for block in space.blocks]

        def visit(t: int, i: int, block: JacobianBlock) -> None:
            scales[i][t].add_(second_moments(block.as_layer(), casts[i]))

        visit_blocks(linearizations, space, visit, self.fisher)
        return EKFACLinearOperator(
            bases,
            [
                [S.to(basis.A.dtype) for S in layer]
                for layer, basis in zip(scales, bases, strict=True)
            ],
            space.blocks,
            space.shapes,
            [linearization.term.name for linearization in linearizations],
            space.dtype,
            reports,
        )
