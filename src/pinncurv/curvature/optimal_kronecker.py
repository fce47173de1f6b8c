"""The best approximation of each layer's exact block by one or several Kronecker products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pinncurv.curvature.block_rows import BlockRows
from pinncurv.curvature.kfac import KFAC
from pinncurv.curvature.parameters import ParameterSpace, visit_blocks
from pinncurv.linearization import JacobianBlock, Linearization
from pinncurv.linops import (
    Block,
    KroneckerExpansionLinearOperator,
    KroneckerFactors,
    KroneckerRecord,
    SumKroneckerLinearOperator,
    merge,
)

# Further columns per parity, without which close singular values converge slowly.
_OVERSAMPLING = 2
_DTYPE = torch.float64


class KroneckerNotConverged(UserWarning):
    """The iteration stopped before the singular values changed as little as asked for."""


class OptimalKroneckerLinearOperator(SumKroneckerLinearOperator):
    """The best Kronecker product for each layer, or one for each of its terms.

    diag_l(B_l ⊗ A_l) with ‖C_l − B_l ⊗ A_l‖_F minimal, C_l = Σ_nv vec(J_nv) vec(J_nv)ᵀ

    Both factors are symmetric positive semidefinite, of equal norm (Van Loan and Pitsianis 1993,
    section 5).

    Cost: to build, see ``optimal_kronecker``; otherwise that of KFAC with one term, whose damped
    inverse takes O(d_in³ + d_out³) per layer.

    Args:
        factors: ``factors[l][t]`` are the factors of layer l and (merged) term t.
        records: How the factors were found; nothing for averages.
    """

    def __init__(
        self,
        factors: Sequence[Sequence[KroneckerFactors]],
        blocks: Sequence[Block],
        shapes: Sequence[Sequence[int]],
        terms: Sequence[str] | None = None,
        records: Sequence[KroneckerRecord] = (),
    ) -> None:
        super().__init__(factors, blocks, shapes, terms)
        self.records = tuple(records)


@dataclass(frozen=True, eq=False)
class _Iteration:
    """Alternating subspace iteration for the rearranged block of one layer.

    B ← orth(R[A]), (A, σ, B) ← svd(Rᵀ[B]) with R[A] = Σ_nv J_nv A J_nvᵀ, Rᵀ[B] = Σ_nv J_nvᵀ B J_nv

    R maps symmetric matrices to symmetric and antisymmetric to antisymmetric ones, so the two
    parities P are iterated side by side. It maps positive semidefinite matrices to such, hence the
    leading pair is symmetric positive semidefinite and rank one needs that parity only. A and B are
    orthonormal (B zero at the start), ``change`` is the largest one of a wanted singular value in
    the last of ``count`` iterations, relative to σ_1.
    """

    rank: int
    A: Float[Tensor, "P k d_joint d_joint"]
    B: Float[Tensor, "P k d_out d_out"]
    singular_values: Float[Tensor, "P k"]
    count: int = 0
    change: float = math.inf

    @classmethod
    def start(cls, A: Float[Tensor, "d_joint d_joint"], d_out: int, rank: int) -> _Iteration:
        """Start from one positive semidefinite matrix, and random ones for further columns."""
        largest = min(d_out, len(A)) ** 2
        P, k = (1, 1) if rank == 1 else (2, min(rank + _OVERSAMPLING, largest))
        # a seed of its own: the result does not depend on it, and other generators are left alone
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(P, k, *A.shape, generator=generator, dtype=_DTYPE).to(A.device)
        start[0, 0] = A
        B, singular_values = start.new_zeros(P, k, d_out, d_out), start.new_zeros(P, k)
        return cls(min(rank, largest), _orthonormal(start), B, singular_values)

    def advanced(
        self, B: Float[Tensor, "P k d_out d_out"], image: Float[Tensor, "P k d_joint d_joint"]
    ) -> _Iteration:
        """Return the next iterate, given new matrices B and their images Rᵀ[B]."""
        U, sigma, V = torch.linalg.svd(_of_parity(image).flatten(2), full_matrices=False)
        B = torch.einsum("pij,pixy->pjxy", U, B)
        after = _Iteration(self.rank, _of_parity(V.view_as(image)), B, sigma, self.count + 1)
        wanted = after.singular_values.flatten()[after.order]
        change = (wanted - self.singular_values.flatten()[self.order]).abs().max().item()
        largest = wanted[0].item()
        return replace(after, change=change / largest if largest > 0 else 0.0)

    @property
    def order(self) -> Int[Tensor, " rank"]:
        """Positions of the wanted singular values, the largest first."""
        return self.singular_values.flatten().argsort(descending=True)[: self.rank]

    def products(self, dtype: torch.dtype) -> list[KroneckerFactors]:
        """Return the leading products, each with factors of equal norm."""
        A, B = self.A.flatten(0, 1)[self.order], self.B.flatten(0, 1)[self.order]
        signs = torch.where(A.diagonal(dim1=1, dim2=2).sum(1) < 0, -1.0, 1.0)
        scale = (self.singular_values.flatten()[self.order].sqrt() * signs)[:, None, None]
        A, B = (scale * A).to(dtype), (scale * B).to(dtype)
        return [KroneckerFactors(*pair) for pair in zip(A, B, strict=True)]

    def record(self, layer: str, terms: str, tolerance: float) -> KroneckerRecord:
        """Say how the products were found."""
        sigma = tuple(self.singular_values.flatten()[self.order].tolist())
        converged = self.change <= tolerance
        return KroneckerRecord(layer, terms, sigma, self.count, self.change, converged)


def _of_parity(M: Float[Tensor, "P k d d"]) -> Float[Tensor, "P k d d"]:
    """Return the symmetric parts of the first, the antisymmetric parts of the second."""
    signs = M.new_tensor([1, -1])[: len(M), None, None, None]
    return (M + signs * M.mT) / 2


def _orthonormal(M: Float[Tensor, "P k d d"]) -> Float[Tensor, "P k d d"]:
    """Return orthonormal matrices that span the parts of a parity.

    Where there are too few of a parity, the others are zero.
    """
    Q = torch.linalg.qr(_of_parity(M).flatten(2).mT).Q
    return _of_parity(Q.mT.reshape(M.shape))


def _add_images_(
    images: dict[int, Tensor],
    linearizations: Sequence[Linearization],
    space: ParameterSpace,
    contract: Callable[[BlockRows, Tensor], Tensor],
    matrices: dict[int, Tensor],
) -> dict[int, Tensor]:
    """Add the contractions of some layers' rows with a stack of matrices each, over all points."""

    def visit(t: int, i: int, block: JacobianBlock) -> None:
        if i in images:
            rows = BlockRows.of(block, _DTYPE)
            parts = [contract(rows, M) for M in matrices[i].flatten(0, 1)]
            images[i] += torch.stack(parts).view_as(images[i])

    visit_blocks(linearizations, space, visit)
    return images


