"""A step along the curve on which all of the residual falls alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pinncurv.optim.situation import Situation, dot, share_of
from pinncurv.optim.step_sizes import Proposal, StepSize

_TINY = 1e-300


@dataclass(frozen=True)
class GeodesicFlow(StepSize):
    """A step along the curve on which all of the residual falls alike, as far as the loss does.

    θ(τ) = θ + τ v + ½ τ² a,  v = -(C + λI)⁻¹∇L,  a = -(C + λI)⁻¹ Jᵀ r̃_vv

    With the exact matrix and a small λ, r̃(θ(τ)) ≈ (1 - τ) r̃ in all directions that λ leaves, large
    and small: a method that takes the greatest decrease in every step reduces the large ones first
    and then crawls. The curve bends with the residual, so that it may be followed several times as
    far as its tangent. τ is looked for downwards from two to four times that of the last step. If
    even the shortest one does not decrease the loss as it should, the damping is raised in the same
    step, for the next one where the linearization is not kept. It is lowered for the next one if τ
    was long, or the curve nearly straight as far as it was followed, τ ‖a‖ < calm ‖v‖: then what
    makes steps short is no lack of damping.

    Costs a solve and a residual more than a step along v, and one loss per τ.

    Args:
        shortest: τ below which the damping is raised, half of that after it was.
        longest: τ from which on it is lowered.
        calm: τ ‖a‖ / ‖v‖ below which it is lowered, too.
        factor: By which it is raised and lowered.
        sufficient: Which part of the decrease that is predicted is one.
        tries: How many dampings are tried.
        accelerate: Whether to follow the curve, not its tangent.
        minimum: Smallest λ that it is lowered to.

    Source: Transtrum and Sethna 2012 (geodesic acceleration) on the flow of Newton's method,
    Deuflhard 2011, section 3.
    """

    shortest: float = 2.0**-4
    longest: float = 2.0**-2
    calm: float = 0.25
    factor: float = 10.0
    sufficient: float = 0.1
    tries: int = 12
    accelerate: bool = True
    minimum: float = 1e-30

    sets_damping = True

    def __post_init__(self) -> None:
        within = 0 < self.shortest <= 1 and self.factor > 1 and self.tries >= 1
        within = within and self.longest > 0 and self.calm >= 0 and 0 <= self.sufficient < 1
        if not (within and self.minimum > 0):
            raise ValueError(
                "Must hold: 0 < shortest <= 1, factor > 1, tries >= 1, minimum > 0, longest > 0, "
                f"calm >= 0 and 0 <= sufficient < 1, got {self}."
            )

    def propose(self, situation: Situation) -> Proposal:
        at, bent = situation, math.inf
        best = lowest = Proposal(0.0, new_loss=math.inf)
        share = share_of(at.linearized)
        for attempt in range(self.tries):
            velocity = list(at.direction) or at.step()
            taken = at.rated(velocity)
            image = at.linearized.jacobian @ list(taken)
            bend = at.acceleration(taken, image) if self.accelerate else None
            best = self._search(at, velocity, bend, image)
            if bend is not None:
                bent = math.sqrt(dot(bend, bend) / max(dot(velocity, velocity), _TINY))
            promised = share * best.predicted_decrease
            enough = at.loss - best.new_loss > self.sufficient * promised > 0
            if enough and best.scale >= self.shortest / (2 if attempt else 1):
                break
            resolved = torch.finfo(velocity[0].dtype).eps * abs(at.loss)
            if abs(promised) <= resolved:  # no damping makes that visible
                break
            more = max(at.damping, self.minimum) * self.factor
            lowest = best if best.new_loss < lowest.new_loss else lowest
            in_vain = attempt >= 2 and self._serves_its_points(at, best)
            if at.invert is None or attempt == self.tries - 1 or in_vain:
                chosen = lowest if lowest.new_loss < at.loss else best
                return replace(chosen, next_damping=more)
            at = replace(at.damped(more), start=1.0)
        calm = attempt == 0 and best.scale * bent < self.calm
        lower = best.scale >= self.longest or calm
        less = min(at.damping, max(self.minimum, at.damping / self.factor))
        return replace(best, next_damping=less if lower else at.damping)

    def _serves_its_points(self, at: Situation, proposal: Proposal) -> bool:
        """Whether a step is good for the points it was made of, which are not all: too few."""
        r, direction = at.linearized.residual, proposal.direction
        of_some = getattr(at.linearized, "of_some", False)
        if r is None or direction is None or at.residual_at is None or not of_some:
            return False
        there = at.residual_at(at.rated(direction), proposal.step_size)
        decrease = 0.5 * (dot(r, r) - dot(there, there))
        return decrease > self.sufficient * proposal.predicted_decrease > 0

    def _search(
        self,
        at: Situation,
        velocity: list[Tensor],
        bend: list[Tensor] | None,
        image: Sequence[Tensor],
    ) -> Proposal:
        """Return the first τ, downwards, after which the loss rises again."""
        r, curvature = at.linearized.residual, dot(image, image)
        slope = dot(at.gradient, at.rated(velocity)) if r is None else dot(r, image)
        best, tau = Proposal(0.0, new_loss=math.inf), max(at.start, self.shortest)
        while tau >= self.shortest / 4:
            chosen = velocity
            if bend is not None:
                chosen = [v.add(a, alpha=0.5 * tau) for v, a in zip(velocity, bend, strict=True)]
            loss = at.try_update(at.rated(chosen), tau)
            if loss < best.new_loss or best.direction is None:
                predicted = -tau * slope - 0.5 * tau**2 * curvature
                loss = loss if math.isfinite(loss) else math.inf
                best = Proposal(tau, 0.0, predicted, loss, chosen, at.damping, scale=tau)
            elif best.new_loss < at.loss:
                break
            tau /= 2
        return best
