"""Damping of every Kronecker factor, and the closed-form inverse that it allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.eigenform import KroneckerBasis, KroneckerCongruenceLinearOperator
from pinncurv.linops.factors import KroneckerFactors, merge
from pinncurv.linops.inverses import factorize_damped
from pinncurv.linops.kronecker import SumKroneckerLinearOperator
from pinncurv.linops.operator import PyTorchLinearOperator, check_damping
from pinncurv.linops.psd import (
    FactorizationError,
    FactorizationReport,
    check_nonsingular,
    eigh,
    is_singular,
    symmetrize,
)
from pinncurv.linops.simultaneous import diagonalize


@dataclass(frozen=True)
class FactorDampings:
    """How much damping each of two Kronecker factors gets.

    (B + λ_B I) ⊗ (A + λ_A I)

    Attributes:
        A: λ_A.
        B: λ_B.
    """

    A: float
    B: float


Heuristic = Callable[[KroneckerFactors, float], FactorDampings]


def same(factors: KroneckerFactors, damping: float) -> FactorDampings:
    """Add the same damping to both factors.

    λ_A = λ_B = λ

    From Dangel, Müller, Zeinhofer 2024.
    """
    return FactorDampings(damping, damping)


def trace_norm(factors: KroneckerFactors, damping: float) -> FactorDampings:
    """Split the damping by the mean eigenvalues of the factors.

    λ_A = π √λ, λ_B = √λ / π, π² = (tr A / dim A) / (tr B / dim B)

    π = 1 if either trace is zero.

    From Martens and Grosse 2015, section 6.3.
    """
    a = factors.A.trace().item() / len(factors.A)
    b = factors.B.trace().item() / len(factors.B)
    pi = sqrt(a / b) if a > 0 and b > 0 else 1.0
    return FactorDampings(pi * sqrt(damping), sqrt(damping) / pi)


@dataclass(frozen=True)
class FactorDamping:
    """The inverse with damping in every Kronecker factor, as a function of the operator.

    C ↦ [diag_l Σ_t (B_lt + λ_B I) ⊗ (A_lt + λ_A I)]⁻¹

    Not the same as ``Damped``, which is (C + λ I)⁻¹. With one term each factor is inverted. With
    two terms the factors of both terms are diagonalized simultaneously, E_Aᵀ A_t E_A = s_t
    diag(a_t), likewise for B, and the inverse is X ↦ E_B [(E_Bᵀ X E_A) / (c_1 b_1 a_1ᵀ +
    c_2 b_2 a_2ᵀ)] E_Aᵀ. More terms are first merged into two groups (see ``merge``), which is an
    approximation. A block that has no factors, of a parameter that is no weight of a linear layer,
    is inverted as it is, (C_l + λ I)⁻¹.

    Cost: O(d_in³ + d_out³) to build, 2 d_in d_out (d_in + d_out) per product, d_in² + d_out² +
    d_in d_out numbers in float64, whatever the number of terms.

    Attributes:
        damping: The damping λ, a finite number >= 0.
        heuristic: How λ is distributed, ``same`` or ``trace_norm`` or another such function.
        groups: Positions of the terms in each of one or two groups. By default each term is a
            group if there are at most two, else the first term is one and all others the second.

    The idea is from Martens and Grosse 2015, appendix B.
    """

    damping: float
    heuristic: Heuristic = same
    groups: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def __call__(self, operator: PyTorchLinearOperator) -> KroneckerCongruenceLinearOperator:
        """Return the factor-damped inverse of a sum of Kronecker products.

        Raises:
            TypeError: If the operator has no Kronecker factors.
            FactorizationError: If a factor is not finite, or numerically singular without damping.
            ValueError: If the groups do not fit the terms.
        """
        if not isinstance(operator, SumKroneckerLinearOperator):
            raise TypeError(
                "Factor damping must be given a SumKroneckerLinearOperator, got "
                f"{type(operator).__name__}. Use Damped(damping) for other operators."
            )
        positions = _check_groups(self.groups, len(operator.terms))
        invert = _invert_one if len(positions) == 1 else _invert_two
        inverses = [
            invert([self._damped_pair(operator, i, group) for group in positions])
            if block.kronecker
            else _invert_dense(operator, i, self.damping)
            for i, block in enumerate(operator.blocks)
        ]
        return KroneckerCongruenceLinearOperator(
            [inverse.basis for inverse in inverses],
            [inverse.scale for inverse in inverses],
            operator.blocks,
            operator.shapes,
            operator.dtype,
            [report for inverse in inverses for report in inverse.reports],
        )

    def _damped_pair(
        self, operator: SumKroneckerLinearOperator, layer: int, group: Sequence[int]
    ) -> _DampedPair:
        """Merge the factors of a group of terms and add the damping to their diagonals."""
        pairs = [
            KroneckerFactors(
                symmetrize(operator.factors[layer][t].A, operator.factor_name(layer, t, "A")),
                symmetrize(operator.factors[layer][t].B, operator.factor_name(layer, t, "B")),
            )
            for t in group
        ]
        merged = merge(pairs)
        dampings = self.heuristic(merged, float(self.damping))
        # the factors are fresh tensors of symmetrize or merge, so in-place is safe
        merged.A.diagonal().add_(dampings.A)
        merged.B.diagonal().add_(dampings.B)
        terms = "+".join(operator.terms[t] for t in group)
        name = f"layer {operator.blocks[layer].name}, term {terms}"
        return _DampedPair(merged.A, merged.B, dampings, name)


def _check_groups(groups: Sequence[Sequence[int]] | None, T: int) -> list[list[int]]:
    if groups is None:
        return [[0]] if T == 1 else [[0], list(range(1, T))]
    positions = [list(group) for group in groups]
    covered = sorted(t for group in positions for t in group)
    if len(positions) not in (1, 2) or covered != list(range(T)) or [] in positions:
        raise ValueError(
            f"groups must be one or two nonempty groups that contain each of the {T} terms once, "
            f"got {groups}. Pass for example [[0], {list(range(1, T))}]."
        )
    return positions


@dataclass(frozen=True)
class _DampedPair:
    """Damped factors of one layer and one group of terms, in float64."""

    A: Float[Tensor, "d_joint d_joint"]
    B: Float[Tensor, "d_out d_out"]
    dampings: FactorDampings
    name: str

    @property
    def floor(self) -> float:
        """A lower bound on the eigenvalues of B ⊗ A."""
        return self.dampings.A * self.dampings.B


@dataclass(frozen=True)
class _LayerInverse:
    """The inverse of one layer's block."""

    basis: KroneckerBasis
    scale: Float[Tensor, "d_out d_joint"]
    reports: tuple[FactorizationReport, ...]


