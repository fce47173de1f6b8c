"""The damped inverse of a sum of two or more Kronecker products, which has no closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pinncurv.linops import policy
from pinncurv.linops.cg_inverse import CGInverseLinearOperator
from pinncurv.linops.eigenform import KroneckerBasis, KroneckerCongruenceLinearOperator
from pinncurv.linops.factors import merge
from pinncurv.linops.psd import symmetrize
from pinncurv.linops.simultaneous import SimultaneousDiagonalization, diagonalize

if TYPE_CHECKING:
    from pinncurv.linops.kronecker import SumKroneckerLinearOperator


def in_double(operator: SumKroneckerLinearOperator) -> SumKroneckerLinearOperator:
    """The same operator in float64, with factors that are checked and symmetrized."""
    names = [
        operator.factor_name(i, t, factor)
        for i in range(len(operator.blocks))
        for t in range(len(operator.terms))
        for factor in "AB"
    ]
    tensors = zip(operator.tensors(), names, strict=True)
    return operator.with_tensors([symmetrize(tensor, name) for tensor, name in tensors])


def cg_inverse(
    operator: SumKroneckerLinearOperator,
    damping: float,
    tolerance: float = policy.TOLERANCE,
    max_iterations: int | None = None,
) -> CGInverseLinearOperator:
    """Return (C + λ I)⁻¹ by preconditioned conjugate gradients in float64."""
    double = in_double(operator)
    preconditioner = preconditioner_of(double, damping) if damping > 0 else None
    return CGInverseLinearOperator(
        double, damping, preconditioner, tolerance, max_iterations, operator.dtype
    )


def preconditioner_of(
    operator: SumKroneckerLinearOperator, damping: float
) -> KroneckerCongruenceLinearOperator:
    """Approximate the damped inverse in closed form.

    (C_l + λ I)⁻¹ ≈ (E_B ⊗ E_A) diag(1 / (b_1 a_1ᵀ + b_2 a_2ᵀ + λ ‖e_B‖² ‖e_A‖²)) (E_B ⊗ E_A)ᵀ

    The bases diagonalize the two groups of terms (the first, and all others merged), and λ I is
    replaced by its diagonal in that basis. To keep the bases well conditioned each factor is
    damped by its mean eigenvalue times the ratio (at most 1) of λ to the mean eigenvalue of C_l.
    On factors with decaying spectra and two terms this took 1.4 to 4 times fewer iterations than
    factor damping with ``trace_norm`` as preconditioner, and 2 to 6 times fewer than none.

    The operator has two or more terms and is in float64, the damping is positive, and so is the
    result.
    """
    bases, scales = [], []
    for block, layer in zip(operator.blocks, operator.factors, strict=True):
        one, two = layer[0], merge(layer[1:])
        trace = sum(pair.A.trace().item() * pair.B.trace().item() for pair in layer)
        ratio = min(1.0, damping * block.numel / trace) if trace > 0 else 1.0
        A = _diagonalize(one.A, two.A, ratio, f"layer {block.name}, preconditioner, factors A")
        B = _diagonalize(one.B, two.B, ratio, f"layer {block.name}, preconditioner, factors B")
        scale = torch.outer(A.s1 * B.s1 * B.a1, A.a1).addr_(A.s2 * B.s2 * B.a2, A.a2)
        scale.addr_(damping * B.E.square().sum(0), A.E.square().sum(0))
        bases.append(KroneckerBasis(A.E, B.E))
        scales.append(1 / scale)
    return KroneckerCongruenceLinearOperator(bases, scales, operator.blocks, operator.shapes)


def _diagonalize(P1: Tensor, P2: Tensor, ratio: float, name: str) -> SimultaneousDiagonalization:
    """Diagonalize two matrices after damping each by a ratio of its mean eigenvalue."""
    n, identity = len(P1), torch.eye(len(P1)).to(P1)
    floor1, floor2 = (ratio * (P.trace().item() / n or 1.0) for P in (P1, P2))
    return diagonalize(P1 + floor1 * identity, P2 + floor2 * identity, floor1, floor2, name)
