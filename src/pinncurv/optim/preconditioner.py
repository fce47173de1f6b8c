"""The curvature over the steps: estimated, averaged, and inverted when it is due."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pinncurv.linops import PyTorchLinearOperator
from pinncurv.optim.averaging import ExponentialAverage, fitted
from pinncurv.optim.protocols import (
    Curvature,
    Inverse,
    LinearizedLoss,
    offers,
)

STORED = ("tensors", "with_tensors")  # what an operator offers that can be kept over steps


@dataclass(frozen=True)
class Intervals:
    """How many steps pass between two refreshments.

    Intervals above one need an operator with tensors of its own (``tensors``), which KFAC and the
    dense, per-layer and diagonal Gauss-Newton matrices are.

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


class Preconditioner:
    """A damped inverse of the curvature, (C + λI)⁻¹, that follows the steps.

    What must survive a checkpoint is in ``state``, a dictionary of numbers and tensors; operators
    are rebuilt from it.

    Args:
        curvature: Builds the operator C from linearizations.
        inverse: Builds the damped inverse from C.
        average: Exponential moving average of the operator's tensors, or None.
        intervals: How often curvature and inverse are refreshed.
    """

    def __init__(
        self,
        curvature: Curvature,
        inverse: Inverse,
        average: ExponentialAverage | None,
        intervals: Intervals,
    ) -> None:
        self.curvature = curvature
        self.inverse = inverse
        self.average = average
        self.intervals = intervals
        self.state: dict[str, Any] = {
            "step": 0,
            "damping": float(inverse.damping),
            "average": None,
            "inverted": None,
            "halvings": 0,
        }
        self.forget()

    @property
    def damping(self) -> float:
        """λ, which a damping rule may change."""
        damping: float = self.state["damping"]
        return damping

    @damping.setter
    def damping(self, damping: float) -> None:
        self.state["damping"] = damping

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a saved state; operators are rebuilt from it."""
        saved = dict(state)
        self.state.clear()  # in place: the optimizer's state dictionary holds this one too
        self.state.update(saved)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: all but the operators, which it rebuilds."""
        kept = ("curvature", "inverse", "average", "intervals", "state")
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what a copy needs."""
        vars(self).update(state)
        self.forget()

    def forget(self) -> None:
        """Drop the operators, to be rebuilt from the state."""
        self._operator: Any = None
        self._inverted: Any = None
        self._inverse: PyTorchLinearOperator | None = None
        self._inverse_damping = math.nan

    def refresh(self, linearized: LinearizedLoss) -> None:
        """Estimate and average the curvature, and choose what to invert, where due."""
        self._follow(linearized.parameters[0])
        step = self.state["step"]
        due = step % self.intervals.curvature == 0
        if due or self._operator is None:
            self._operator = self._estimate(linearized, due)
        if step % self.intervals.inverse == 0:
            self._choose(self._operator)
        elif self._inverted is None:  # loaded between two inversions
            saved = self.state["inverted"]
            self._choose(self._operator if saved is None else _rebuilt(self._operator, saved))

    def relinearize(self, linearized: LinearizedLoss) -> None:
        """Build a matrix-free operator again, on a linearization that replaces this step's."""
        if not offers(self._operator, *STORED):
            self._operator = self._build(linearized)
            self._choose(self._operator)

    @property
    def is_kept(self) -> bool:
        """Whether the operator stays valid, as J does, when parameters are moved and restored."""
        return offers(self._operator, *STORED) or offers(self._operator, "jacobian")

    def release(self) -> None:
        """Drop the operators if the next step builds them anew, to free their memory."""
        if self.intervals == Intervals():
            self.forget()

    def _follow(self, parameter: Tensor) -> None:
        """Rebuild what was kept for another device or dtype."""
        kept = self._operator
        if kept is not None and (kept.device, kept.dtype) != (parameter.device, parameter.dtype):
            self.forget()

    def invert(self) -> PyTorchLinearOperator:
        """Return the inverse with the current damping, computed when either has changed."""
        if self._inverse is None or self._inverse_damping != self.damping:
            self._inverse = _with_damping(self.inverse, self.damping)(self._inverted)
            self._inverse_damping = self.damping
        return self._inverse

    def _build(self, linearized: LinearizedLoss) -> PyTorchLinearOperator:
        curvature: Any = self.curvature
        if offers(curvature, "at_step"):
            curvature = curvature.at_step(self.state["step"])
        operator: PyTorchLinearOperator = curvature(linearized.linearizations)
        return operator

    def _estimate(self, linearized: LinearizedLoss, due: bool) -> Any:
        """Return the operator: a new estimate if due, else the one that was saved."""
        operator = self._build(linearized)
        if self.average is not None:
            _check_averageable(operator)
        if self.intervals != Intervals():
            _check_storable(operator, self.intervals)
        if due and self.average is not None:
            self.state["average"] = self.average.update(operator, self.state["average"])
        elif due and self.intervals.curvature > 1:
            self.state["average"] = operator.tensors()
        average = self.state["average"]
        return operator if average is None else _rebuilt(operator, average)

    def _choose(self, operator: Any) -> None:
        """Set the operator to invert from now on."""
        self._inverted, self._inverse = operator, None
        if self.intervals.inverse > 1:
            self.state["inverted"] = operator.tensors()


def _check_averageable(operator: Any) -> None:
    if not offers(operator, *STORED, "identity"):
        raise TypeError(
            "An average needs an operator with the methods tensors, with_tensors and "
            f"identity, got {type(operator).__name__}. Pass average=None."
        )


def _check_storable(operator: Any, intervals: Intervals) -> None:
    if not offers(operator, *STORED):
        raise TypeError(
            "An interval above 1 needs an operator with tensors of its own, that is with the "
            "methods tensors and with_tensors, or neither a checkpoint nor a chunked objective "
            f"could go on with it in a later step, got {type(operator).__name__} with "
            f"{intervals}. Set intervals=Intervals(), the default."
        )


def _rebuilt(operator: Any, tensors: Sequence[Tensor]) -> Any:
    """Return an operator with saved tensors."""
    return operator.with_tensors(fitted(tensors, operator))


def _with_damping(inverse: Inverse, damping: float) -> Inverse:
    """Return the inverse with another damping."""
    return inverse if inverse.damping == damping else replace(inverse, damping=damping)  # type: ignore[type-var]
