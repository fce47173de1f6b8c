"""How far to go along a direction."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pinncurv.linops import read
from pinncurv.optim.protocols import offers
from pinncurv.optim.situation import Situation, dot, share_of


@dataclass(frozen=True)
class Proposal:
    """An update α Δ + μ δ.

    Args:
        step_size: α.
        momentum: μ.
        predicted_decrease: What a model promises for the points that are linearized; NaN without
            one.
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

    α = argmin_{k = first, ..., last} L(θ + 2^k Δ),  Δ times the groups' ``lr``

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
        direction = situation.rated(situation.direction)
        losses = {
            2.0**k: situation.try_update(direction, 2.0**k)
            for k in range(self.last, self.first - 1, -1)
        }
        finite = {step: loss for step, loss in losses.items() if math.isfinite(loss)}
        if not finite:
            return Proposal(2.0**self.first, new_loss=math.nan, scale=2.0**self.first)
        best = min(finite, key=finite.__getitem__)
        return Proposal(best, new_loss=finite[best], scale=best)


@dataclass(frozen=True)
class ArmijoLineSearch(StepSize):
    """The longest of ever shorter steps that falls by a share of what the slope promises.

    α = βᵏ for the least k with L(θ + βᵏ Δ) <= L(θ) + c βᵏ ∇LᵀΔ,  Δ times the groups' ``lr``

    If none of the trials does, the last one is proposed.

    Args:
        factor: β in (0, 1).
        decrease: c in [0, 1).
        trials: How many losses are evaluated at most, at least one.

    Source: Armijo 1966; Martens 2010, section 4.6, for β = 0.8, c = 0.01 and 60 trials.
    """

    factor: float = 0.8
    decrease: float = 0.01
    trials: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must be in (0, 1), got {self.factor}.")
        if not 0 <= self.decrease < 1:
            raise ValueError(f"decrease must be in [0, 1), got {self.decrease}.")
        if not (isinstance(self.trials, int) and self.trials >= 1):
            raise ValueError(f"trials must be a whole number >= 1, got {self.trials}.")
        if not self.factor ** (self.trials - 1) > 0:
            raise ValueError(
                "factor must not vanish in as many powers as there are trials, got "
                f"{self.factor} and {self.trials}."
            )

    def propose(self, situation: Situation) -> Proposal:
        direction = situation.rated(situation.direction)
        promised = max(0.0, -dot(situation.gradient, direction) * share_of(situation.linearized))
        step, loss = 1.0, math.nan
        for k in range(self.trials):
            step = self.factor**k
            loss = situation.try_update(direction, step)
            if math.isfinite(loss) and loss <= situation.loss - self.decrease * step * promised:
                break
        return Proposal(step, new_loss=loss, scale=step)


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
        columns = [torch.stack(parts, -1) for parts in zip(*directions, strict=True)]
        M = situation.damping * (V.t() @ V)
        for image in situation.linearized.jacobian @ columns:  # of each term: all would be a copy
            rows = image.flatten(0, -2)
            M = M + rows.t() @ rows
        entries, b = read(M, V.t() @ gradient)
        rows = [entries[i : i + len(b)] for i in range(0, len(entries), len(b))]
        coefficients, decrease = minimize_quadratic(rows, b)
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