def _iterate(
    linearizations: Sequence[Linearization],
    space: ParameterSpace,
    states: list[_Iteration],
    iterations: int,
    tolerance: float,
) -> list[_Iteration]:
    """Iterate until no singular value of any layer changes; every layer stops on its own."""
    for _ in range(iterations):
        active = [i for i, state in enumerate(states) if state.change > tolerance]
        if not active:
            break
        A = {i: states[i].A for i in active}
        B = {i: torch.zeros_like(states[i].B) for i in active}
        _add_images_(B, linearizations, space, BlockRows.contract_inputs, A)
        B = {i: _orthonormal(image) for i, image in B.items()}
        A = {i: torch.zeros_like(image) for i, image in A.items()}
        _add_images_(A, linearizations, space, BlockRows.contract_outputs, B)
        states = [s.advanced(B[i], A[i]) if i in A else s for i, s in enumerate(states)]
    return states


def optimal_kronecker(
    linearizations: Sequence[Linearization],
    rank: int = 1,
    per_term: bool = False,
    iterations: int = 200,
    tolerance: float = 1e-10,
) -> OptimalKroneckerLinearOperator | KroneckerExpansionLinearOperator:
    """Approximate each layer's exact block by the best sum of so many Kronecker products.

    min ‖C_l − Σ_i B_li ⊗ A_li‖_F,  C_l = Σ_tnv vec(J_tnv) vec(J_tnv)ᵀ

    That is the truncated singular value decomposition of the rearranged block, of which only
    products with Z and G are needed: the cost of an iteration is linear in N, and no row of the
    Jacobian is formed. From KFAC-expand's factors on, the error decreases with every iteration, so
    for one term it is below KFAC's after the first. Computed in float64. With ``chunk_size`` every
    iteration linearizes twice.

    Cost: 2 N S (d_in² + V d_out²) + 2 N S² (d_in + V d_out) per iteration and layer for rank one,
    and 2 (rank + 2) times as much for more; as many times d_in² + d_out² numbers, and a layer's Z
    and G at the points of one block.

    Args:
        linearizations: One per term. Their output gradients define the block: the exact
            Gauss-Newton's for ``Type2``, those of the empirical choice for ``Empirical``.
        rank: Number of products.
        per_term: Whether every term gets its own products. By default the products approximate the
            sum over all terms, which is the best that one product can do for the whole loss.
        iterations: Most iterations.
        tolerance: Largest change of a singular value in one iteration, relative to the largest.

    Returns:
        For rank one an ``OptimalKroneckerLinearOperator``, positive semidefinite, that can be used
        wherever KFAC can. For a higher rank a ``KroneckerExpansionLinearOperator``, which need not
        be positive semidefinite.

    Raises:
        ValueError: If an argument is out of range, or a linearization is the forward-only one.

    Source: Van Loan and Pitsianis 1993, sections 2, 4 and 5.
    """
    if rank < 1 or iterations < 1 or not tolerance >= 0:
        raise ValueError(
            "rank and iterations must be at least 1 and tolerance at least 0, got "
            f"{rank}, {iterations} and {tolerance}."
        )
    kfac = KFAC()(linearizations)
    space = ParameterSpace.of(linearizations)
    T = range(len(linearizations))
    groups = [[t] for t in T] if per_term else [list(T)]
    names = ["+".join(kfac.terms[t] for t in group) for group in groups]
    products: list[list[list[KroneckerFactors]]] = [[] for _ in space.blocks]
    records = []
    for group, name in zip(groups, names, strict=True):
        starts = [merge([layer[t] for t in group]).A for layer in kfac.factors]
        states = [
            _Iteration.start(A, block.d_out, rank)
            for A, block in zip(starts, space.blocks, strict=True)
        ]
        chosen = [linearizations[t] for t in group]
        states = _iterate(chosen, space, states, iterations, tolerance)
        for block, state, known in zip(space.blocks, states, products, strict=True):
            known.append(state.products(space.dtype))
            records.append(state.record(block.name, name, tolerance))
    _warn(records, tolerance)
    if rank == 1:
        factors = [[pair for (pair,) in layer] for layer in products]
        return OptimalKroneckerLinearOperator(factors, space.blocks, space.shapes, names, records)
    sums = [[pair for pairs in layer for pair in pairs] for layer in products]
    return KroneckerExpansionLinearOperator(sums, space.blocks, space.shapes, records)


