"""Damping of every Kronecker factor, and the closed-form inverse that it allows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.linops.eigenform import KroneckerBasis, KroneckerCongruenceLinearOperator
from pinncurv.linops.factors import KroneckerFactors, merge
from pinncurv.linops.inverses import factorize_damped
from pinncurv.linops.kronecker import SumKroneckerLinearOperator
from pinncurv.linops.operator import PyTorchLinearOperator, check_damping
from pinncurv.linops.psd import (
    FACTORIZATION_DTYPE,
    FactorizationError,
    FactorizationReport,
    check_nonsingular,
    eigh,
    is_singular,
    symmetric_part,
    symmetrize,
)
from pinncurv.linops.reading import read
from pinncurv.linops.simultaneous import Pencil, is_good
from pinncurv.machine import Graphs, form_of


@dataclass(frozen=True)
class FactorDampings:
    """How much damping each of two Kronecker factors gets.

    (B + λ_B I) ⊗ (A + λ_A I)

    Attributes:
        A: λ_A, a number or a tensor of one element on the device of the factors.
        B: λ_B.
    """

    A: float | Tensor
    B: float | Tensor


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
    a = factors.A.trace() / len(factors.A)
    b = factors.B.trace() / len(factors.B)
    pi = torch.where((a > 0) & (b > 0), a / b, 1.0).sqrt()
    root = damping**0.5
    return FactorDampings(pi * root, root / pi)


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
    settles_checks: ClassVar[bool] = True  # by a reading, before it uses any number

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
        groups = _check_groups(self.groups, len(operator.terms))
        layers = [i for i, block in enumerate(operator.blocks) if block.kronecker]
        known = self.heuristic in (same, trace_norm)  # others may read values
        if operator.graphs is not None and known and len(groups) == 2 and self.damping > 0:
            inverted = self._invert_compiled(operator, layers, groups, operator.graphs)
        else:
            sides = [self._sides(operator, i, groups, self.damping) for i in layers]
            inverted = _invert_all(operator, layers, sides, _read(sides))
        made = iter(inverted)
        inverses = [
            next(made) if block.kronecker else _invert_dense(operator, i, self.damping)
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

    def _invert_compiled(
        self,
        operator: SumKroneckerLinearOperator,
        layers: Sequence[int],
        groups: Sequence[Sequence[int]],
        graphs: Graphs,
    ) -> list[_LayerInverse]:
        """Do the same by two graphs, before and after the device is waited for."""
        pairs = [pair for i in layers for pair in operator.factors[i]]
        factors = [M for pair in pairs for M in (pair.A, pair.B)]
        # one that changes from step to step is no number of the graph
        damping = factors[0].new_full((), self.damping, dtype=FACTORIZATION_DTYPE)
        made: list[tuple[_Side, _Side]] = []

        def begin() -> list[Tensor]:
            made[:] = [self._sides(operator, i, groups, damping) for i in layers]
            return [t for layer in made for side in layer for t in _tensors(side)]

        parts = str(groups), tuple(layers), operator.blocks, operator.terms
        given = [*factors, damping]
        key: tuple[Hashable, ...] = "factor damping", self.heuristic, parts, form_of(given)
        begun = iter(graphs(key, begin, given))
        names = graphs.kept(key, lambda: [side.name for layer in made for side in layer])
        flat = [Pencil(next(begun), next(begun), next(begun), next(begun), name) for name in names]
        sides = list(zip(flat[::2], flat[1::2], strict=True))
        numbers = _read(sides)
        if not all(map(is_good, numbers)):
            return _invert_all(operator, layers, sides, numbers)

        def end() -> list[Tensor]:
            done = [_invert(layer, None) for layer in sides]
            return [t for inverse in done for t in inverse.tensors]

        given = [t for side in flat for t in _tensors(side)]
        key = "damped factors", parts, form_of(given)
        ended = list(graphs(key, end, given))
        return [
            _LayerInverse.of(ended[i : i + 5], layer, numbers[j : j + 2])
            for i, j, layer in zip(
                range(0, len(ended), 5), range(0, len(numbers), 2), sides, strict=True
            )
        ]

    def _sides(
        self,
        operator: SumKroneckerLinearOperator,
        layer: int,
        groups: Sequence[Sequence[int]],
        damping: Any,
    ) -> tuple[_Side, _Side]:
        """Merge the factors of each group of terms, and add the damping to their diagonals."""
        pairs = operator.factors[layer]
        A = symmetric_part(torch.stack([pair.A for pair in pairs]).to(FACTORIZATION_DTYPE))
        B = symmetric_part(torch.stack([pair.B for pair in pairs]).to(FACTORIZATION_DTYPE))
        merged = [merge([KroneckerFactors(A[t], B[t]) for t in group]) for group in groups]
        dampings = [self.heuristic(pair, damping) for pair in merged]
        # the factors are views of fresh tensors, so in-place is safe
        for pair, damping in zip(merged, dampings, strict=True):
            pair.A.diagonal().add_(damping.A)
            pair.B.diagonal().add_(damping.B)
        terms = ["+".join(operator.terms[t] for t in group) for group in groups]
        names = [f"layer {operator.blocks[layer].name}, term {group}" for group in terms]
        first, second = [pair.A for pair in merged], [pair.B for pair in merged]
        floors = [d.A for d in dampings], [d.B for d in dampings]
        return _side(first, floors[0], names, "A"), _side(second, floors[1], names, "B")


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


def _check_finite(operator: SumKroneckerLinearOperator, layers: Sequence[int]) -> None:
    """Name the first factor that is not finite, if it is no sum that overflows."""
    for i in layers:
        for t, pair in enumerate(operator.factors[i]):
            symmetrize(pair.A, operator.factor_name(i, t, "A"))
            symmetrize(pair.B, operator.factor_name(i, t, "B"))


@dataclass(frozen=True)
class _Single:
    """A damped factor of the only group of terms; what is read of it, see ``Pencil``."""

    P: Float[Tensor, "n n"]
    numbers: Float[Tensor, " 2"]
    name: str


_Side = Pencil | _Single


def _side(
    factors: Sequence[Tensor], floors: Sequence[float | Tensor], names: Sequence[str], factor: str
) -> _Side:
    """Return one factor of a layer, of one or two groups of terms."""
    if len(factors) == 1:
        (P,), (floor,) = factors, floors
        name = f"{names[0]}, damped factor {factor}"
        bound = floor if isinstance(floor, Tensor) else P.new_full((), floor)
        return _Single(P, torch.stack([P.sum(), bound]), name)
    name = f"the sum of {names[0]} and {names[1]}, damped factors {factor}"
    return Pencil.of(torch.stack(list(factors)), floors, name)


@dataclass(frozen=True)
class _LayerInverse:
    """The inverse of one layer's block."""

    basis: KroneckerBasis
    scale: Float[Tensor, "d_out d_joint"]
    reports: tuple[FactorizationReport, ...]

    @property
    def tensors(self) -> list[Tensor]:
        """All but what the reports know without."""
        eigenvalues = [r.eigenvalues for r in self.reports if r.eigenvalues is not None]
        return [self.basis.A, self.basis.B, self.scale, *eigenvalues]

    @classmethod
    def of(
        cls,
        tensors: Sequence[Tensor],
        sides: tuple[Pencil, Pencil],
        numbers: Sequence[Sequence[float]],
    ) -> _LayerInverse:
        """Return the inverse with these tensors, of two pencils that were good."""
        A, B, scale, *eigenvalues = tensors
        reports: list[FactorizationReport] = []
        for side, state, m in zip(sides, numbers, eigenvalues, strict=True):
            s1, s2, one, two = state[3:]
            whitened, bound = f"{side.name}, whitened", one / (2.0 * s1 * len(m))
            reports += [
                FactorizationReport(side.name, "cholesky", one / s1 + two / s2),
                FactorizationReport(whitened, "eigh", bound, m),
            ]
        return cls(KroneckerBasis(A, B), scale, tuple(reports))


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