def _invert_dense(
    operator: SumKroneckerLinearOperator, layer: int, damping: float
) -> _LayerInverse:
    """Invert C_l + λI for a block without factors, where B_t is a number: M⁻¹ = R⁻ᵀ R⁻¹."""
    name = f"{operator.blocks[layer].name}, damped block"
    factorization = factorize_damped(operator.block_to_dense(layer), name, damping)
    identity = torch.eye(len(factorization.root)).to(factorization.root)
    basis = KroneckerBasis(
        factorization.whiten_adjoint(identity), torch.ones_like(identity[:1, :1])
    )
    return _LayerInverse(basis, torch.ones_like(identity[:1]), (factorization.report,))


def _invert_one(pairs: Sequence[_DampedPair]) -> _LayerInverse:
    """Invert B ⊗ A by the eigendecompositions of both factors."""
    (pair,) = pairs
    A = eigh(pair.A, f"{pair.name}, damped factor A", pair.dampings.A)
    B = eigh(pair.B, f"{pair.name}, damped factor B", pair.dampings.B)
    check_nonsingular(A)
    check_nonsingular(B)
    basis = KroneckerBasis(A.eigenvectors, B.eigenvectors)
    return _LayerInverse(
        basis, torch.outer(1 / B.eigenvalues, 1 / A.eigenvalues), (A.report, B.report)
    )


def _invert_two(pairs: Sequence[_DampedPair]) -> _LayerInverse:
    """Invert B_1 ⊗ A_1 + B_2 ⊗ A_2 by simultaneous diagonalization of the A_t and of the B_t."""
    one, two = pairs
    name = f"the sum of {one.name} and {two.name}, damped factors"
    A = diagonalize(one.A, two.A, one.dampings.A, two.dampings.A, f"{name} A")
    B = diagonalize(one.B, two.B, one.dampings.B, two.dampings.B, f"{name} B")
    eigenvalues = torch.outer(A.s1 * B.s1 * B.a1, A.a1).addr_(A.s2 * B.s2 * B.a2, A.a2)
    if one.floor + two.floor == 0:
        _check_nonsingular(eigenvalues, name)
    return _LayerInverse(KroneckerBasis(A.E, B.E), 1 / eigenvalues, A.reports + B.reports)


def _check_nonsingular(eigenvalues: Tensor, name: str) -> None:
    """Check that an undamped sum of Kronecker products is nonsingular, and not only by rounding."""
    if is_singular(eigenvalues):
        smallest, largest = eigenvalues.min().item(), eigenvalues.max().item()
        raise FactorizationError(
            f"The Kronecker products of {name} must have a nonsingular sum to be inverted without "
            f"damping, got eigenvalues in [{smallest:.1e}, {largest:.1e}] up to scale. "
            "Pass damping > 0."
        )
