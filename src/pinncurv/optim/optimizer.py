"""The optimizer: a curvature, its inverse, a step size and a momentum, composed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from curvlinops._torch_base import PyTorchLinearOperator
from torch import Tensor
from torch.optim import Optimizer

from pinncurv.linops import Averageable
from pinncurv.optim.averaging import ExponentialAverage
from pinncurv.optim.protocols import (
    Curvature,
    Inverse,
    LeastSquares,
    LinearizedLoss,
    StepRecord,
    finite_loss,
)
from pinncurv.optim.step_sizes import Proposal, QuadraticModel, Situation, StepSize

# The key of the state that belongs to no single parameter.
_SHARED = "curvature"


@dataclass(frozen=True)
class HeavyBall:
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
        if not 0 <= self.momentum < 1:
            raise ValueError(f"The momentum must be in [0, 1), got {self.momentum}.")


@dataclass(frozen=True)
class Intervals:
    """How many steps pass between two refreshments.

    Args:
        curvature: Steps between two estimates of the curvature.
        inverse: Steps between two inversions.

    Raises:
        ValueError: If an interval is less than one.
    """

    curvature: int = 1
    inverse: int = 1

    def __post_init__(self) -> None:
        """Check the intervals."""
        if min(self.curvature, self.inverse) < 1:
            raise ValueError(
                f"Intervals must be at least 1, got {self.curvature} for the curvature and "
                f"{self.inverse} for the inverse. 1 refreshes in every step."
            )


class CurvatureOptimizer(Optimizer):
    """Preconditioned gradient descent with any curvature operator.

    θ ← θ + lr (α Δ + μ δ),  Δ = -(C + λI)⁻¹ ∇L,  δ the previous update

    Every step sees one batch: loss, gradient, curvature and line search all come from the
    objective that is passed to ``step``. An update that raises the loss or makes it non-finite is
    halved a few times and then rejected, with the parameters restored.

    Args:
        params: Parameters or parameter groups; ``lr`` (default 1) multiplies a group's update.
        curvature: Builds the operator C from the objective's linearizations.
        inverse: Builds the damped inverse from C.
        step_size: How far to go.
        average: Exponential moving average of the operator's tensors, or None.
        momentum: Momentum on the direction, or None. The quadratic model brings its own.
        intervals: How often curvature and inverse are refreshed.
        max_halvings: How often an update that raises the loss is halved before it is rejected.
        lr: Default for the groups' ``lr``.

    Raises:
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        curvature: Curvature,
        inverse: Inverse,
        step_size: StepSize | None = None,
        average: ExponentialAverage | None = None,
        momentum: HeavyBall | None = None,
        intervals: Intervals | None = None,
        max_halvings: int = 10,
        lr: float = 1.0,
    ) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be finite and positive, got {lr}.")
        if max_halvings < 0:
            raise ValueError(f"max_halvings must be at least 0, got {max_halvings}.")
        super().__init__(params, {"lr": lr})
        self.curvature = curvature
        self.inverse = inverse
        self.step_size = QuadraticModel() if step_size is None else step_size
        self.average = average
        self.momentum = momentum
        self.intervals = Intervals() if intervals is None else intervals
        self.max_halvings = max_halvings
        self._operator: PyTorchLinearOperator | None = None
        self._inverse: PyTorchLinearOperator | None = None
        self.state[_SHARED] = {"step": 0, "average": None, "inverted": None}  # type: ignore[index]
        self._parameters = [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, objective: LeastSquares) -> StepRecord:  # type: ignore[override]
        """Take one step on one batch.

        Args:
            objective: The loss on this batch.

        Returns:
            What happened.

        Raises:
            FloatingPointError: If the loss is not finite before the step; names the terms.
            ValueError: If the objective's parameters are not those of the optimizer.
        """
        linearized = objective.linearize()
        self._check_parameters(linearized)
        self._refresh(linearized)
        assert self._inverse is not None
        gradient = linearized.gradient()
        loss = finite_loss(linearized.term_losses)
        direction = [-part for part in self._inverse @ gradient]  # type: ignore[union-attr]
        direction = self._with_momentum(linearized.parameters, direction)
        situation = Situation(
            loss,
            linearized,
            gradient,
            direction,
            self._remembered(linearized.parameters, "previous_update"),
            self.inverse.damping,
            _Trial(objective, linearized.parameters),
        )
        record = self._take(objective, situation, self.step_size.propose(situation))
        self.state[_SHARED]["step"] += 1
        return record

    def _check_parameters(self, linearized: LinearizedLoss) -> None:
        """Check that objective and optimizer agree on what is trained."""
        mine = {id(parameter) for parameter in self._parameters}
        theirs = {id(parameter) for parameter in linearized.parameters}
        if mine != theirs:
            raise ValueError(
                "The optimizer must have exactly the parameters of the objective that require a "
                f"gradient, got {len(mine - theirs)} that the objective lacks and lacks "
                f"{len(theirs - mine)} of the objective's. Build the optimizer from "
                "model.parameters() of the same model."
            )

    def _refresh(self, linearized: LinearizedLoss) -> None:
        """Estimate, average and invert the curvature, as often as the intervals say."""
        shared = self.state[_SHARED]
        step = shared["step"]
        if self._operator is None or step % self.intervals.curvature == 0:
            self._operator = self._estimate(linearized, step % self.intervals.curvature == 0)
        if step % self.intervals.inverse == 0:
            self._inverse = self.inverse(self._operator)
            if self.intervals.inverse > 1 and isinstance(self._operator, Averageable):
                shared["inverted"] = self._operator.tensors()
        elif self._inverse is None:  # after loading a state between two inversions
            operator: Any = self._operator
            if shared["inverted"] is not None:
                operator = operator.with_tensors(_on(operator, shared["inverted"]))
            self._inverse = self.inverse(operator)

    def _estimate(self, linearized: LinearizedLoss, due: bool) -> PyTorchLinearOperator:
        """Return the operator: a new estimate if due, else the one that was saved."""
        shared = self.state[_SHARED]
        operator = self.curvature(linearized.linearizations)
        if not isinstance(operator, Averageable):
            if self.average is not None:
                raise TypeError(
                    "An average needs an operator with the methods tensors, with_tensors and "
                    f"identity, got {type(operator).__name__}. Pass average=None."
                )
            return operator
        if due and self.average is not None:
            shared["average"] = self.average.update(operator, shared["average"])
        elif due and self.intervals.curvature > 1:
            shared["average"] = operator.tensors()
        if shared["average"] is None:
            return operator
        return operator.with_tensors(_on(operator, shared["average"]))

    def _with_momentum(self, parameters: Sequence[Tensor], direction: list[Tensor]) -> list[Tensor]:
        """Add the momentum buffer to the direction, and remember the sum."""
        if self.momentum is None:
            return direction
        buffer = self._remembered(parameters, "momentum_buffer")
        if buffer is not None:
            direction = [
                part + self.momentum.momentum * old
                for part, old in zip(direction, buffer, strict=True)
            ]
        self._remember(parameters, "momentum_buffer", direction)
        return direction

    def _remembered(self, parameters: Sequence[Tensor], key: str) -> list[Tensor] | None:
        """Return what is remembered of each parameter, on its device; None at the start."""
        known = [self.state[parameter].get(key) for parameter in parameters]
        if any(tensor is None for tensor in known):
            return None
        return [tensor.to(p) for tensor, p in zip(known, parameters, strict=True)]

    def _remember(
        self, parameters: Sequence[Tensor], key: str, tensors: Sequence[Tensor] | None
    ) -> None:
        """Remember one tensor per parameter, or forget them."""
        for i, parameter in enumerate(parameters):
            if tensors is None:
                self.state[parameter].pop(key, None)
            else:
                self.state[parameter][key] = tensors[i]

    def _take(
        self, objective: LeastSquares, situation: Situation, proposal: Proposal
    ) -> StepRecord:
        """Apply a proposed update; shorten it while the loss rises, or reject it."""
        parameters = situation.linearized.parameters
        update = self._update(situation, proposal)
        trial, scale, new_loss = situation.try_update, 1.0, math.nan
        for halving in range(self.max_halvings + 1):
            scale = 0.5**halving
            new_loss = trial(update, scale)
            if new_loss <= situation.loss:  # False for NaN
                break
        accepted = new_loss <= situation.loss
        if accepted:
            update = [scale * part for part in update] if scale < 1 else update
            for parameter, part in zip(parameters, update, strict=True):
                parameter.add_(part)
            self._remember(parameters, "previous_update", update)
        else:
            self._remember(parameters, "previous_update", None)
            self._remember(parameters, "momentum_buffer", None)
        return StepRecord(
            loss=situation.loss,
            term_losses=dict(situation.linearized.term_losses),
            new_loss=new_loss if accepted else situation.loss,
            step_size=proposal.step_size * scale if accepted else 0.0,
            momentum=proposal.momentum * scale if accepted else 0.0,
            damping=situation.damping,
            predicted_decrease=proposal.predicted_decrease,
            accepted=accepted,
            reason=_reason(accepted, scale, new_loss),
            solver=_solver_report(self._inverse),
        )

    def _update(self, situation: Situation, proposal: Proposal) -> list[Tensor]:
        """Return lr (α Δ + μ δ)."""
        rates = {id(p): group["lr"] for group in self.param_groups for p in group["params"]}
        previous = situation.previous
        update = []
        for i, parameter in enumerate(situation.linearized.parameters):
            part = proposal.step_size * situation.direction[i]
            if previous is not None and proposal.momentum:
                part.add_(previous[i], alpha=proposal.momentum)
            rate = float(rates[id(parameter)])
            update.append(part if rate == 1 else rate * part)
        return update

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; operators and inverses are rebuilt from it at the next step."""
        super().load_state_dict(state_dict)
        self.state.setdefault(_SHARED, {"step": 0, "average": None, "inverted": None})
        self._parameters = [p for group in self.param_groups for p in group["params"]]
        self._operator = self._inverse = None


class _Trial:
    """Evaluates the loss with an update added to the parameters, and restores them."""

    def __init__(self, objective: LeastSquares, parameters: Sequence[Tensor]) -> None:
        self._objective = objective
        self._parameters = parameters

    @torch.no_grad()
    def __call__(self, update: Sequence[Tensor], scale: float) -> float:
        """Return L(θ + scale · update)."""
        saved = [parameter.clone() for parameter in self._parameters]
        try:
            for parameter, part in zip(self._parameters, update, strict=True):
                parameter.add_(part, alpha=scale)
            return float(self._objective.loss())
        finally:
            for parameter, old in zip(self._parameters, saved, strict=True):
                parameter.copy_(old)


def _on(operator: PyTorchLinearOperator, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Bring saved tensors to an operator's device."""
    return [tensor.to(operator.device) for tensor in tensors]


def _reason(accepted: bool, scale: float, new_loss: float) -> str:
    """Say why a step was not taken as proposed."""
    if not accepted:
        what = "raised the loss" if math.isfinite(new_loss) else "made the loss non-finite"
        return f"rejected: the update {what} even at {scale:g} of its length"
    return f"shortened to {scale:g} of its length: the loss rose" if scale < 1 else ""


def _solver_report(inverse: Any) -> dict[str, Any]:
    """Return what an inverse reports about how it was computed."""
    return {
        name: getattr(inverse, name) for name in ("record", "reports") if hasattr(inverse, name)
    }
