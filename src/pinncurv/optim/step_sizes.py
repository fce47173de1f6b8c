"""Where a step starts, and how far to go along a direction."""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from pinncurv.linops import all_finite
from pinncurv.optim.protocols import LinearizedLoss, offers

# How far along the velocity of a path its residual is looked at.
_PROBE = 0.1
_TINY = 1e-300


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


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the inner product of two lists of tensors."""
    return float(torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum())


def damping_of(inverse: Any, damping: float) -> float:
    """Return the damping that an inverse was built with, if it took more than was asked for."""
    taken = getattr(inverse, "damping", damping)
    return max(damping, taken) if isinstance(taken, float) else damping


def _sum(left: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(left, right, strict=True)]


@dataclass(frozen=True)
class Proposal:
    """An update α Δ + μ δ.

    Args:
        step_size: α.
        momentum: μ.
        predicted_decrease: What a model promises; NaN without one.
        new_loss: L after the update if it was evaluated; NaN otherwise.
        direction: What to take in place of Δ, if not None.
        damping: λ of that direction, if it is another one.
        next_damping: λ of the next step; None leaves that to the damping rule.
        scale: Which part this is of the longest update that was thought of.
    """

    step_size: float
    momentum: float = 0.0
    predicted_decrease: float = math.nan
    new_loss: float = math.nan
    direction: Sequence[Tensor] | None = None
    damping: float | None = None
    next_damping: float | None = None
    scale: float = 1.0


class StepSize(ABC):
    """A rule for the step size."""

    sets_damping: ClassVar[bool] = False
    """Whether its proposals set the damping of the next step, so that the inverse must have one."""

    @abstractmethod
    def propose(self, situation: Situation) -> Proposal:
        """Propose an update."""


@dataclass(frozen=True)
class FixedStep(StepSize):
    """Always the same step size; the group's ``lr`` multiplies it.

    Args:
        step_size: α > 0.
    """

    step_size: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step_size) and self.step_size > 0):
            raise ValueError(f"step_size must be finite and positive, got {self.step_size}.")

    def propose(self, situation: Situation) -> Proposal:
        return Proposal(self.step_size)


@dataclass(frozen=True)
class NormConstrained(StepSize):
    """A fixed step size, less where the update would be longer than allowed.

    α = min(η, c / ‖Δ‖),  so that  ‖α Δ‖ <= c

    The norm is the Euclidean norm over all parameters, without the groups' ``lr``. SPRING's
    papers bound the squared norm by a constant C instead: c = √C.

    Args:
        step_size: η > 0.
        norm: c > 0, the greatest length of an update.

    Source: Goldshlager, Abrahamsen, Lin 2024 (SPRING).
    """

    step_size: float
    norm: float

    def __post_init__(self) -> None:
        for name, value in (("step_size", self.step_size), ("norm", self.norm)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be finite and positive, got {value}.")

    def propose(self, situation: Situation) -> Proposal:
        norms = [torch.linalg.vector_norm(part) for part in situation.direction]
        length = float(torch.linalg.vector_norm(torch.stack(norms)))
        return Proposal(min(self.step_size, self.norm / length) if length else self.step_size)


@dataclass(frozen=True)
class GridLineSearch(StepSize):
    """The best step size of a grid, by evaluating the loss without a graph.

    α = argmin_{k = first, ..., last} L(θ + 2^k Δ)

    Args:
        first: Smallest exponent.
        last: Largest exponent.

    Source: Müller and Zeinhofer 2023 (ENGD); Dangel, Müller, Zeinhofer 2024, section 3.3.
    """

    first: int = -30
    last: int = 0

    def __post_init__(self) -> None:
        if self.first > self.last:
            raise ValueError(f"first must be at most last, got {self.first} and {self.last}.")

    def propose(self, situation: Situation) -> Proposal:
        losses = {
            2.0**k: situation.try_update(situation.direction, 2.0**k)
            for k in range(self.last, self.first - 1, -1)
        }
        finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            return Proposal(2.0**self.first, new_loss=math.nan, scale=2.0**self.first)
        best = min(finite, key=finite.__getitem__)
        return Proposal(best, new_loss=finite[best], scale=best)


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
    minimum: float = 1e-20

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
        for attempt in range(self.tries):
            velocity = list(at.direction) or at.step()
            taken = at.rated(velocity)
            image = at.linearized.jacobian @ list(taken)
            bend = at.acceleration(taken, image) if self.accelerate else None
            best = self._search(at, velocity, bend, image)
            if bend is not None:
                bent = math.sqrt(dot(bend, bend) / max(dot(velocity, velocity), _TINY))
            enough = at.loss - best.new_loss > self.sufficient * best.predicted_decrease > 0
            if enough and best.scale >= self.shortest / (2 if attempt else 1):
                break
            resolved = torch.finfo(velocity[0].dtype).eps * abs(at.loss)
            if abs(best.predicted_decrease) <= resolved:  # no damping makes that visible
                break
            more = max(at.damping, self.minimum) * self.factor
            lowest = best if best.new_loss < lowest.new_loss else lowest
            if at.invert is None or attempt == self.tries - 1:
                chosen = lowest if lowest.new_loss < at.loss else best
                return replace(chosen, next_damping=more)
            at = replace(at.damped(more), start=1.0)
        calm = attempt == 0 and best.scale * bent < self.calm
        lower = best.scale >= self.longest or calm
        less = min(at.damping, max(self.minimum, at.damping / self.factor))
        return replace(best, next_damping=less if lower else at.damping)

    def _search(
        self,
        at: Situation,
        velocity: list[Tensor],
        bend: list[Tensor] | None,
        image: Sequence[Tensor],
    ) -> Proposal:
        """Return the first τ, downwards, after which the loss rises again."""
        r, curvature, share = at.linearized.residual, dot(image, image), 1.0
        slope = dot(at.gradient, at.rated(velocity)) if r is None else dot(r, image)
        if r is not None:  # the model may be of some points only
            batch = 0.5 * dot(r, r)
            share = at.loss / batch if batch else 0.0
        best, tau = Proposal(0.0, new_loss=math.inf), max(at.start, self.shortest)
        while tau >= self.shortest / 4:
            chosen = velocity
            if bend is not None:
                chosen = [v.add(a, alpha=0.5 * tau) for v, a in zip(velocity, bend, strict=True)]
            loss = at.try_update(at.rated(chosen), tau)
            if loss < best.new_loss or best.direction is None:
                predicted = -share * (tau * slope + 0.5 * tau**2 * curvature)
                loss = loss if math.isfinite(loss) else math.inf
                best = Proposal(tau, 0.0, predicted, loss, chosen, at.damping, scale=tau)
            elif best.new_loss < at.loss:
                break
            tau /= 2
        return best


@dataclass(frozen=True)
class CGBacktracking(StepSize):
    """Go back over the iterates of conjugate gradients while the loss falls.

    Δ = -x_k,  k = the last kept iterate before the loss at the previous one is no lower

    The inverse must keep its iterates (``spacing=1.3``). They replace the direction, so that no
    momentum but ``WarmStart`` makes a difference. The decrease that is promised is that of the
    damped model at the iterate, -φ(x_k) = -∇LᵀΔ - ½ Δᵀ(C + λI)Δ, which costs nothing.

    Source: Martens 2010, section 4.6.
    """

    def propose(self, situation: Situation) -> Proposal:
        """Evaluate the loss from the last iterate backwards.

        Raises:
            TypeError: If the inverse has no iterates.
        """
        inverse = situation.inverse
        if not offers(inverse, "last_results") or len(inverse.last_results) != 1:
            raise TypeError(
                "CGBacktracking needs an inverse that iterates, such as "
                f"pinncurv.linops.CGInverseLinearOperator, got {type(inverse).__name__}. "
                "Choose another inverse or another step size."
            )
        chosen, best = Proposal(math.nan), math.nan
        for iterate in reversed(inverse.last_results[0].iterates):
            update = _negative_parts(iterate.solution, situation.gradient)
            loss = situation.try_update(update, 1.0)
            if math.isfinite(best) and not loss < best:
                break
            chosen, best = Proposal(1.0, 0.0, -iterate.value, loss, update), loss
        return chosen


def _negative_parts(vector: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Cut -vector into tensors of the shapes and dtypes of parameters."""
    parts = vector.split([parameter.numel() for parameter in parameters])
    return [-part.view_as(p).to(p) for part, p in zip(parts, parameters, strict=True)]


