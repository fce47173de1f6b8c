"""Approximations by name: a curvature recipe and an inverse recipe, one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch

from experiments.comparing.channels import OnChannels, uncollapsed, unmerged
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    ChannelKronecker,
    DiagonalGaussNewton,
    MatrixFreeGaussNewton,
    ParameterSpace,
    PreconditionedCG,
    gauss_newton_diagonal,
    reduce,
)
from pinncurv.curvature.ekfac import EKFAC, PartialTraces
from pinncurv.curvature.iterative import InverseRecipe, Recipe
from pinncurv.curvature.optimal_kronecker import OptimalKronecker
from pinncurv.curvature.subspace import InSubspace, SubspaceGaussNewton
from pinncurv.linearization import Empirical, ForwardOnly, Linearization
from pinncurv.linops import (
    Damped,
    DiagonalLinearOperator,
    FactorDamping,
    KroneckerEigenLinearOperator,
    LayerwiseLinearOperator,
    PyTorchLinearOperator,
    SumKroneckerLinearOperator,
    check_damping,
    factorize_damped_blocks,
    trace_norm,
)
from pinncurv.optim import Curvature, Inverse

# Blocks up to this size get the inverse of their own. For larger ones it would be an
# eigendecomposition (minutes for 4000 parameters) or conjugate gradients within each product.
_OWN_INVERSE = 1024

_FACTOR_DAMPING = FactorDamping(1e-8, trace_norm)


@dataclass(frozen=True)
class DampedBlocks:
    """Inverse recipe: ``Damped``, with one Cholesky factorization per layer if blocks are large.

    C ↦ diag_l (C_l + λ I)⁻¹

    Args:
        damping: λ, a finite number >= 0.
    """

    damping: float

    def __post_init__(self) -> None:
        """Check the damping."""
        check_damping(self.damping)

    def __call__(self, operator: LayerwiseLinearOperator) -> PyTorchLinearOperator:
        """Return the inverse."""
        closed_form = isinstance(operator, KroneckerEigenLinearOperator) or (
            isinstance(operator, SumKroneckerLinearOperator) and len(operator.terms) == 1
        )
        if closed_form or max(block.numel for block in operator.blocks) <= _OWN_INVERSE:
            return Damped(self.damping)(operator)
        return factorize_damped_blocks(operator, self.damping)


@dataclass(frozen=True)
class ScaledIdentity:
    """Recipe: the multiple of the identity that is closest to the exact matrix.

    tr(JᵀJ) / D · I
    """

    def __call__(self, linearizations: Sequence[Linearization]) -> DiagonalLinearOperator:
        """Build the operator."""
        space = ParameterSpace.of(linearizations)
        diagonal = gauss_newton_diagonal(linearizations, space)
        mean = diagonal.trace() / space.dimension
        return DiagonalLinearOperator([torch.ones_like(d) * mean for d in diagonal.diagonals])


@dataclass(frozen=True)
class Entry:
    """An approximation that can be named.

    Args:
        curvature: Builds the operator C from linearizations.
        inverse: Returns the recipe of the inverse for a damping λ, by default (C + λI)⁻¹.
        definite: Whether that inverse is positive definite. If not, it has no condition number
            and is no preconditioner.
        is_matrix: Whether C is the approximation. If not, the inverse alone is, and only its step
            is compared.
    """

    curvature: Curvature
    inverse: Callable[[float], Inverse] = Damped
    definite: bool = True
    is_matrix: bool = True


def _iterations(
    number: int, curvature: Recipe | None, inverse: InverseRecipe = _FACTOR_DAMPING
) -> Entry:
    """Return so many iterations of preconditioned conjugate gradients for the exact matrix."""
    return Entry(
        MatrixFreeGaussNewton(),
        partial(
            PreconditionedCG,
            curvature=curvature,
            inverse=inverse,
            tolerance=1e-14,
            max_iterations=number,
            stop=None,
        ),
        definite=False,
        is_matrix=False,
    )


EXACT = "exact"

OPERATORS = {
    EXACT: Entry(MatrixFreeGaussNewton()),
    "exact-blocks": Entry(BlockDiagonalGaussNewton(), DampedBlocks),
    "exact-diagonal": Entry(DiagonalGaussNewton()),
    "kfac-expand": Entry(KFAC(), DampedBlocks),
    "kfac-reduce": Entry(KFAC(reduce), DampedBlocks),
    "kfac-merged": Entry(KFAC(merge_terms=True), DampedBlocks),
    "kfac-factor-damping": Entry(KFAC(), partial(FactorDamping, heuristic=trace_norm)),
    "kfac-uncollapsed": Entry(OnChannels(KFAC(), uncollapsed), DampedBlocks),
    "kfac-reduce-uncollapsed": Entry(OnChannels(KFAC(reduce), uncollapsed), DampedBlocks),
    "kfac-unmerged": Entry(OnChannels(KFAC(), unmerged), DampedBlocks),
    "kfac-reduce-unmerged": Entry(OnChannels(KFAC(reduce), unmerged), DampedBlocks),
    "channels": Entry(ChannelKronecker(pairs=False), DampedBlocks),
    "channel-pairs": Entry(ChannelKronecker(), DampedBlocks),
    "kfac-empirical": Entry(KFAC(fisher=Empirical()), DampedBlocks),
    "kfac-forward-only": Entry(KFAC(fisher=ForwardOnly()), DampedBlocks),
    "ekfac": Entry(EKFAC()),
    "ekfac-reduce": Entry(EKFAC(reduce)),
    "ekfac-traces": Entry(EKFAC(basis=PartialTraces())),
    "kronecker": Entry(OptimalKronecker(), DampedBlocks),
    "kronecker-2": Entry(OptimalKronecker(2), DampedBlocks),
    "kronecker-4": Entry(OptimalKronecker(4), DampedBlocks),
    "kronecker-per-term": Entry(OptimalKronecker(per_term=True), DampedBlocks),
    "subspace": Entry(SubspaceGaussNewton(100), InSubspace, definite=False),
    "cg-5": _iterations(5, None),
    "cg-5-kfac": _iterations(5, KFAC()),
    "cg-5-ekfac": _iterations(5, EKFAC(), Damped(1e-8)),
    "cg-10-kfac": _iterations(10, KFAC()),
    "cg-10-ekfac": _iterations(10, EKFAC(), Damped(1e-8)),
    "identity": Entry(ScaledIdentity()),
}

# For the command line one of the names, for mypy a string.
if TYPE_CHECKING:
    OperatorName = str
else:
    OperatorName = Literal[tuple(OPERATORS)]