def _warn(records: Sequence[KroneckerRecord], tolerance: float) -> None:
    missed = [record for record in records if not record.converged]
    if missed:
        worst = max(missed, key=lambda record: record.change)
        warnings.warn(
            f"The singular values must change by at most {tolerance:.1e}, but those of layer "
            f"{worst.layer}, terms {worst.terms}, still changed by {worst.change:.1e} in iteration "
            f"{worst.iterations} ({len(missed)} of {len(records)} layers missed it). Raise "
            "iterations or tolerance.",
            KroneckerNotConverged,
            stacklevel=3,
        )


@dataclass(frozen=True)
class OptimalKronecker:
    """Recipe: the best sum of Kronecker products for each layer's exact block.

    min ‖C_l − Σ_i B_li ⊗ A_li‖_F

    Cost: see ``optimal_kronecker``; the inverse for rank one takes O(d_in³ + d_out³), for more it
    is that of dense blocks.

    Args:
        rank: Number of products.
        per_term: Whether every term gets its own products.
        iterations: Most iterations.
        tolerance: Largest change of a singular value in one iteration, relative to the largest.
    """

    rank: int = 1
    per_term: bool = False
    iterations: int = 200
    tolerance: float = 1e-10

    def __call__(
        self, linearizations: Sequence[Linearization]
    ) -> OptimalKroneckerLinearOperator | KroneckerExpansionLinearOperator:
        return optimal_kronecker(
            linearizations, self.rank, self.per_term, self.iterations, self.tolerance
        )
