"""How the damping changes from step to step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass


class DampingRule(ABC):
    """A rule for the damping λ, which starts at the inverse's own."""

    @property
    def retries(self) -> int:
        """How often a rejected step is tried again with the damping that ``rejected`` returns.

        With zero, a rejected update is halved instead.
        """
        return 0

    @abstractmethod
    def accepted(self, damping: float, ratio: float) -> float:
        """Return λ after a step that was taken.

        Args:
            damping: λ of the step.
            ratio: Actual over predicted decrease of the loss; NaN without a model.
        """

    @abstractmethod
    def rejected(self, damping: float) -> float:
        """Return λ after a step that raised the loss."""


@dataclass(frozen=True)
class ConstantDamping(DampingRule):
    """Always the damping of the inverse."""

    def accepted(self, damping: float, ratio: float) -> float:
        """Return the same damping."""
        return damping

    def rejected(self, damping: float) -> float:
        """Return the same damping."""
        return damping


@dataclass(frozen=True)
class LevenbergMarquardt(DampingRule):
    """Adapt the damping by how well the quadratic model predicted the decrease.

    ρ = (L(θ) - L(θ + v)) / (m(0) - m(v));  ρ > good: λ ← λ / shrink;  ρ < poor: λ ← λ · grow

    A step that raises the loss is tried again with λ · reject. ``QuadraticModel`` provides the
    prediction; with another step size, every accepted step counts as good.

    Args:
        shrink: Divisor after a good prediction, > 1.
        grow: Factor after a poor prediction, > 1.
        reject: Factor after a rejection, > 1.
        good: ρ from which on the model is trusted.
        poor: ρ below which it is not.
        minimum: Smallest λ.
        maximum: Largest λ.
        max_retries: How often a rejected step is tried again.

    Raises:
        ValueError: If a setting is out of range.

    Source: Martens and Grosse 2015, section 6.5; Nocedal and Wright 2006, section 10.3.
    """

    shrink: float = 3.0
    grow: float = 2.0
    reject: float = 8.0
    good: float = 0.75
    poor: float = 0.25
    minimum: float = 1e-16
    maximum: float = 1e8
    max_retries: int = 12

    def __post_init__(self) -> None:
        """Check the settings."""
        if not all(factor > 1 for factor in (self.shrink, self.grow, self.reject)):
            raise ValueError(
                "shrink, grow and reject must be greater than 1, got "
                f"{self.shrink}, {self.grow} and {self.reject}."
            )
        if not (self.poor <= self.good and 0 < self.minimum <= self.maximum < math.inf):
            raise ValueError(
                "Must hold: poor <= good and 0 < minimum <= maximum < inf, got "
                f"{self.poor}, {self.good}, {self.minimum}, {self.maximum}."
            )

        if self.max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, got {self.max_retries}.")

    @property
    def retries(self) -> int:
        """How often a rejected step is tried again."""
        return self.max_retries

    def accepted(self, damping: float, ratio: float) -> float:
        """Trust the model more, or less."""
        if math.isnan(ratio) or ratio > self.good:
            return self._bounded(damping / self.shrink)
        return self._bounded(damping * self.grow) if ratio < self.poor else damping

    def rejected(self, damping: float) -> float:
        """Trust the model much less."""
        return self._bounded(damping * self.reject)

    def _bounded(self, damping: float) -> float:
        return min(max(damping, self.minimum), self.maximum)
