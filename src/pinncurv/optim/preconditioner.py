"""The curvature over the steps: estimated, averaged, and inverted when it is due."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pinncurv.optim.identity import names_of
from pinncurv.optim.protocols import Curvature, Inverse, LinearizedLoss, offers

STORED = ("tensors", "with_tensors")  # what an operator offers that can be kept over steps

Start = Callable[[Any], list[Tensor]]


def from_identity(operator: Any) -> list[Tensor]:
    """Start from the identity: for KFAC, from identity factors."""
    return operator.identity().tensors()


def from_zero(operator: Any) -> list[Tensor]:
    """Start from zero."""
    return [torch.zeros_like(tensor) for tensor in operator.tensors()]


def from_first(operator: Any) -> list[Tensor]:
    """Start from the first estimate."""
    return operator.tensors()


@dataclass(frozen=True)
class ExponentialAverage:
    """Average the tensors that define an operator over the steps.

    T̄_k = β T̄_{k-1} + (1 - β) T_k

    For KFAC these are the factors A and B, for dense operators the matrix.

    Args:
        decay: β, in [0, 1).
        start: T̄_0 as a function of the first operator: ``from_identity``, ``from_zero`` or
            ``from_first``.

    Raises:
        ValueError: If the decay is not in [0, 1).
    """

    decay: float
    start: Start = from_zero

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"The decay of an average must be in [0, 1), got {self.decay}. 0 keeps no history."
            )

    def update(self, operator: Any, average: list[Tensor] | None) -> list[Tensor]:
        """Return the average after one more operator.

        Args:
            operator: The new estimate.
            average: The average so far, in the order of its tensors; None at the start.
        """
        previous = self.start(operator) if average is None else average
        return [
            torch.lerp(tensor, old, self.decay)
            for tensor, old in zip(operator.tensors(), previous, strict=True)
        ]


def named(operator: Any, parameters: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors that define an operator, by names of parameters and terms."""
    tensors = operator.tensors()
    if offers(operator, "tensor_names"):
        names = operator.tensor_names(parameters)
    else:
        names = [f"tensor {i} of {', '.join(parameters)}" for i in range(len(tensors))]
    return dict(zip(names, tensors, strict=True))


