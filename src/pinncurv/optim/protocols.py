"""What the optimizer asks of an objective, of a curvature and of an inverse."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from curvlinops._torch_base import PyTorchLinearOperator
from torch import Tensor

from pinncurv.linops import CGResult


@runtime_checkable
class LinearizedLoss(Protocol):
    """A sum of squares, linearized at the current parameters.

    L(θ + v) ≈ ½‖r̃ + J v‖²,  ∇L = Jᵀ r̃
    """

    @property
    def linearizations(self) -> Sequence[Any]:
        """What the curvature is built from."""
        ...

    @property
    def parameters(self) -> Sequence[Tensor]:
        """The parameters, in the order of the gradient and of the operators."""
        ...

    @property
    def jacobian(self) -> PyTorchLinearOperator:
        """J, on the list of parameters."""
        ...

    @property
    def residual(self) -> Sequence[Tensor]:
        """r̃, in the form in which J returns its image."""
        ...

    @property
    def term_losses(self) -> Mapping[str, float]:
        """The terms of the loss by name."""
        ...

    def gradient(self) -> list[Tensor]:
        """∇L, one tensor per parameter."""
        ...


@runtime_checkable
class LeastSquares(Protocol):
    """A loss on one frozen batch."""

    def loss(self) -> Tensor:
        """Return L."""
        ...

    def linearize(self) -> LinearizedLoss:
        """Linearize at the current parameters."""
        ...


@runtime_checkable
class Evaluation(Protocol):
    """A loss that was evaluated together with what its linearization needs."""

    @property
    def loss(self) -> float:
        """L."""
        ...

    @property
    def linearize(self) -> Callable[[], LinearizedLoss]:
        """Linearize where it was evaluated, at little or no further cost."""
        ...

    def is_current(self) -> bool:
        """Whether all that the evaluation depends on is as it was then."""
        ...


@runtime_checkable
class Evaluable(Protocol):
    """A loss that can keep what it evaluates. Optional: it saves a forward pass per step."""

    def evaluate(self) -> Evaluation:
        """Evaluate L and keep what its linearization needs."""
        ...


@runtime_checkable
class Differentiable(Protocol):
    """A loss on one frozen batch with a plain gradient."""

    def backward(self) -> Mapping[str, Tensor]:
        """Add the gradient to ``.grad``; return the terms of the loss by name."""
        ...


Curvature = Callable[[Sequence[Any]], PyTorchLinearOperator]


@runtime_checkable
class Chunked(Protocol):
    """A linearization that may be recomputed chunk by chunk. Optional, as all that may save work.

    One without a chunk size is kept, and is not made again when a step is retried.
    """

    @property
    def chunk_size(self) -> int | None:
        """How many points are recomputed at a time; None if nothing is."""
        ...


@runtime_checkable
class Storable(Protocol):
    """An operator that is defined by tensors of its own. Optional: intervals above one need it.

    C = C(T₁, T₂, …)

    A ``pinncurv.linops.Averageable`` is one that can be averaged, too.
    """

    def tensors(self) -> list[Tensor]:
        """Return the tensors that define the operator."""
        ...

    def with_tensors(self, tensors: list[Tensor]) -> Any:
        """Return the operator of the same structure that other tensors define."""
        ...


@runtime_checkable
class ThroughJacobian(Protocol):
    """An operator that sees the network through its Jacobian alone. Optional: see ``Chunked``."""

    @property
    def jacobian(self) -> PyTorchLinearOperator:
        """J."""
        ...


@runtime_checkable
class Randomized(Protocol):
    """A curvature that draws random numbers. Optional: others in every step, resumed or not."""

    def at_step(self, step: int) -> Curvature:
        """Return the curvature that draws the numbers of one step."""
        ...


@runtime_checkable
class Inverse(Protocol):
    """A damped inverse, as a function of the operator."""

    @property
    def damping(self) -> float:
        """λ."""
        ...

    def __call__(self, operator: Any) -> PyTorchLinearOperator:
        """Return the inverse of an operator."""
        ...


@runtime_checkable
class ResidualInverse(Protocol):
    """An inverse that knows the Jacobian. Optional: it saves digits where λ is small."""

    @property
    def linearizations(self) -> Sequence[Any]:
        """What the Jacobian was built from."""
        ...

    def solve_residual(self, residual: Sequence[Tensor]) -> list[Tensor]:
        """Return (JᵀJ + λI)⁻¹ Jᵀ u for u in the form of the residual."""
        ...


@runtime_checkable
class IterativeInverse(Protocol):
    """An inverse that iterates towards the solution. Optional: for starts and stops of one's own.

    ``pinncurv.linops.CGInverseLinearOperator`` is one.
    """

    @property
    def last_results(self) -> Sequence[CGResult]:
        """The results of the last product, one per column."""
        ...

    def solve_from(self, b: Sequence[Tensor], start: Sequence[Tensor]) -> list[Tensor]:
        """Return (C + λI)⁻¹ b, iterated from a start."""
        ...


@dataclass(frozen=True)
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
            or for the one that was rejected; NaN without a model.
        accepted: Whether the parameters were changed.
        scale: Which part of the proposed update was taken.
        reason: Why the step was shortened or rejected; empty if it was taken as proposed.
        solver: What the inverse reports, if anything.
    """

    loss: float
    term_losses: Mapping[str, float]
    new_loss: float = float("nan")
    step_size: float = float("nan")
    momentum: float = 0.0
    damping: float = float("nan")
    predicted_decrease: float = float("nan")
    accepted: bool = True
    reason: str = ""
    scale: float = 1.0
    solver: Mapping[str, Any] = field(default_factory=dict)


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
