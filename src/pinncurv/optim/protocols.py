"""What the optimizer asks of an objective, of a curvature and of an inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from pinncurv.linops import PyTorchLinearOperator, check_finite


@runtime_checkable
class LinearizedLoss(Protocol):
    """A sum of squares, linearized at the current parameters.

    L(θ + v) ≈ ½‖r̃ + J v‖²,  ∇L = Jᵀ r̃

    Of any other loss, JᵀJ is the model's matrix, L(θ + v) ≈ L + ∇Lᵀv + ½‖J v‖², and there is no
    residual. It may offer ``names`` of the parameters, by which an optimizer tells them apart.
    """

    @property
    def linearizations(self) -> Sequence[Any]:
        """What the curvature is built from."""

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters, in the order of the gradient and of the operators."""

    @property
    def jacobian(self) -> PyTorchLinearOperator:
        """J, on the list of parameters."""

    @property
    def residual(self) -> Sequence[Tensor] | None:
        """r̃, in the form in which J returns its image; None if the loss is no sum of squares."""

    @property
    def term_losses(self) -> Mapping[str, float]:
        """The terms of the loss by name."""

    def gradient(self) -> list[Tensor]:
        """∇L, one tensor per parameter."""


@runtime_checkable
class LeastSquares(Protocol):
    """A loss on one frozen batch.

    It may offer ``evaluate``, which keeps what the next linearization needs, ``backward``, which
    adds the gradient to ``.grad`` and returns the terms of the loss by name, and
    ``named_parameters``.
    """

    def loss(self) -> Tensor:
        """Return L."""

    def linearize(self) -> LinearizedLoss:
        """Linearize at the current parameters."""


# From linearizations to an operator. A curvature may offer ``at_step``, which returns the one that
# draws the random numbers of a step. Operators may offer ``tensors`` and ``with_tensors``, which
# intervals above one need, ``tensor_names`` of them, a function of the names of the parameters,
# ``identity``, which averages start from, and ``jacobian``, if they see the network through it
# alone.
Curvature = Callable[[Sequence[Any]], PyTorchLinearOperator]


@runtime_checkable
class Inverse(Protocol):
    """A damped inverse, as a function of the operator.

    What it returns may offer ``solve_residual`` and ``linearizations``, which save digits where λ
    is small, and ``solve_from`` and ``last_results``, if it iterates.
    """

    @property
    def damping(self) -> float:
        """λ."""

    def __call__(self, operator: Any) -> PyTorchLinearOperator:
        """Return the inverse of an operator."""


def offers(part: Any, *capabilities: str) -> bool:
    """Whether an object has what is optional, such as ``evaluate`` of an objective."""
    return all(getattr(part, capability, None) is not None for capability in capabilities)


@dataclass(frozen=True, repr=False)
class StepRecord:
    """What happened in one step.

    Args:
        loss: L before the step.
        term_losses: Its terms by name.
        new_loss: L after the step on the same batch; equal to ``loss`` if the step was rejected.
            NaN where it was not evaluated.
        step_size: α, the multiple of the direction that was taken, without the group's ``lr``.
        momentum: μ, the multiple of the previous update that was taken.
        damping: λ of the inverse; NaN for optimizers without.
        predicted_decrease: What the exact quadratic model promised for the update that was taken,
            or for the one that was rejected, times L over its part of the points that were
            linearized; NaN without a model.
        accepted: Whether the parameters were changed.
        stalled: Whether the update was too small to change them, which raises no damping.
        scale: Which part was taken of the longest update that the step size thought of.
        reason: Why the step was shortened or rejected; empty if it was taken as proposed.
        solver: What the inverse reports, if anything.
        held_out: L on points that are not trained on, after the step; NaN where ``HeldOut`` did not
            measure it.
    """

    loss: float
    term_losses: Mapping[str, float]
    new_loss: float = math.nan
    step_size: float = math.nan
    momentum: float = 0.0
    damping: float = math.nan
    predicted_decrease: float = math.nan
    accepted: bool = True
    stalled: bool = False
    reason: str = ""
    scale: float = 1.0
    solver: Mapping[str, Any] = field(default_factory=dict)
    held_out: float = math.nan

    @property
    def ratio(self) -> float:
        """Actual over predicted decrease of the loss; NaN if none is predicted."""
        predicted = self.predicted_decrease
        return (self.loss - self.new_loss) / predicted if predicted else math.nan

    def __str__(self) -> str:
        """Return what happened on one line; of ``solver``, only how often it iterated."""
        numbers = {
            "step": self.step_size,
            "momentum": self.momentum or math.nan,
            "damping": self.damping,
            "predicted": self.predicted_decrease,
            "held out": self.held_out,
            "CG iterations": max(
                (r.iterations for r in self.solver.get("last_records", ())), default=math.nan
            ),
        }
        shown = [f"{name} {value:.3g}" for name, value in numbers.items() if not math.isnan(value)]
        terms = ", ".join(f"{name} {loss:.3g}" for name, loss in self.term_losses.items())
        after = "" if math.isnan(self.new_loss) else f" -> {self.new_loss:.6g}"
        why = f" ({self.reason})" if self.reason else ""
        return ", ".join([f"loss {self.loss:.6g}{after} [{terms}]", *shown]) + why

    __repr__ = __str__


def check_part(what: str, part: Any, example: str, *capabilities: str) -> None:
    """Check that a part of an optimizer has what is asked of it.

    Args:
        what: Its name.
        part: The part; None is fine.
        example: What could be passed instead.
        capabilities: The methods and numbers that it must have.

    Raises:
        TypeError: If it lacks one, or is a class.
    """
    if isinstance(part, type):
        raise TypeError(
            f"{what} must be an object, got the class {part.__name__}. Write {part.__name__}(...)."
        )
    if part is not None and not offers(part, *capabilities):
        raise TypeError(
            f"{what} must be an object such as pinncurv.{example}, got {type(part).__name__}."
        )


def finite_loss(term_losses: Mapping[str, float]) -> float:
    """Return the sum of the terms after checking that each is finite.

    Raises:
        FloatingPointError: If one is not; names it.
    """
    bad = [f"{name} ({loss})" for name, loss in term_losses.items() if not math.isfinite(loss)]
    if bad:
        raise FloatingPointError(
            f"The loss must be finite before a step, but these terms are not: {', '.join(bad)}. "
            "Check that the residual is defined at all points, and the parameters' initialization."
        )
    return sum(term_losses.values())


def finite_gradient(gradient: Sequence[Tensor]) -> None:
    """Check that a gradient is finite, for objectives that do not; within a step, a bit later.

    Raises:
        FloatingPointError: If it is not.
    """

    def raise_error() -> None:
        bad = [i for i, part in enumerate(gradient) if not bool(part.isfinite().all())]
        raise FloatingPointError(
            "The gradient must be finite before a step, as the loss is, but it is not for the "
            f"parameters {bad} of {len(gradient)}. Look for a square root, norm or power whose "
            "derivative is infinite where its value is guarded."
        )

    check_finite(gradient, raise_error)