@dataclass(frozen=True)
class QuadraticModel(StepSize):
    """Step size and momentum that minimize the exact quadratic model of the damped loss.

    min_{α, μ}  m(αΔ + μδ),  m(v) = ½‖r̃ + J v‖² + ½ λ‖v‖²

    Two products with the Jacobian, no further pass. The first step has no previous update and
    chooses α alone.

    Args:
        use_momentum: Whether to take part of the previous update at all.

    Source: Martens and Grosse 2015, section 7.
    """

    use_momentum: bool = True

    def propose(self, situation: Situation) -> Proposal:
        directions = [situation.direction]
        if self.use_momentum and situation.previous is not None:
            directions.append(situation.previous)
        gradient = torch.cat([part.flatten() for part in situation.gradient])
        V = torch.stack([torch.cat([p.flatten() for p in parts]) for parts in directions], 1)
        images = situation.linearized.jacobian @ V
        M = images.t() @ images + situation.damping * (V.t() @ V)
        coefficients, decrease = minimize_quadratic(M.tolist(), (V.t() @ gradient).tolist())
        momentum = coefficients[1] if len(coefficients) > 1 else 0.0
        return Proposal(coefficients[0], momentum, decrease)


def minimize_quadratic(M: list[list[float]], b: list[float]) -> tuple[list[float], float]:
    """Minimize ½ cᵀ M c + bᵀ c for a positive semidefinite M of one or two rows.

    With both directions scaled to one, M becomes [[1, ρ], [ρ, 1]] with eigenvalues 1 ± ρ and
    eigenvectors (1, ±1) / √2. What is numerically dependent is dropped, so that a previous update
    parallel to the direction does no harm.

    Args:
        M: The matrix.
        b: The linear term.
    """
    if not all(math.isfinite(entry) for row in [*M, b] for entry in row):
        return [math.nan] * len(b), math.nan
    scale = [1 / math.sqrt(row[i]) if row[i] > 0 else 0.0 for i, row in enumerate(M)]
    scaled = [-s * entry for s, entry in zip(scale, b, strict=True)]
    if len(b) == 1:
        return [scale[0] * scaled[0]], 0.5 * scaled[0] ** 2
    rho = min(1.0, max(-1.0, M[0][1] * scale[0] * scale[1]))
    solution, decrease = [0.0, 0.0], 0.0
    for sign in (1.0, -1.0):
        eigenvalue = 1 + sign * rho
        if eigenvalue > 1e-14:
            projection = (scaled[0] + sign * scaled[1]) / 2
            solution[0] += projection / eigenvalue
            solution[1] += sign * projection / eigenvalue
            decrease += projection**2 / eigenvalue
    return [s * c for s, c in zip(scale, solution, strict=True)], decrease
