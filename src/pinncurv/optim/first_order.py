"""Optimizers of torch, stepped like ours."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from pinncurv.optim.identity import (
    check_no_stray_gradients,
    check_numbers,
    merged,
    names_in_groups,
)
from pinncurv.optim.optimizer import CurvatureOptimizer
from pinncurv.optim.progress import Progress
from pinncurv.optim.protocols import StepRecord, finite_loss, offers


class FirstOrder:
    """Steps any optimizer of torch (SGD, Adam, L-BFGS, ...) on an objective.

    A step differentiates its objective itself: gradients that somebody left in ``.grad`` are an
    error, and it leaves none.

    Args:
        optimizer: The optimizer, of all or some of the objective's parameters.

    Raises:
        TypeError: If it is none of torch's, or a CurvatureOptimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, CurvatureOptimizer):
            got = getattr(optimizer, "__name__", type(optimizer).__name__)
            raise TypeError(
                "FirstOrder must be given an optimizer of torch, for example "
                f"torch.optim.Adam(objective.parameters()), got {got}. A CurvatureOptimizer, such "
                "as a preset makes, takes steps on objectives itself."
            )
        self.optimizer = optimizer
        self._names: list[str | None] | None = None  # of the parameters, once an objective is known
        self._loaded = False
        self._progress = Progress(first_order=True)

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
            ValueError: If a parameter has a gradient already, or the state that was loaded belongs
                to parameters of other names.
        """
        if not offers(objective, "backward"):
            raise TypeError(
                "A step must be given an objective with the method backward, such as "
                f"pinncurv.Objective, got {type(objective).__name__}."
            )
        groups = self.optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        check_no_stray_gradients(parameters)
        if offers(objective, "named_parameters"):
            names = names_in_groups(groups, objective.named_parameters())
            self._names = merged(self._names, names, self._loaded)
        evaluations: list[dict[str, float]] = []

        def closure() -> float:
            self.optimizer.zero_grad()
            with torch.enable_grad():
                losses = objective.backward()
            evaluations.append({name: float(loss) for name, loss in losses.items()})
            if len(evaluations) == 1:
                finite_loss(evaluations[0])  # before the parameters are touched
            return sum(evaluations[-1].values())

        mine, others = {id(p) for p in parameters}, []
        if offers(objective, "named_parameters"):
            others = [p for _, p in objective.named_parameters() if id(p) not in mine]
        gradients = [p.grad for p in others]  # somebody else's
        before = [p.detach().clone() for p in parameters]
        try:
            for parameter in others:
                parameter.grad = None
            self.optimizer.step(closure)
        except BaseException:  # in a later evaluation, the parameters have moved
            with torch.no_grad():
                for parameter, old in zip(parameters, before, strict=True):
                    parameter.copy_(old)
            raise
        finally:
            self.optimizer.zero_grad()
            for parameter, gradient in zip(others, gradients, strict=True):
                parameter.grad = gradient
        self._loaded = False
        first = evaluations[0]
        record = StepRecord(
            loss=sum(first.values()),
            term_losses=first,
            step_size=float(self.optimizer.param_groups[0]["lr"]),
            solver={"evaluations": len(evaluations)},
        )
        self._progress.observe(record)
        return record

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer, with its class and its parameters' names."""
        state = self.optimizer.state_dict()
        return {**state, "optimizer": type(self.optimizer).__name__, "names": self._names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of the optimizer; the next step checks the names of the parameters.

        Raises:
            ValueError: If it is of another class, or a number in it is NaN.
        """
        present = type(self.optimizer).__name__
        if state_dict.get("optimizer") != present:
            raise ValueError(
                f"The state must come from a FirstOrder of the same class, {present}, got "
                f"{state_dict.get('optimizer')}. Load a state of torch's own into its optimizer."
            )
        check_numbers(state_dict)
        self.optimizer.load_state_dict(state_dict)
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for i, parameter in zip(indices, parameters, strict=True):
            for name, saved in state_dict["state"].get(i, {}).items():
                # torch rounds to the parameters' dtype what has its own, as NAdam's mu_product
                if isinstance(saved, torch.Tensor) and (
                    name == "mu_product" or saved.dim() < parameter.dim()
                ):
                    loaded = self.optimizer.state[parameter][name]
                    self.optimizer.state[parameter][name] = saved.to(loaded.device, copy=True)
        self._names, self._loaded = state_dict["names"], True

    def zero_grad(self) -> None:
        """Drop gradients that somebody left."""
        self.optimizer.zero_grad()
