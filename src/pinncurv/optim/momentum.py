"""The direction of a step: the preconditioned gradient, and what is taken over from the last."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pinncurv.optim.protocols import LinearizedLoss, offers


@dataclass(frozen=True, eq=False)
class Descent:
    """A linearized loss and a damped inverse of its curvature.

    Args:
        linearized: The loss, linearized at the current parameters.
        gradient: ∇L.
        inverse: (C + λI)⁻¹.
    """

    linearized: LinearizedLoss
    gradient: Sequence[Tensor]
    inverse: Any

    def step(self, offset: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the step from the parameters, or from θ + v with the offset v.

        -(C + λI)⁻¹ Jᵀ(r̃ + J v)

        An inverse with ``solve_residual`` is given r̃ + J v rather than its image under Jᵀ.

        Args:
            offset: v, one tensor per parameter.
        """
        images = None if offset is None else self.linearized.jacobian @ list(offset)
        if self._knows_residual(self.inverse):
            residual = self.linearized.residual
            solution = self.inverse.solve_residual(_sum(residual, images))
        else:
            change = None if images is None else self.linearized.jacobian.adjoint() @ images
            solution = self.inverse @ _sum(self.gradient, change)
        return [-part for part in solution]

    def _knows_residual(self, inverse: Any) -> bool:
        """Whether the inverse's Jacobian is that of this loss: of this step, whole, in order."""
        if not offers(inverse, "solve_residual", "linearizations"):
            return False
        mine, theirs = self.linearized.linearizations, inverse.linearizations
        return len(mine) == len(theirs) and all(map(operator.is_, mine, theirs))


def _sum(tensors: Sequence[Tensor], others: Sequence[Tensor] | None) -> list[Tensor]:
    if others is None:
        return list(tensors)
    return [left + right for left, right in zip(tensors, others, strict=True)]


class Momentum(ABC):
    """What a direction takes over from the direction of the last step."""

    @abstractmethod
    def direction(self, descent: Descent, previous: Sequence[Tensor] | None) -> list[Tensor]:
        """Return the direction.

        Args:
            descent: The loss and the inverse.
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
        """Check the momentum."""
        _check(self.momentum)

    def direction(self, descent: Descent, previous: Sequence[Tensor] | None) -> list[Tensor]:
        step = descent.step()
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
        """Check the momentum."""
        _check(self.momentum)

    def direction(self, descent: Descent, previous: Sequence[Tensor] | None) -> list[Tensor]:
        if previous is None:
            return descent.step()
        kept = [self.momentum * old for old in previous]
        return [old.add_(part) for old, part in zip(kept, descent.step(kept), strict=True)]


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
        """Check the decay."""
        if not 0 <= self.decay <= 1:
            raise ValueError(f"The decay of a warm start must be in [0, 1], got {self.decay}.")

    def direction(self, descent: Descent, previous: Sequence[Tensor] | None) -> list[Tensor]:
        if previous is None or not offers(descent.inverse, "solve_from"):
            return descent.step()
        start = [-self.decay * old for old in previous]
        return [-part for part in descent.inverse.solve_from(descent.gradient, start)]
