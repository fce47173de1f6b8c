"""Kronecker products for every pair of channels, where KFAC has one for all channels together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.curvature.block_rows import BlockRows, check_gradients
from pinncurv.curvature.parameters import ParameterSpace, visit_blocks
from pinncurv.linearization import Fisher, JacobianBlock, Linearization
from pinncurv.linops import (
    Block,
    BlockFactorizedInverseLinearOperator,
    CGInverseLinearOperator,
    KroneckerFactors,
    LayerwiseLinearOperator,
    SumKroneckerLinearOperator,
    check_damping,
    factorize_damped_blocks,
    policy,
    term_position,
)
from pinncurv.linops.factors import check_factors, grouped
from pinncurv.linops.layerwise import Joint
from pinncurv.machine import sizes_of


@dataclass(frozen=True, eq=False)
class ChannelFactors:
    """The factors of one layer and term, one pair for each of P pairs of channels.

    Σ_p B_p ⊗ A_p, that is X ↦ Σ_p B_p X A_pᵀ

    Those of two different channels are not symmetric, but the transposed pair is there, too.

    Args:
        A: Second moments of the inputs, ``[P, d_joint, d_joint]``.
        B: Those of the output gradients, ``[P, d_out, d_out]``.
    """

    A: Float[Tensor, "P d_joint d_joint"]
    B: Float[Tensor, "P d_out d_out"]


class ChannelKroneckerLinearOperator(LayerwiseLinearOperator):
    """Kronecker products for the pairs of channels of each layer and term.

    C_l = Σ_t Σ_sq B_sq ⊗ A_sq,  A_sq = 1/N Σ_n z_ns z_nqᵀ,  B_sq = Σ_nv g_nvs g_nvqᵀ

    The exact block is Σ_nv Σ_sq (g_nvs g_nvqᵀ) ⊗ (z_ns z_nqᵀ): the only approximation is that the
    mean over the points is taken of the inputs and of the gradients separately, so that it is exact
    for one point, and for any number of copies of one point. It is positive semidefinite: the
    moments of all channels side by side are. KFAC-expand also takes the mean over the channels, and
    drops all pairs of different ones.

    As the exact block, and unlike KFAC, it is the same for any choice of the channels that does not
    differ from point to point: other directions, split sums, and unused channels change nothing.
    Without the pairs of different channels (``pairs=False``) it is neither the same nor exact.

    Averages over steps average the moments, and stay positive semidefinite.

    Cost: to build, N S (S + 1) / 2 (d_in² + V d_out²), (S + 1) / 2 times that of KFAC, and
    S² (d_in² + d_out²) numbers, for each term: with the Laplacian in d dimensions S = d + 2, and
    d = 100 and layers of width 64 take 0.7 GB each in float64. A product takes
    S² d_in d_out (d_in + d_out) for each term. Without the pairs, building costs as much as KFAC,
    and numbers and products have S instead of S². For the inverse see there.

    Args:
        factors: ``factors[l][t]`` are the factors of layer l and term t. Their sum over the pairs
            must be symmetric positive semidefinite.
        terms: Names of the terms.

    Raises:
        ValueError: If the factors do not fit the layers and terms.
    """

    def __init__(
        self,
        factors: Sequence[Sequence[ChannelFactors]],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        terms: Sequence[str],
    ) -> None:
        first = factors[0][0].A
        super().__init__(blocks, shapes, first.device, first.dtype)
        self.factors = tuple(tuple(layer) for layer in factors)
        self.terms = tuple(terms)
        check_factors(self.factors, self.blocks, self.terms)

    def term(self, term: int | str) -> ChannelKroneckerLinearOperator:
        """Return the operator of one term alone.

        diag_l Σ_sq B_ltsq ⊗ A_ltsq

        Raises:
            KeyError: If there is no term of that position or name.
        """
        t = term_position(self.terms, term)
        factors = [[layer[t]] for layer in self.factors]
        return ChannelKroneckerLinearOperator(factors, self.blocks, self.shapes, [self.terms[t]])

    def _apply(self, layer: int, X: Joint) -> Joint:
        Y = torch.zeros_like(X)
        at_a_time = max(1, sizes_of(X.device).held // X.numel())
        for factors in self.factors[layer]:
            for A, B in zip(factors.A.split(at_a_time), factors.B.split(at_a_time), strict=True):
                XA = torch.einsum("...oi,pji->p...oj", X, A)
                Y += torch.einsum("pqo,p...oj->...qj", B, XA)
        return Y

    def block_to_dense(self, layer: int) -> Float[Tensor, "n n"]:
        n = self.blocks[layer].numel
        products = (torch.einsum("poq,pij->oiqj", f.B, f.A) for f in self.factors[layer])
        return torch.stack([product.reshape(n, n) for product in products]).sum(0)

    def _block_diagonal(self, layer: int) -> Float[Tensor, "d_out d_joint"]:
        diagonals = [
            f.B.diagonal(dim1=1, dim2=2).mT @ f.A.diagonal(dim1=1, dim2=2)
            for f in self.factors[layer]
        ]
        return torch.stack(diagonals).sum(0)

    def tensors(self) -> list[Tensor]:
        return [M for layer in self.factors for f in layer for M in (f.A, f.B)]

    def tensor_names(self, parameters: Sequence[str]) -> list[str]:
        """Names of ``tensors``, in their order, from those of the parameters."""
        weights = [parameters[block.weight] for block in self.blocks]
        return [f"{w} in {t}, {M}" for w in weights for t in self.terms for M in "AB"]

    def with_tensors(self, tensors: Sequence[Tensor]) -> ChannelKroneckerLinearOperator:
        factors = grouped(ChannelFactors, tensors, len(self.terms))
        return type(self)(factors, self.blocks, self.shapes, self.terms)

    def identity(self) -> ChannelKroneckerLinearOperator:
        return self.with_tensors(
            [torch.eye(M.shape[-1]).to(M).expand_as(M) for M in self.tensors()]
        )

    def inverse(
        self,
        damping: float,
        dense_limit: int = policy.LARGEST_BLOCK,
        tolerance: float = policy.TOLERANCE,
    ) -> BlockFactorizedInverseLinearOperator | CGInverseLinearOperator:
        """Return the damped inverse.

        (C + λ I)⁻¹

        There is no closed form. Blocks are factorized as dense matrices if none is larger than
        ``dense_limit``. Otherwise each product solves with conjugate gradients to the relative
        ``tolerance``, preconditioned by the damped inverse of the Kronecker product of each block's
        partial traces.

        Raises:
            FactorizationError: If a block is not finite, or numerically singular without damping.
        """
        damping = check_damping(damping)
        double = self.with_tensors([M.double() for M in self.tensors()])
        if max(block.numel for block in self.blocks) <= dense_limit:
            return factorize_damped_blocks(double, damping, self.dtype)
        preconditioner = double.partial_traces().inverse(damping) if damping > 0 else None
        return CGInverseLinearOperator(double, damping, preconditioner, tolerance, dtype=self.dtype)

    def partial_traces(self) -> SumKroneckerLinearOperator:
        """Approximate each block by the Kronecker product of its partial traces.

        C_l ≈ (Σ tr(A_p) B_p) ⊗ (Σ tr(B_p) A_p) / tr C_l, sums over all terms and pairs p
        """
        factors = [[_partial_traces(layer)] for layer in self.factors]
        names = ["+".join(self.terms)]
        return SumKroneckerLinearOperator(factors, self.blocks, self.shapes, names)


def _partial_traces(factors: Sequence[ChannelFactors]) -> KroneckerFactors:
    A, B = torch.cat([f.A for f in factors]), torch.cat([f.B for f in factors])
    a, b = (M.diagonal(dim1=1, dim2=2).sum(1) for M in (A, B))
    trace = torch.dot(a, b)
    scale = torch.where(trace > 0, 1 / trace, torch.zeros_like(trace))
    return KroneckerFactors(
        torch.einsum("p,pij->ij", b, A), scale * torch.einsum("p,poq->oq", a, B)
    )


class _Moments:
    """Sums of x_ns x_nqᵀ over the rows n, for all channels q >= s, without ``pairs`` for q = s."""

    def __init__(self, width: int, space: ParameterSpace, pairs: bool) -> None:
        self.width, self.pairs, self.rows = width, pairs, 0
        self.total = torch.zeros(0, width, dtype=space.dtype, device=space.device)

    def add(self, X: Float[Tensor, "n S d"]) -> None:
        """Add the rows."""
        columns, d = X.flatten(1), self.width
        self.rows += len(X)
        n = columns.shape[1]
        if not len(self.total):
            self.total = X.new_zeros(n, n if self.pairs else d)
        for start in range(0, n, d):
            channel = slice(start, start + d)
            others = slice(start, n) if self.pairs else channel
            panel = self.total[channel, start:] if self.pairs else self.total[channel]
            panel.addmm_(columns[:, channel].mT, columns[:, others])

    def result(self) -> Float[Tensor, "P d d"]:
        """Return the sums, ordered by s and then q; those for q < s are transposes."""
        n, m = self.total.shape
        d = self.width
        total = self.total.view(n // d, d, m // d, d).transpose(1, 2)
        for s in range(m // d - 1):
            total[s + 1 :, s] = total[s, s + 1 :].mT
        return total.reshape(-1, d, d)


@dataclass(frozen=True)
class ChannelKronecker:
    """Recipe: a Kronecker product for every pair of channels, instead of one for all together.

    diag_l Σ_t Σ_sq B_ltsq ⊗ A_ltsq,  A_sq = 1/N Σ_n z_ns z_nqᵀ,  B_sq = Σ_nv g_nvs g_nvqᵀ

    Goes with ``Damped``, for layers whose blocks can be factorized, and for finding out what KFAC
    loses by averaging over the channels. Cost: see ``ChannelKroneckerLinearOperator``.

    Args:
        pairs: Whether pairs of different channels are kept.
        fisher: Which output gradients to take; those of the linearizations by default.
    """

    pairs: bool = True
    fisher: Fisher | None = None

    def __call__(self, linearizations: Sequence[Linearization]) -> ChannelKroneckerLinearOperator:
        """Build the operator.

        Raises:
            ValueError: If the choice is forward-only, or the linearizations were made with another
                choice than ``fisher``.
        """
        space = ParameterSpace.of(linearizations)
        check_gradients("Kronecker products by channel", linearizations, self.fisher)
        moments = [
            [
                tuple(_Moments(d, space, self.pairs) for d in block.shape[::-1])
                for _ in linearizations
            ]
            for block in space.blocks
        ]

        def visit(t: int, i: int, block: JacobianBlock) -> None:
            rows = BlockRows.of(block, space.dtype)
            A, B = moments[i][t]
            A.add(rows.Z)
            B.add(rows.G.flatten(0, 1))

        visit_blocks(linearizations, space, visit, self.fisher)
        factors = [
            [ChannelFactors(A.result().div_(max(A.rows, 1)), B.result()) for A, B in layer]
            for layer in moments
        ]
        names = [linearization.term.name for linearization in linearizations]
        return ChannelKroneckerLinearOperator(factors, space.blocks, space.shapes, names)
