"""The direction of a step: the preconditioned gradient, and what is taken over from the last."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from pinncurv.optim.protocols import offers
from pinncurv.optim.situation import Situation


class Momentum(ABC):
    """What a direction takes over from the direction of the last step."""

    @abstractmethod
    def direction(self, situation: Situation, previous: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the direction.

        Args:
            situation: The loss and the inverse.
            previous: The direction of the last step; None at the start and after a rejection.
        """


def _check(momentum: float) -> None:
    if not 0 <= momentum < 1:
        raise ValueError(f"The momentum must be in [0, 1), got {momentum}.")


@dataclass(frozen=True)
class HeavyBall(Momentum):
    """Momentum on the preconditioned gradient.

    b_k = μ b_{k-1} + Δ_k, and the step goes along b_k

    Args:
        momentum: μ, in [0, 1).

    Raises:
        ValueError: If the momentum is not in [0, 1).
    """

    momentum: float

    def __post_init__(self) -> None:
        _check(self.momentum)

    def direction(self, situation: Situation, previous: Sequence[Tensor] | None) -> list[Tensor]:
        step = situation.step()
        if previous is None:
            return step
        return [
            part.add(old, alpha=self.momentum) for part, old in zip(step, previous, strict=True)
        ]


@dataclass(frozen=True)
class Spring(Momentum):
    """Momentum through the solve: the step starts from the last direction, not from zero.

    b_k = μ b_{k-1} - (JᵀJ + λI)⁻¹ Jᵀ(r̃ + μ J b_{k-1})

    That minimizes ‖r̃ + J b‖² + λ ‖b - μ b_{k-1}‖² over b. Any curvature may stand in for JᵀJ.

    Args:
        momentum: μ, in [0, 1).

    Raises:
        ValueError: If the momentum is not in [0, 1).

    Source: Goldshlager, Abrahamsen, Lin 2024 (SPRING); Guzman-Cordero et al. 2025 for PINNs.
    """

    momentum: float

    def __post_init__(self) -> None:
        _check(self.momentum)

    def direction(self, situation: Situation, previous: Sequence[Tensor] | None) -> list[Tensor]:
        if previous is None:
            return situation.step()
        kept = [self.momentum * old for old in previous]
        return [old.add_(part) for old, part in zip(kept, situation.step(kept), strict=True)]


@dataclass(frozen=True)
class WarmStart(Momentum):
    """Start an iterative solve from the last solution instead of from zero.

    Δ_k ≈ -(C + λI)⁻¹ ∇L, iterated from ζ Δ_{k-1}

    Nothing of the last direction is left once the solve has converged. An inverse that does not
    iterate is not changed.

    Args:
        decay: ζ in [0, 1].

    Raises:
        ValueError: If the decay is not in [0, 1].

    Source: Martens 2010, section 4.5; Martens and Sutskever 2012 for the decay.
    """

    decay: float = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"The decay of a warm start must be in [0, 1], got {self.decay}.")

    def direction(self, situation: Situation, previous: Sequence[Tensor] | None) -> list[Tensor]:
        if previous is None or not offers(situation.inverse, "solve_from"):
            return situation.step()
        start = [-self.decay * old for old in previous]
        return [-part for part in situation.inverse.solve_from(situation.gradient, start)]
