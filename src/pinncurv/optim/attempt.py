"""An update to try, the quadratic model along it, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pinncurv.optim.protocols import LinearizedLoss, StepRecord
from pinncurv.optim.step_sizes import Proposal
from pinncurv.optim.trial import Trial


@dataclass(frozen=True)
class Parabola:
    """The damped quadratic model along an update v; NaN where nobody needs it.

    m(sv) = m(0) + s ∇Lᵀv + ½ s² vᵀ(JᵀJ + λI)v

    Args:
        slope: ∇Lᵀv.
        curvature: vᵀ(JᵀJ + λI)v.
    """

    slope: float = math.nan
    curvature: float = math.nan

    @classmethod
    def promising(
        cls, decrease: float, gradient: Sequence[Tensor], v: Sequence[Tensor]
    ) -> Parabola:
        """Return the model whose decrease m(0) - m(v) is known."""
        slope = _dot(gradient, v)
        return cls(slope, -2 * (decrease + slope))

    @classmethod
    def along(
        cls,
        linearized: LinearizedLoss,
        gradient: Sequence[Tensor],
        v: Sequence[Tensor],
        damping: float,
    ) -> Parabola:
        """Return the model by one product with J."""
        image = linearized.jacobian @ list(v)
        return cls(_dot(gradient, v), _dot(image, image) + damping * _dot(v, v))

    def decrease(self, scale: float) -> float:
        """Return m(0) - m(scale · v)."""
        return -scale * (self.slope + 0.5 * scale * self.curvature)


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return float(torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum())


@dataclass(frozen=True, eq=False)
class Attempt:
    """An update to try.

    Args:
        term_losses: The terms of the loss before it.
        damping: λ.
        direction: Δ.
        proposal: α and μ.
        update: lr (α Δ + μ δ).
        model: The model along the update.
        solver: What the inverse reports.
    """

    term_losses: dict[str, float]
    damping: float
    direction: list[Tensor]
    proposal: Proposal
    update: list[Tensor]
    model: Parabola
    solver: dict[str, Any]

    def make(self, trial: Trial, scales: Iterable[float]) -> StepRecord:
        """Apply the update; shorten it while the loss rises, or reject it.

        Args:
            trial: Moves the parameters, which come back if the update is rejected.
            scales: Which multiples to try, one after the other.

        Returns:
            What happened.
        """
        loss = sum(self.term_losses.values())
        scale, new_loss = math.nan, math.nan
        for scale in scales:
            new_loss = trial.move(self.update, scale, limit=loss if scale < 1 else None)
            if new_loss <= loss:  # False for NaN
                break
        moved = new_loss < loss or trial.moved
        accepted = math.isfinite(new_loss) and new_loss <= loss and moved
        if not accepted:
            trial.restore()
        taken = scale if accepted else 0.0
        return StepRecord(
            loss=loss,
            term_losses=self.term_losses,
            new_loss=new_loss if accepted else loss,
            step_size=self.proposal.step_size * taken if accepted else 0.0,
            momentum=self.proposal.momentum * taken if accepted else 0.0,
            damping=self.damping,
            predicted_decrease=self.model.decrease(scale if accepted else 1.0),
            accepted=accepted,
            reason=_reason(accepted, moved, scale, new_loss),
            scale=taken,
            solver=self.solver,
        )


def _reason(accepted: bool, moved: bool, scale: float, new_loss: float) -> str:
    """Say why a step was not taken as proposed."""
    if accepted:
        return f"shortened to {scale:g} of its length (more raised the loss)" if scale < 1 else ""
    if not moved:
        return f"rejected: at {scale:g} of its length, the update no longer moves the parameters"
    what = "raised the loss" if math.isfinite(new_loss) else "made the loss non-finite"
    return f"rejected: the update {what} even at {scale:g} of its length"