def fitted(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> list[Tensor]:
    """Return saved tensors in order, dtype and on the device of those that define an operator.

    Raises:
        ValueError: If their names or shapes differ.
    """
    expected, got = ({name: list(t.shape) for name, t in part.items()} for part in (present, saved))
    if expected != got:
        differences = [
            f"{name}: {got.get(name, 'missing')} instead of {expected.get(name, 'nothing')}"
            for name in {**expected, **got}
            if expected.get(name) != got.get(name)
        ]
        raise ValueError(
            "The curvature that was saved or averaged must have the tensors of the present one, "
            f"by names and shapes, but they differ in {len(differences)}: "
            f"{'; '.join(differences[:3])}. It belongs to another network, curvature, set of terms "
            "or choice of frozen layers: build a new optimizer."
        )
    return [saved[name].to(tensor) for name, tensor in present.items()]


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
        if min(self.curvature, self.inverse) < 1:
            raise ValueError(
                f"Intervals must be at least 1, got {self.curvature} for the curvature and "
                f"{self.inverse} for the inverse. 1 refreshes in every step."
            )


_EVERY_STEP = Intervals()


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
        average: ExponentialAverage | None = None,
        intervals: Intervals = _EVERY_STEP,
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
            "rows": 0,
            "names": None,
        }
        self.forget()

    @property
    def damping(self) -> float:
        """λ, which a damping rule may change."""
        damping: float = self.state["damping"]
        return damping

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go to a saved state; operators are rebuilt from it."""
        saved = dict(state)
        self.state.clear()  # in place: the optimizer's state dictionary holds this one too
        self.state.update(saved)
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs: all but the operators, which it rebuilds."""
        return {**vars(self), "_operator": None, "_inverted": None, "_inverse": None}

    def forget(self) -> None:
        """Drop the operators, to be rebuilt from the state."""
        self._operator: Any = None
        self._inverted: Any = None  # what is inverted: an older one, where intervals differ
        self._inverse: tuple[float, Any] | None = None  # with its damping
        self._like: Any = None  # device, dtype and names of the parameters that they act on

    def refresh(self, linearized: LinearizedLoss) -> None:
        """Estimate and average the curvature, and choose what to invert, where due.

        Raises:
            TypeError: If the operator lacks what an average or an interval above one needs.
        """
        state, names = self.state, names_of(linearized)
        like = (linearized.parameters[0].device, linearized.parameters[0].dtype, names)
        if like != self._like:
            self.forget()
            self._like = like
        due = state["step"] % self.intervals.curvature == 0
        if due or self._operator is None:
            operator = self._build(linearized)
            self._check(operator)
            if due and self.average is not None:
                present, known = named(operator, names), state["average"]
                previous = None if known is None else fitted(known, present)
                averaged = self.average.update(operator, previous)
                state["average"] = dict(zip(present, averaged, strict=True))
                operator = operator.with_tensors(averaged)
            elif due and self.intervals.curvature > 1:
                state["average"] = named(operator, names)
            elif not due:
                operator = _rebuilt(operator, state["average"], names)
            self._operator = operator
        if state["step"] % self.intervals.inverse == 0:
            self._inverted, self._inverse = self._operator, None
            if self.intervals.inverse > 1:
                state["inverted"] = named(self._operator, names)
        elif self._inverted is None:  # loaded between two inversions
            self._inverted = _rebuilt(self._operator, state["inverted"], names)

    def relinearize(self, linearized: LinearizedLoss) -> None:
        """Build a matrix-free operator again, on a linearization that replaces this step's."""
        if not offers(self._operator, *STORED):
            self._operator = self._inverted = self._build(linearized)
            self._inverse = None

    @property
    def is_kept(self) -> bool:
        """Whether the operator stays valid, as J does, when parameters are moved and restored."""
        return offers(self._operator, *STORED) or offers(self._operator, "jacobian")

    def release(self) -> None:
        """Drop the operators if the next step builds them anew, to free their memory."""
        if self.intervals == _EVERY_STEP:
            self.forget()

    def invert(self, damping: float | None = None) -> Any:
        """Return the inverse with a damping, by default λ, computed when either has changed."""
        damping = self.state["damping"] if damping is None else damping
        recipe = self.inverse
        if self._inverse is None or self._inverse[0] != damping:
            if recipe.damping != damping:
                recipe = replace(recipe, damping=damping)  # type: ignore[type-var]
            with torch.enable_grad():  # as in a call of the user's own, for any curvature
                self._inverse = damping, recipe(self._inverted)
        return self._inverse[1]

    def _build(self, linearized: LinearizedLoss) -> Any:
        at_step = getattr(self.curvature, "at_step", None)
        curvature = self.curvature if at_step is None else at_step(self.state["step"])
        with torch.enable_grad():
            return curvature(linearized.linearizations)

    def _check(self, operator: Any) -> None:
        """Check that the operator can be averaged, and kept over steps, where that is wanted."""
        if self.average is not None and not offers(operator, *STORED, "identity"):
            raise TypeError(
                "An average needs an operator with the methods tensors, with_tensors and "
                f"identity, got {type(operator).__name__}. Pass average=None."
            )
        if self.intervals != _EVERY_STEP and not offers(operator, *STORED):
            raise TypeError(
                "An interval above 1 needs an operator with tensors of its own, that is with the "
                "methods tensors and with_tensors, or neither a checkpoint nor a chunked objective "
                f"could go on with it in a later step, got {type(operator).__name__} with "
                f"{self.intervals}. Set intervals=Intervals(), the default."
            )


def _rebuilt(operator: Any, saved: Mapping[str, Tensor] | None, names: Sequence[str]) -> Any:
    """Return an operator with saved tensors, if there are any."""
    if saved is None:
        return operator
    return operator.with_tensors(fitted(saved, named(operator, names)))
