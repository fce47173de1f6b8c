"""The optimizer: a curvature, its inverse, a step size and a momentum, composed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pinncurv.linops import checks_wait
from pinncurv.optim.batch import GrowingBatch
from pinncurv.optim.damping import ConstantDamping, DampingRule, check_adaption
from pinncurv.optim.identity import (
    SHARED,
    check_group,
    check_no_stray_gradients,
    checked,
    describe,
    merged,
    names_in_groups,
    names_of,
)
from pinncurv.optim.momentum import Momentum
from pinncurv.optim.preconditioner import ExponentialAverage, Intervals, Preconditioner
from pinncurv.optim.progress import Progress
from pinncurv.optim.protocols import (
    Curvature,
    Inverse,
    LeastSquares,
    LinearizedLoss,
    StepRecord,
    check_part,
    finite_gradient,
    finite_loss,
    offers,
)
from pinncurv.optim.situation import Situation, damping_of, share_of
from pinncurv.optim.step_sizes import Proposal, QuadraticModel, StepSize
from pinncurv.optim.trial import Trial


class CurvatureOptimizer(Optimizer):
    """Preconditioned gradient descent with any curvature operator.

    θ ← θ + lr (α Δ + μ δ),  Δ = -(C + λI)⁻¹ ∇L,  δ the previous update

    Every step sees one batch: loss, gradient, curvature and line search all come from the
    objective that is passed to ``step``. An update that raises the loss or makes it non-finite is
    halved a few times and then rejected, with the parameters restored. A step after one that was
    shortened starts from two to four times its scale, which saves the trials that would fail again.

    A step differentiates its objective itself: gradients that somebody left in ``.grad`` are an
    error, not ignored. What is remembered belongs to parameters and terms by their names; a state
    is loaded into an optimizer of the same parts, whose numbers may differ.

    Args:
        params: Parameters or parameter groups; ``lr`` (default 1) multiplies a group's update and
            is their only option.
        curvature: Builds the operator C from the objective's linearizations.
        inverse: Builds the damped inverse from C.
        step_size: How far to go.
        average: Exponential moving average of the operator's tensors, or None.
        momentum: Momentum on the direction, or None. The quadratic model brings its own.
        damping_rule: How λ changes from step to step; it starts at the inverse's own and is
            constant by default.
        intervals: How often curvature and inverse are refreshed.
        batch: Which of the residuals a step linearizes; all of them by default. Losses are those of
            all points in any case.
        max_halvings: How often an update that raises the loss is halved before it is rejected; 30
            by default. A rule that retries with more damping does not halve.
        monotone: Whether updates that raise the loss are shortened and rejected at all. The
            published methods without a line search take every update; False shortens and rejects
            those alone after which the loss is not finite.
        lr: Default for the groups' ``lr``.

    Raises:
        TypeError: If the damping is to adapt but cannot be set, or a part is none.
        ValueError: If a setting is out of range, or ``max_halvings`` or a damping rule would not
            act.
    """

    monotone = True  # of one that was pickled without it

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
        max_halvings: int | None = None,
        lr: float = 1.0,
        batch: GrowingBatch | None = None,
        monotone: bool = True,
    ) -> None:
        if hasattr(params, "parameters"):
            raise TypeError(
                "An optimizer must be given the trained tensors, which are those of the objective, "
                f"got {type(params).__name__}. Pass objective.parameters()."
            )
        check_part("curvature", curvature, "KFAC()", "__call__")
        check_part("inverse", inverse, "Damped(1e-3)", "damping", "__call__")
        check_part("step_size", step_size, "optim.FixedStep(0.1)", "propose")
        check_part("momentum", momentum, "optim.HeavyBall(0.9)", "direction")
        asked = ("adapts", "needs_ratio", "retries", "after")
        check_part("damping_rule", damping_rule, "optim.LevenbergMarquardt()", *asked)
        check_part("batch", batch, "optim.GrowingBatch()", "linearize", "grown")
        check_adaption(damping_rule, step_size, inverse, max_halvings, monotone)
        super().__init__(params, {"lr": lr})
        self.preconditioner = Preconditioner(
            curvature, inverse, average, Intervals() if intervals is None else intervals
        )
        self.step_size = QuadraticModel() if step_size is None else step_size
        self.momentum = momentum
        self.damping_rule = ConstantDamping() if damping_rule is None else damping_rule
        self.batch = batch
        if batch is not None:
            self.preconditioner.state["rows"] = batch.rows
        self.max_halvings = 30 if max_halvings is None else max_halvings
        self.monotone = monotone
        self._last: Trial | None = None
        self._loaded = False
        self._progress = Progress()
        self.state[SHARED] = self.preconditioner.state  # type: ignore[index]

    @torch.no_grad()
    def step(self, objective: LeastSquares) -> StepRecord:  # type: ignore[override]
        """Take one step on one batch.

        Args:
            objective: The loss on this batch.

        Returns:
            What happened.

        Raises:
            FloatingPointError: If the loss or its gradient is not finite before the step; names the
                terms and, for the gradient, the first point.
            TypeError: If the objective is none, or the operator lacks what an average or an
                interval above one needs.
            ValueError: If the objective's parameters are not those of the optimizer, by name if
                something is remembered of them, if a parameter has a gradient already, or a group
                an unknown option.
        """
        if not isinstance(objective, LeastSquares):
            raise TypeError(
                "A step must be given an objective with the methods loss and linearize, such as "
                f"pinncurv.curvature.Objective, got {type(objective).__name__}."
            )
        for group in self.param_groups:
            check_group(group, zero_rate=True)
            check_no_stray_gradients(group["params"])
        # other inverses may fail at what is not finite before a check says why it is not
        settles = offers(self.preconditioner.inverse, "settles_checks")
        unchanged = getattr(objective, "unchanged", nullcontext)
        for _ in range(2):
            try:
                with unchanged(), checks_wait() if settles else nullcontext():
                    record = self._take(objective)
                break
            except _StaleError:  # of the last step, there is nothing to go on with
                self._last = None
        self._progress.observe(record)
        return record

    def _take(self, objective: LeastSquares) -> StepRecord:
        """Take one step on one batch, or none."""
        linearized = self._linearize(objective)
        of_some = getattr(linearized, "of_some", False)
        sample = linearized if of_some else None
        trial = Trial(objective, linearized.parameters, keeps=not of_some)
        before = dict(state := self.preconditioner.state)
        halvings = 0 if self.damping_rule.retries else self.max_halvings
        try:
            self.preconditioner.refresh(linearized)
            gradient = linearized.gradient()
            finite_loss(linearized.term_losses)
            if not getattr(linearized, "checks_gradient", False):
                finite_gradient(gradient)
            share = share_of(linearized)
            for left in reversed(range(self.damping_rule.retries + 1)):
                record, proposal, direction, update = self._propose(linearized, gradient, trial)
                outlives = left and _is_kept(linearized) and self.preconditioner.is_kept
                if not outlives:
                    del linearized  # frees Z and G before the loss is evaluated
                if not left:
                    self.preconditioner.release()  # which may hold them, too
                record = trial.take(
                    record, update, gradient, state["halvings"], halvings, self.monotone
                )
                record = replace(record, predicted_decrease=share * record.predicted_decrease)
                if self.damping_rule.adapts and not record.stalled:
                    state["damping"] = self.damping_rule.after(record)
                if record.accepted or record.stalled:
                    break
                if left and not outlives:
                    linearized = sample or _linearize(objective)
                    self.preconditioner.relinearize(linearized)
            self.preconditioner.release()
            if self.batch is not None and sample is not None:
                self._grow(self.batch, sample, record)
            self._settle(trial, record, proposal, direction, update)
        except BaseException:  # also an interrupt leaves parameters and curvature as they were
            trial.restore()
            self.preconditioner.restore(before)
            raise
        return record

    def _linearize(self, objective: LeastSquares) -> LinearizedLoss:
        """Linearize, from the evaluation that ended the last step if it was the same point."""
        trained = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        last, self._last = self._last, None
        some = None
        if self.batch is not None:
            so_far = self.preconditioner.state
            with torch.enable_grad():
                some = self.batch.linearize(objective, so_far["rows"], so_far["step"])
        source: Any = objective
        if some is None and last is not None and last.ended_at(objective, trained, _raise_stale):
            source = last.evaluation
        linearized = _linearize(source) if some is None else some
        mine, theirs = ({id(p) for p in ps} for ps in (trained, linearized.parameters))
        if mine != theirs:
            raise ValueError(
                "The optimizer must have exactly the parameters of the objective that require a "
                f"gradient, got {len(mine - theirs)} that the objective lacks and lacks "
                f"{len(theirs - mine)} of the objective's. Pass objective.parameters(), those of "
                "residuals and coefficients included, and freeze with requires_grad_(False) "
                "what shall not be trained."
            )
        state, known = self.preconditioner.state, names_of(linearized)
        names = names_in_groups(self.param_groups, zip(known, linearized.parameters, strict=True))
        remembers = self._loaded or state["average"] is not None or state["inverted"] is not None
        state["names"] = merged(state["names"], names, remembers)
        return linearized

    def _propose(
        self, linearized: LinearizedLoss, gradient: list[Tensor], trial: Trial
    ) -> tuple[StepRecord, Proposal, list[Tensor], list[Tensor]]:
        """Find a direction Δ and how far to go along it.

        Returns:
            The record of the step if it is taken as proposed, with L after it if that is known; the
            proposal; Δ; and the update lr (α Δ + μ δ).
        """
        inverse, parameters = self.preconditioner.invert(), trial.parameters
        previous = self._remembered(parameters, "previous_update")
        damping = damping_of(inverse, self.preconditioner.state["damping"])
        losses, start = dict(linearized.term_losses), 0.5 ** self.preconditioner.state["halvings"]
        at = Situation(
            linearized, gradient, inverse, damping, previous, (), trial.loss_at, start=start
        )
        if _is_kept(linearized):  # what is recomputed can't be once the parameters were moved
            residual_at = partial(trial.residual_at, linearized)
            now = residual_at if offers(linearized, "residual_now") else None
            at = replace(at, residual_at=now, invert=self.preconditioner.invert)
        if self.momentum is None:
            direction = at.step()
        else:
            buffer = self._remembered(parameters, "momentum_buffer")
            direction = self.momentum.direction(at, buffer)
        lr = {id(p): float(group["lr"]) for group in self.param_groups for p in group["params"]}
        rates = [lr[id(parameter)] for parameter in parameters]
        full = all(rate == 1 for rate in rates)
        at = replace(at, direction=direction, rates=() if full else rates)
        proposal = self.step_size.propose(at)
        if not isinstance(proposal, Proposal):
            name = type(self.step_size).__name__
            raise TypeError(
                f"{name}.propose must return a Proposal, got {type(proposal).__name__}. Return "
                "Proposal(step_size=...)."
            )
        chosen = direction if proposal.direction is None else proposal.direction
        damping = damping if proposal.damping is None else proposal.damping
        update = [proposal.step_size * part for part in chosen]
        if previous is not None and proposal.momentum:
            for part, old in zip(update, previous, strict=True):
                part.add_(old, alpha=proposal.momentum)
        update = list(at.rated(update))
        promised = proposal.predicted_decrease
        wanted = not math.isnan(promised) or self.damping_rule.needs_ratio
        if wanted and not (full and math.isfinite(promised)):
            searched = math.isfinite(proposal.new_loss)  # which has moved the parameters
            stale = searched and not _is_kept(linearized)
            promised = replace(at, damping=damping).promise(
                update, _linearize(trial.objective) if stale else linearized
            )
        names = ("reports", "last_records")
        record = StepRecord(
            sum(losses.values()),
            losses,
            proposal.new_loss,
            proposal.step_size,
            proposal.momentum,
            damping,
            promised,
            scale=proposal.scale,
            solver={name: getattr(inverse, name) for name in names if hasattr(inverse, name)},
        )
        return record, proposal, direction, update

    def _grow(self, batch: GrowingBatch, sample: Any, record: StepRecord) -> None:
        """Find out whether the points that were linearized stand for all of them."""
        before = sum(float(part.square().sum()) for part in sample.residual)
        after = sum(float(part.square().sum()) for part in sample.residual_now())
        state = self.preconditioner.state
        decrease = 1 - record.new_loss / record.loss if record.loss else 0.0
        its = 1 - after / before if before else 0.0
        state["rows"] = batch.grown(state["rows"], decrease, its)

    def _settle(
        self,
        trial: Trial,
        record: StepRecord,
        proposal: Proposal,
        direction: list[Tensor],
        update: list[Tensor],
    ) -> None:
        """Remember what the next step needs.

        Args:
            trial: The trial that has ended.
            record: What happened.
            proposal: What was proposed.
            direction: Δ.
            update: The update that was proposed.
        """
        taken = record.scale / proposal.scale
        self._last, self._loaded, state = trial, False, self.preconditioner.state
        for i, parameter in enumerate(trial.parameters):
            mine = self.state[parameter]
            if not record.accepted:
                mine.pop("previous_update", None)
                mine.pop("momentum_buffer", None)
                continue
            mine["previous_update"] = update[i] if taken == 1 else taken * update[i]
            if self.momentum is not None:
                mine["momentum_buffer"] = direction[i]
        halvings = round(-math.log2(record.scale)) if record.accepted else 0
        if (damping := proposal.next_damping) is not None:
            full = all(group["lr"] == 1 for group in self.param_groups)
            lower = damping < state["damping"]
            # a full step that moves nothing though there is a gradient: λ hides the whole matrix
            hides = full and lower and any(part.any() for part in direction)
            if not record.stalled or hides:
                state["damping"] = damping
        # the next step starts longer by a factor of two, or four if this one was not shortened more
        state["halvings"] = max(0, halvings - (2 if halvings <= state["halvings"] else 1))
        state["step"] += 1

    def _remembered(self, parameters: Sequence[Tensor], key: str) -> list[Tensor] | None:
        """Return what is remembered of each parameter, on its device; None at the start."""
        known = [self.state[parameter].get(key) for parameter in parameters]
        if any(tensor is None for tensor in known):
            return None
        return [tensor.to(p) for tensor, p in zip(known, parameters, strict=True)]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Raises:
            ValueError: If it has another option than ``lr``, or that is not finite and positive.
        """
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; operators and inverses are rebuilt from it at the next step.

        That step checks the names of the parameters, which only an objective knows.

        Raises:
            ValueError: If the state is not of this class, of an optimizer of other parts (numbers
                may differ), or of a network of other shapes, or a number in it is NaN.
        """
        parameters = [p for group in self.param_groups for p in group["params"]]
        shared = checked(state_dict, self._method(), self.preconditioner.state, parameters)
        super().load_state_dict(state_dict)
        # torch shares this entry with the optimizer that it came from
        self.preconditioner.restore(shared)
        self.state[SHARED] = self.preconditioner.state  # type: ignore[index]
        self._last, self._loaded = None, True

    def state_dict(self) -> dict[str, Any]:
        """Return the state: numbers, strings and tensors, by parameter and by names."""
        state = super().state_dict()
        shared = {**self.preconditioner.state, "method": self._method()}
        return {**state, "state": {**state["state"], SHARED: shared}}

    def _method(self) -> dict[str, str]:
        """Describe the parts that a state belongs to."""
        parts = {name: getattr(self, name) for name in ("step_size", "momentum", "damping_rule")}
        parts |= {} if self.batch is None else {"batch": self.batch}
        mine = self.preconditioner
        parts |= {"curvature": mine.curvature, "inverse": mine.inverse, "average": mine.average}
        return {name: describe(part) for name, part in parts.items()}

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: torch's attributes and those of this class."""
        names = ["preconditioner", "step_size", "momentum", "damping_rule", "batch"]
        names += ["max_halvings", "monotone"]
        mine = {name: getattr(self, name) for name in names}
        own = {"_last": None, "_loaded": self._loaded, "_progress": Progress()}
        return {**super().__getstate__(), **mine, **own}


class _StaleError(Exception):
    """Parameters are not those that the last step has evaluated."""


def _raise_stale() -> None:
    raise _StaleError


def _linearize(source: Any) -> LinearizedLoss:
    """Linearize, with a graph for those who need one."""
    with torch.enable_grad():
        return source.linearize()


def _is_kept(linearized: LinearizedLoss) -> bool:
    """Whether nothing is recomputed, which it can't be once the parameters were moved."""
    made = linearized.linearizations
    return all(getattr(part, "chunk_size", 0) is None for part in made)