def _tensors(side: Any) -> list[Tensor]:
    return [side.scaled, side.M, side.L, side.numbers]


def _read(sides: Sequence[tuple[_Side, _Side]]) -> list[list[float]]:
    """Wait for the device, once."""
    return read(*[side.numbers for layer in sides for side in layer])


def _invert_all(
    operator: SumKroneckerLinearOperator,
    layers: Sequence[int],
    sides: Sequence[tuple[_Side, _Side]],
    numbers: Sequence[Sequence[float]],
) -> list[_LayerInverse]:
    """Invert the layers with factors."""
    if not all(isfinite(state[0]) for state in numbers):
        _check_finite(operator, layers)
    read_of = zip(numbers[::2], numbers[1::2], strict=True)
    return [_invert(layer, state) for layer, state in zip(sides, read_of, strict=True)]


def _invert(sides: tuple[Any, Any], numbers: Sequence[Sequence[float]] | None) -> _LayerInverse:
    """Invert B ⊗ A by two eigendecompositions, or B_1 ⊗ A_1 + B_2 ⊗ A_2 by two congruences.

    Args:
        sides: What is made of A and of B.
        numbers: Their numbers; None if they are known to be good, but stay on the device.
    """
    if isinstance(sides[0], _Single):
        assert numbers is not None
        a, b = (eigh(side.P, side.name, read[1]) for side, read in zip(sides, numbers, strict=True))
        check_nonsingular(a)
        check_nonsingular(b)
        basis = KroneckerBasis(a.eigenvectors, b.eigenvectors)
        return _LayerInverse(
            basis, torch.outer(1 / b.eigenvalues, 1 / a.eigenvalues), (a.report, b.report)
        )
    states = (None, None) if numbers is None else numbers
    A, B = (side.diagonalize(state) for side, state in zip(sides, states, strict=True))
    eigenvalues = torch.outer(A.s1 * B.s1 * B.a1, A.a1).addr_(A.s2 * B.s2 * B.a2, A.a2)
    if numbers and sum(a * b for a, b in zip(numbers[0][-2:], numbers[1][-2:], strict=True)) == 0:
        _check_nonsingular(eigenvalues, sides[0].name)
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
