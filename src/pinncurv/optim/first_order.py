"""Optimizers of torch, stepped like ours."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from pinncurv.optim.protocols import StepRecord, finite_loss, offers


class FirstOrder:
    """Steps any optimizer of torch (SGD, Adam, L-BFGS, ...) on an objective.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, objective: Any) -> StepRecord:
        """Take one step on one batch.

        Args:
            objective: The loss on this batch.

        Returns:
            What happened; the loss is that of the first evaluation.

        Raises:
            FloatingPointError: If the loss or its gradient is not finite; names the terms. The
                parameters are those of before.
            TypeError: If the objective has no ``backward``.
        """
        if not offers(objective, "backward"):
            raise TypeError(
                "A step must be given an objective with the method backward, such as "
                f"pinncurv.Objective, got {type(objective).__name__}."
            )
        evaluations: list[dict[str, float]] = []

        def closure() -> float:
            self.optimizer.zero_grad()
            with torch.enable_grad():
                losses = objective.backward()
            evaluations.append({name: float(loss) for name, loss in losses.items()})
            if len(evaluations) == 1:
                finite_loss(evaluations[0])  # before the parameters are touched
            return sum(evaluations[-1].values())

        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in parameters]
        try:
            self.optimizer.step(closure)
        except BaseException:  # in a later evaluation, the parameters have moved
            with torch.no_grad():
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
            raise
        first = evaluations[0]
        return StepRecord(
            loss=sum(first.values()),
            term_losses=first,
            step_size=float(self.optimizer.param_groups[0]["lr"]),
            solver={"evaluations": len(evaluations)},
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the optimizer."""
        self.optimizer.load_state_dict(state_dict)
