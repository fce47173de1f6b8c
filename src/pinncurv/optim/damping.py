"""How the damping changes from step to step."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar

from pinncurv.optim.protocols import StepRecord


class DampingRule(ABC):
    """A rule for the damping λ, which starts at the inverse's own.

    No rule learns from a step that did not move the parameters.
    """

    needs_ratio: ClassVar[bool] = True
    """Whether ``accepted`` looks at ``record.ratio``, which may cost one more product with J."""

    adapts: ClassVar[bool] = True
    """Whether λ changes at all; else it stays what was asked for, though an inverse takes more."""

    needs_descent: ClassVar[bool] = False
    """Whether λ grows only where updates that raise the loss are shortened or rejected."""

    @property
    def retries(self) -> int:
        """How often a rejected step is tried again with the damping that ``rejected`` returns.

        With zero, a rejected update is halved instead.
        """
        return 0

    @abstractmethod
    def accepted(self, record: StepRecord) -> float:
        """Return λ after a step that was taken, from its record."""

    @abstractmethod
    def rejected(self, damping: float) -> float:
        """Return λ after a step that raised the loss."""

    def after(self, record: StepRecord) -> float:
        """Return λ after a step that moved the parameters, whether it was taken or rejected."""
        return self.accepted(record) if record.accepted else self.rejected(record.damping)


@dataclass(frozen=True)
class ConstantDamping(DampingRule):
    """Always the damping of the inverse."""

    needs_ratio = False
    adapts = False

    def accepted(self, record: StepRecord) -> float:
        return record.damping

    def rejected(self, damping: float) -> float:
        return damping


@dataclass(frozen=True)
class LevenbergMarquardt(DampingRule):
    """Adapt the damping by how well the quadratic model predicted the decrease.

    ρ = (L(θ) - L(θ + v)) / (m(0) - m(v));  ρ > good: λ ← λ / shrink;  ρ < poor: λ ← λ · grow

    A step that raises the loss is tried again with λ · reject. Here m is the damped model,
    m(v) = ½‖r̃ + J v‖² + ½ λ‖v‖², at the update v that was taken, whatever the curvature that led to
    it. Martens 2010 takes ``LevenbergMarquardt(shrink=1.5, grow=1.5, reject=1.5)``.

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
        if not all(factor > 1 for factor in (self.shrink, self.grow, self.reject)):
            raise ValueError(
                "shrink, grow and reject must be greater than 1, got "
                f"{self.shrink}, {self.grow} and {self.reject}."
            )
        if not self.poor <= self.good:
            raise ValueError(f"Must hold: poor <= good, got {self.poor}, {self.good}.")
        _check_bounds(self.minimum, self.maximum)
        if self.max_retries < 0:
            raise ValueError(f"max_retries must be at least 0, got {self.max_retries}.")

    @property
    def retries(self) -> int:
        return self.max_retries

    def accepted(self, record: StepRecord) -> float:
        if record.ratio > self.good:
            return _bounded(record.damping / self.shrink, self.minimum, self.maximum)
        if record.ratio < self.poor:
            return _bounded(record.damping * self.grow, self.minimum, self.maximum)
        return record.damping

    def rejected(self, damping: float) -> float:
        return _bounded(damping * self.reject, self.minimum, self.maximum)


@dataclass(frozen=True)
class ShortStepDamping(DampingRule):
    """Raise the damping when updates have to be shortened a lot, lower it when they need not be.

    s < short: λ ← λ · factor;  s ≥ long: λ ← λ / factor,  s the part of the update that was taken

    An update is halved until the loss falls, with any damping. The rule only steps in where that
    stalls: a part s of a Gauss-Newton step lowers the loss by no more than 2s of it. On wide
    networks ``ConstantDamping`` tends to be faster, on narrow ones it may not get anywhere.

    Args:
        factor: Factor and divisor, > 1; also the factor after a rejection.
        short: Below this part, λ grows.
        long: From this part on, λ shrinks.
        minimum: Smallest λ, > 0.
        maximum: Largest λ.

    Raises:
        ValueError: If a setting is out of range.
    """

    needs_ratio = False
    needs_descent = True
    factor: float = 10.0
    short: float = 2.0**-10
    long: float = 2.0**-3
    minimum: float = 1e-12
    maximum: float = 1e8

    def __post_init__(self) -> None:
        if not (self.factor > 1 and 0 < self.short <= self.long):
            raise ValueError(
                "Must hold: factor > 1 and 0 < short <= long, got "
                f"{self.factor}, {self.short}, {self.long}."
            )
        _check_bounds(self.minimum, self.maximum)

    def accepted(self, record: StepRecord) -> float:
        damping = record.damping
        if record.scale < self.short:
            return self.rejected(damping)
        shrinks = record.scale >= self.long
        return _bounded(damping / self.factor if shrinks else damping, self.minimum, self.maximum)

    def rejected(self, damping: float) -> float:
        return _bounded(damping * self.factor, self.minimum, self.maximum)


