"""The optimizer: a curvature, its inverse, a step size and a momentum, composed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pinncurv.optim.attempt import Attempt, Parabola
from pinncurv.optim.averaging import ExponentialAverage
from pinncurv.optim.damping import ConstantDamping, DampingRule
from pinncurv.optim.momentum import Descent, Momentum
from pinncurv.optim.preconditioner import Intervals, Preconditioner
from pinncurv.optim.protocols import (
    Curvature,
    Inverse,
    LeastSquares,
    LinearizedLoss,
    StepRecord,
    finite_loss,
)
from pinncurv.optim.step_sizes import Proposal, QuadraticModel, Situation, StepSize
from pinncurv.optim.trial import Landing, Trial

# The key of the state that belongs to no single parameter.
_SHARED = "curvature"


class CurvatureOptimizer(Optimizer):
    """Preconditioned gradient descent with any curvature operator.

    θ ← θ + lr (α Δ + μ δ),  Δ = -(C + λI)⁻¹ ∇L,  δ the previous update

    Every step sees one batch: loss, gradient, curvature and line search all come from the
    objective that is passed to ``step``. An update that raises the loss or makes it non-finite is
    halved a few times and then rejected, with the parameters restored. A step after one that was
    shortened starts from two to four times its scale, which saves the trials that would fail again.

    Args:
        params: Parameters or parameter groups; ``lr`` (default 1) multiplies a group's update.
        curvature: Builds the operator C from the objective's linearizations.
        inverse: Builds the damped inverse from C.
        step_size: How far to go.
        average: Exponential moving average of the operator's tensors, or None.
        momentum: Momentum on the direction, or None. The quadratic model brings its own.
        damping_rule: How λ changes from step to step; it starts at the inverse's own and is
            constant by default.
        intervals: How often curvature and inverse are refreshed.
        max_halvings: How often an update that raises the loss is halved before it is rejected.
        lr: Default for the groups' ``lr``.

    Raises:
        TypeError: If the damping is to adapt but cannot be set.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        curvature: Curvature,
        inverse: Inverse,
        step_size: StepSize | None = None,
        average: ExponentialAverage | None = None,
        momentum: Momentum | None = None,
        damping_rule: DampingRule | None = None,
        intervals: Intervals | None = None,
        max_halvings: int = 30,
        lr: float = 1.0,
    ) -> None:
        if max_halvings < 0:
            raise ValueError(f"max_halvings must be at least 0, got {max_halvings}.")
        adapts = not isinstance(damping_rule, ConstantDamping | None)
        if adapts and not is_dataclass(inverse):
            raise TypeError(
                "With a damping that adapts, the inverse must be a dataclass with a field damping, "
                f"got {type(inverse).__name__}. Decorate it with @dataclass(frozen=True)."
            )
        super().__init__(params, {"lr": lr})
        self.preconditioner = Preconditioner(
            curvature, inverse, average, Intervals() if intervals is None else intervals
        )
        self.step_size = QuadraticModel() if step_size is None else step_size
        self.momentum = momentum
        self.damping_rule = ConstantDamping() if damping_rule is None else damping_rule
        self.max_halvings = max_halvings
        self._landing: Landing | None = None
        self.state[_SHARED] = self.preconditioner.state  # type: ignore[index]

    @torch.no_grad()
    def step(self, objective: LeastSquares) -> StepRecord:  # type: ignore[override]
        """Take one step on one batch.

        Args:
            objective: The loss on this batch.

        Returns:
            What happened.

        Raises:
            FloatingPointError: If the loss is not finite before the step; names the terms.
            TypeError: If the objective is none, or the operator lacks what an average or an
                interval above one needs.
            ValueError: If the objective's parameters are not those of the optimizer.
        """
        if not isinstance(objective, LeastSquares):
            raise TypeError(
                "A step must be given an objective with the methods loss and linearize, such as "
                f"pinncurv.curvature.Objective, got {type(objective).__name__}."
            )
        linearized = self._linearize(objective)
        self._check_parameters(linearized)
        trial = Trial(objective, linearized.parameters)
        with self._undo_on_error(trial):
            self.preconditioner.refresh(linearized)
            gradient = linearized.gradient()
            finite_loss(linearized.term_losses)
            for left in reversed(range(self.damping_rule.retries + 1)):
                attempt = self._propose(linearized, gradient, trial)
                outlives = bool(left) and self._outlives_trial(linearized)
                if not outlives:
                    del linearized  # frees Z and G before the loss is evaluated
                if not left:
                    self.preconditioner.release()  # which may hold them, too
                record = attempt.make(trial, self._scales(attempt.proposal))
                if record.accepted:
                    break
                self.preconditioner.damping = self.damping_rule.rejected(record.damping)
                if left and not outlives:
                    linearized = _linearize(objective)
                    self.preconditioner.relinearize(linearized)
            self.preconditioner.release()
            self._settle(attempt, trial, record)
        return record

    @contextmanager
    def _undo_on_error(self, trial: Trial) -> Iterator[None]:
        """Restore parameters and curvature if anything is raised, be it an interrupt."""
        before = dict(self.preconditioner.state)
        try:
            yield
        except BaseException:
            trial.restore()
            self.preconditioner.restore(before)
            raise

    def _linearize(self, objective: LeastSquares) -> LinearizedLoss:
        """Linearize, from the evaluation that ended the last step if it was the same point."""
        landing, self._landing = self._landing, None
        if landing is not None and landing.is_at(objective, self._trained_parameters()):
            return _linearize(landing.evaluation)
        return _linearize(objective)

    def _outlives_trial(self, linearized: LinearizedLoss) -> bool:
        """Whether a retry can go on with linearization and operator."""
        return _is_kept(linearized) and self.preconditioner.is_kept

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _trained_parameters(self) -> list[Tensor]:
        return [parameter for parameter in self._all_parameters() if parameter.requires_grad]

    def _check_parameters(self, linearized: LinearizedLoss) -> None:
        """Check that objective and optimizer agree on what is trained."""
        mine = {id(parameter) for parameter in self._trained_parameters()}
        theirs = {id(parameter) for parameter in linearized.parameters}
        if mine != theirs:
            raise ValueError(
                "The optimizer must have exactly the parameters of the objective that require a "
                f"gradient, got {len(mine - theirs)} that the objective lacks and lacks "
                f"{len(theirs - mine)} of the objective's. Build the optimizer from "
                "model.parameters() of the same model."
            )

    def _propose(self, linearized: LinearizedLoss, gradient: list[Tensor], trial: Trial) -> Attempt:
        """Find a direction and how far to go along it."""
        parameters = linearized.parameters
        inverse = self.preconditioner.invert()
        descent = Descent(linearized, gradient, inverse)
        direction = self._direction(descent, parameters)
        previous = self._remembered(parameters, "previous_update")
        losses = dict(linearized.term_losses)
        damping = self.preconditioner.damping
        situation = Situation(
            sum(losses.values()),
            linearized,
            gradient,
            direction,
            previous,
            damping,
            trial.loss_at,
            inverse,
        )
        proposal = self.step_size.propose(situation)
        chosen = direction if proposal.direction is None else proposal.direction
        update = self._update(parameters, proposal, chosen, previous)
        model = self._model(situation, proposal, update, trial)
        return Attempt(losses, damping, direction, proposal, update, model, _solver_report(inverse))

    def _model(
        self,
        situation: Situation,
        proposal: Proposal,
        update: Sequence[Tensor],
        trial: Trial,
    ) -> Parabola:
        """Return the damped quadratic model along an update, where there is one."""
        promised, gradient = proposal.predicted_decrease, situation.gradient
        if math.isnan(promised) and not self.damping_rule.needs_ratio:
            return Parabola()
        if math.isfinite(promised) and all(group["lr"] == 1 for group in self.param_groups):
            return Parabola.promising(promised, gradient, update)
        linearized = situation.linearized
        if math.isfinite(proposal.new_loss) and not _is_kept(linearized):
            linearized = _linearize(trial.objective)  # a search has moved the parameters
        return Parabola.along(linearized, gradient, update, situation.damping)

    def _direction(self, descent: Descent, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the preconditioned gradient, with momentum if there is any."""
        if self.momentum is None:
            return descent.step()
        return self.momentum.direction(descent, self._remembered(parameters, "momentum_buffer"))

    def _update(
        self,
        parameters: Sequence[Tensor],
        proposal: Proposal,
        direction: Sequence[Tensor],
        previous: Sequence[Tensor] | None,
    ) -> list[Tensor]:
        """Return lr (α Δ + μ δ)."""
        rates = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        update = [proposal.step_size * part for part in direction]
        if previous is not None and proposal.momentum:
            for part, old in zip(update, previous, strict=True):
                part.add_(old, alpha=proposal.momentum)
        for part, parameter in zip(update, parameters, strict=True):
            if rates[id(parameter)] != 1:
                part.mul_(rates[id(parameter)])
        return update

    def _scales(self, proposal: Proposal) -> Iterator[float]:
        """Yield which multiples of an update to try, from what worked last to the shortest."""
        halvings = 0 if self.damping_rule.retries else self.max_halvings
        searched = math.isfinite(proposal.new_loss)
        first = 0 if searched else min(self.preconditioner.state["halvings"], halvings)
        yield from (0.5**halving for halving in range(first, halvings + 1))

    def _settle(self, attempt: Attempt, trial: Trial, record: StepRecord) -> None:
        """Remember what the next step needs."""
        self._landing = trial.landing
        update = [record.scale * part for part in attempt.update] if record.accepted else None
        self._remember(trial.parameters, "previous_update", update)
        if self.momentum is not None:
            direction = attempt.direction if record.accepted else None
            self._remember(trial.parameters, "momentum_buffer", direction)
        if record.accepted:
            predicted = record.predicted_decrease
            ratio = (record.loss - record.new_loss) / predicted if predicted else math.nan
            damping = self.damping_rule.accepted(record.damping, ratio, record.scale)
            self.preconditioner.damping = damping
        self._remember_halvings(record)
        self.preconditioner.state["step"] += 1

    def _remember_halvings(self, record: StepRecord) -> None:
        """Start the next step longer than this one by a factor of two, or four if it began here."""
        state = self.preconditioner.state
        taken = round(-math.log2(record.scale)) if record.accepted else 0
        state["halvings"] = max(0, taken - (2 if taken == state["halvings"] else 1))

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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: If its ``lr`` is not finite and positive.
        """
        lr = float(param_group.get("lr", self.defaults["lr"]))
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr must be finite and positive, got {lr}.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; operators and inverses are rebuilt from it at the next step.

        Raises:
            ValueError: If the state is not of this class, or of a network of other shapes.
        """
        if _SHARED not in state_dict["state"]:
            raise ValueError(
                "The state must come from a CurvatureOptimizer, but it has no entry "
                f"'{_SHARED}'. Load the checkpoint of the same optimizer."
            )
        self._check_shapes(state_dict)
        super().load_state_dict(state_dict)
        # torch shares this entry with the optimizer that it came from
        self.preconditioner.restore(self.state[_SHARED])  # type: ignore[index]
        self.state[_SHARED] = self.preconditioner.state  # type: ignore[index]
        self._landing = None

    def _check_shapes(self, state_dict: dict[str, Any]) -> None:
        """Check that what is remembered of each parameter has its shape, which torch does not."""
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for index, parameter in zip(saved, self._all_parameters(), strict=False):
            for key, tensor in state_dict["state"].get(index, {}).items():
                if tensor.shape != parameter.shape:
                    raise ValueError(
                        f"The state must belong to the same network, but '{key}' of parameter "
                        f"{index} has shape {list(tensor.shape)}, the parameter has "
                        f"{list(parameter.shape)}. Load the checkpoint of the same network."
                    )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: torch's attributes and those of this class."""
        names = ("preconditioner", "step_size", "momentum", "damping_rule", "max_halvings")
        mine = {name: getattr(self, name) for name in names}
        return {**super().__getstate__(), **mine, "_landing": None}


def _linearize(source: Any) -> LinearizedLoss:
    """Linearize, with a graph for those who need one."""
    with torch.enable_grad():
        return source.linearize()


def _is_kept(linearized: LinearizedLoss) -> bool:
    """Whether nothing is recomputed, which it can't be once the parameters were moved."""
    made = linearized.linearizations
    return all(getattr(part, "chunk_size", 0) is None for part in made)


def _solver_report(inverse: Any) -> dict[str, Any]:
    """Return what an inverse reports about how it was computed."""
    names = ("reports", "last_records")
    return {name: getattr(inverse, name) for name in names if hasattr(inverse, name)}
