"""Where a step starts: all that its direction and its length may be chosen by."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pinncurv.linops import all_finite, read
from pinncurv.optim.protocols import LinearizedLoss

# How far along the velocity of a path its residual is looked at.
_PROBE = 0.1


@dataclass(frozen=True, eq=False)
class Situation:
    """All that a momentum and a step size may look at.

    Args:
        linearized: The loss, linearized at the current parameters.
        gradient: ∇L.
        inverse: (C + λI)⁻¹.
        damping: λ.
        previous: δ, the previous update, or None.
        direction: Δ, one tensor per parameter; empty while it is looked for.
        try_update: Evaluates L on the same batch with a multiple of an update added, and restores.
        residual_at: Evaluates r̃ there in the same way; None if the loss does not offer that.
        invert: Returns the inverse with another damping.
        start: The part of its proposal that the last step took, or somewhat more.
        rates: The groups' ``lr``, one per parameter; empty where all are one.
    """

    linearized: LinearizedLoss
    gradient: Sequence[Tensor]
    inverse: Any = None
    damping: float = math.nan
    previous: Sequence[Tensor] | None = None
    direction: Sequence[Tensor] = ()
    try_update: Callable[[Sequence[Tensor], float], float] = lambda update, scale: math.nan
    residual_at: Callable[[Sequence[Tensor], float], Sequence[Tensor]] | None = None
    invert: Callable[[float], Any] | None = None
    start: float = 1.0
    rates: Sequence[float] = ()

    @property
    def loss(self) -> float:
        """L at the current parameters."""
        return sum(self.linearized.term_losses.values())

    def step(self, offset: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the preconditioned step from the parameters, or from θ + v with the offset v.

        -(C + λI)⁻¹ Jᵀ(r̃ + J v)

        An inverse with ``solve_residual``, whose Jacobian is that of this loss, is given r̃ + J v
        rather than its image under Jᵀ, if there is a residual.

        Args:
            offset: v, one tensor per parameter.
        """
        residual = self.linearized.residual
        if offset is None:
            return self._solve(residual, self.gradient)
        images = self.linearized.jacobian @ list(offset)
        if residual is None:
            curved = self.linearized.jacobian.adjoint() @ images
            return self._solve(None, _sum(self.gradient, curved))
        return self._solve(_sum(residual, images), None)

    def rated(self, update: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return an update times the groups' ``lr``, as the optimizer takes it."""
        if not self.rates:
            return update
        return [rate * part for rate, part in zip(self.rates, update, strict=True)]

    def acceleration(self, v: Sequence[Tensor], image: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the second derivative of the path along which r̃ would fall in a straight line.

        a = -(C + λI)⁻¹ Jᵀ r̃_vv,  r̃_vv = 2/h ((r̃(θ + hv) - r̃(θ)) / h - J v)

        Args:
            v: The velocity of the path at θ.
            image: J v.

        Returns:
            a, None where the residual can't be evaluated or is not finite.

        Source: Transtrum and Sethna 2012 (geodesic acceleration), with h = 0.1 as there.
        """
        residual = None if self.residual_at is None else self.linearized.residual
        if self.residual_at is None or residual is None:
            return None
        there, h = self.residual_at(v, _PROBE), _PROBE
        curve = [
            2 / h * ((new - old) / h - slope)
            for new, old, slope in zip(there, residual, image, strict=True)
        ]
        return self._solve(curve, None) if all_finite(curve) else None

    def damped(self, damping: float) -> Situation:
        """Return the situation with another damping, or more than that if it is not resolved."""
        assert self.invert is not None
        inverse = self.invert(damping)
        return replace(self, inverse=inverse, damping=damping_of(inverse, damping), direction=())

    def _solve(self, u: Sequence[Tensor] | None, gradient: Sequence[Tensor] | None) -> list[Tensor]:
        """Return -(C + λI)⁻¹ Jᵀu, given u or Jᵀu or both."""
        solve: Any = getattr(self.inverse, "solve_residual", None)
        known = getattr(self.inverse, "linearizations", ())
        if u is not None and solve is not None and self._knows(known):
            return [-part for part in solve(list(u))]
        if gradient is None:
            assert u is not None
            gradient = self.linearized.jacobian.adjoint() @ list(u)
        return [-part for part in self.inverse @ list(gradient)]

    def _knows(self, linearizations: Sequence[Any]) -> bool:
        """Whether an inverse was built from these of this step, all and in order."""
        mine = self.linearized.linearizations
        return len(mine) == len(linearizations) and all(map(operator.is_, mine, linearizations))

    def promise(self, v: Sequence[Tensor], linearized: LinearizedLoss) -> float:
        """Return the decrease that the damped quadratic model promises, by one product with J.

        m(0) - m(v) = -∇Lᵀv - ½ vᵀ(JᵀJ + λI)v

        Args:
            v: The update.
            linearized: The linearization, which may be another one of the same point.
        """
        image = linearized.jacobian @ list(v)
        return -dot(self.gradient, v) - 0.5 * (dot(image, image) + self.damping * dot(v, v))


def share_of(linearized: LinearizedLoss) -> float:
    """Return the factor from decreases of the points that are linearized to those of the loss.

    L / ½‖r̃‖²,  one where all points are linearized
    """
    residual = linearized.residual if getattr(linearized, "of_some", False) else None
    if residual is None:
        return 1.0
    batch = 0.5 * dot(residual, residual)
    return sum(linearized.term_losses.values()) / batch if batch else 0.0


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors."""
    products = [(a * b).sum() for a, b in zip(left, right, strict=True)]
    return read(torch.stack(products).sum())[0][0]


def damping_of(inverse: Any, damping: float) -> float:
    """Return the damping that an inverse was built with, if it took more than was asked for."""
    taken = getattr(inverse, "damping", damping)
    return max(damping, taken) if isinstance(taken, float) else damping


def _sum(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(left, right, strict=True)]