@dataclass(frozen=True)
class LossDamping(DampingRule):
    """A damping that follows the loss.

    λ = min(max(factor · L, minimum), maximum),  L the loss after the last step that was taken

    The first step has the damping of the inverse. After a step that raised the loss, λ is ten times
    what it was, within the bounds, until one is taken. It is meant for sums of squares: an energy
    may be negative, and its λ is then the minimum.

    Args:
        factor: λ / L, > 0.
        minimum: Smallest λ, > 0.
        maximum: Largest λ.

    Raises:
        ValueError: If a setting is out of range, or a loss is negative, as energies may be.

    Source: Yamashita and Fukushima 2001, with λ = ‖r̃‖² = 2 L, near a solution.
    """

    needs_ratio = False
    factor: float = 1.0
    minimum: float = 1e-12
    maximum: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor must be positive and finite, got {self.factor}.")
        _check_bounds(self.minimum, self.maximum)

    def accepted(self, record: StepRecord) -> float:
        if record.new_loss < 0:
            raise ValueError(
                "The loss that a damping follows must be a sum of squares, which falls to zero, "
                f"got {record.new_loss:.3g}, as of an Energy. Use LevenbergMarquardt()."
            )
        return _bounded(self.factor * record.new_loss, self.minimum, self.maximum)

    def rejected(self, damping: float) -> float:
        return _bounded(10 * damping, self.minimum, self.maximum)


def check_adaption(
    rule: DampingRule | None,
    step_size: Any,
    inverse: Any,
    max_halvings: int | None,
    monotone: bool,
) -> None:
    """Check that at most one part of an optimizer sets the damping, and that it can be set.

    Args:
        rule: The damping rule; None for a constant damping.
        step_size: The step size, which may set it, too.
        inverse: The damped inverse.
        max_halvings: How often to halve an update; None leaves that to the rule.
        monotone: Whether updates that raise the loss are rejected.

    Raises:
        TypeError: If the damping is to adapt but cannot be set.
        ValueError: If two parts set it, ``max_halvings`` is negative or would not act, or the rule
            acts on updates that are shortened or rejected and none is.
    """
    if max_halvings is not None and max_halvings < 0:
        raise ValueError(f"max_halvings must be at least 0, got {max_halvings}.")
    if max_halvings is not None and rule is not None and rule.retries:
        raise ValueError(
            "max_halvings must be left out with a damping rule that tries a rejected step "
            f"again with more damping instead, got {max_halvings} and {rule}. Give "
            "the rule no retries, for instance LevenbergMarquardt(max_retries=0)."
        )
    if (
        not monotone
        and rule is not None
        and (rule.retries or getattr(rule, "needs_descent", False))
    ):
        raise ValueError(
            "monotone must be True with a damping rule that acts where updates that raise the loss "
            f"are shortened or rejected, got {rule}. Take one that looks at the decrease, and does "
            "not retry, such as LevenbergMarquardt(max_retries=0)."
        )
    adapts, sets = rule is not None and rule.adapts, getattr(step_size, "sets_damping", False)
    if adapts and sets:
        raise ValueError(
            f"The damping must be set by one part, got the step size {step_size} and the "
            f"damping rule {rule}. Leave the rule out."
        )
    if (adapts or sets) and not (
        is_dataclass(inverse) and "damping" in {field.name for field in fields(inverse)}
    ):
        raise TypeError(
            "With a damping that adapts, the inverse must be a dataclass with a field damping, "
            f"got {type(inverse).__name__}. Take one that has, such as Damped(1e-3), or decorate "
            "your own with @dataclass(frozen=True)."
        )


def _check_bounds(minimum: float, maximum: float) -> None:
    if not 0 < minimum <= maximum < math.inf:
        raise ValueError(f"Must hold: 0 < minimum <= maximum < inf, got {minimum}, {maximum}.")


def _bounded(damping: float, minimum: float, maximum: float) -> float:
    return min(max(damping, minimum), maximum)
