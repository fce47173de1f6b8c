"""One optimizer at work on one problem, with all of its state."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from experiments.training.metrics import Value
from experiments.training.network import build_network
from experiments.training.settings import DTYPES, Settings
from pinncurv.curvature import Objective
from pinncurv.optim import StepRecord
from pinncurv.problems import Errors, Problem


class Trainer:
    """A network, its optimizer, the current batch, and how far they have come.

    Args:
        name: Name of the optimizer.
        settings: The resolved settings.
        problem: The problem.
        device: Where to compute.
    """

    def __init__(
        self, name: str, settings: Settings, problem: Problem, device: torch.device
    ) -> None:
        self.name = name
        self.problem = problem
        self.device = device
        self.dtype = DTYPES[settings.dtype]
        self.widths = (problem.d_in, *settings.hidden, problem.d_out)
        self.model = build_network(
            self.widths,
            settings.activation,
            settings.seeds.initialization,
            self.dtype,
            device,
        )
        self.optimizer = settings.preset(name).build(self.model.parameters())
        self.step = 0
        self.seconds = 0.0
        self.rejected = 0
        self._resample_every = settings.resample_every
        self._chunk_size = settings.chunk_size
        self._generator = torch.Generator().manual_seed(settings.seeds.points)
        self._draw()
        evaluation = torch.Generator().manual_seed(settings.seeds.evaluation)
        self._evaluation_points = problem.evaluation.sample(evaluation, self.dtype, device)

    def describe(self, *details: str) -> str:
        """Return what is trained, in a few words.

        Args:
            details: What else is to be said of the network.
        """
        count = sum(parameter.numel() for parameter in self.model.parameters())
        network = "-".join(map(str, self.widths))
        said = ", ".join((f"{count} parameters", *details))
        return f"{self.problem.name}, network {network} ({said})"

    def advance(self) -> StepRecord:
        """Take one step, on new points if they are due, and count its time.

        Raises:
            FloatingPointError: If the loss was not finite before the step.
        """
        self._synchronize()
        start = time.perf_counter()
        if self._resample_every and self.step and self.step % self._resample_every == 0:
            self._draw()
        record = self.optimizer.step(self.objective)
        self._synchronize()
        self.seconds += time.perf_counter() - start
        self.step += 1
        self.rejected += not record.accepted
        return record

    @torch.no_grad()
    def measure(self, record: StepRecord | None) -> dict[str, Value]:
        """Return a row of the metrics: where the parameters are now, and what the last step did.

        Args:
            record: The record of the last step; None before the first.
        """
        terms = {name: float(loss) for name, loss in self.objective.term_losses().items()}
        errors = self._errors()
        record = record or StepRecord(math.nan, {}, momentum=math.nan)
        return {
            "step": self.step,
            "seconds": self.seconds,
            "loss": sum(terms.values()),
            **{f"loss_{name}": loss for name, loss in terms.items()},
            "rmse": errors.rmse,
            "relative_error": errors.relative,
            "step_size": record.step_size,
            "momentum": record.momentum,
            "damping": record.damping,
            "rejected": self.rejected,
            "accepted": record.accepted,
            "reason": record.reason,
        }

    def check_finite(self) -> None:
        """Check that the parameters are worth keeping.

        Raises:
            FloatingPointError: If one of them is not finite.
        """
        bad = [name for name, p in self.model.named_parameters() if not p.isfinite().all()]
        if bad:
            raise FloatingPointError(
                f"After step {self.step}, {', '.join(bad)} contains NaN or infinity."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return all that is needed to continue exactly."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "rejected": self.rejected,
            "before_batch": self._before_batch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._generator.set_state(state["before_batch"])
        self._draw()
        self.step = state["step"]
        self.seconds = state["seconds"]
        self.rejected = state["rejected"]

    def _draw(self) -> None:
        """Draw a batch, and remember how to draw the same one again."""
        self._before_batch = self._generator.get_state()
        points = self.problem.sample(self._generator, self.dtype, self.device)
        self.objective = Objective(self.model, self.problem.terms, points, self._chunk_size)

    def _errors(self) -> Errors:
        if self.problem.solution is None:
            return Errors(math.nan, math.nan)
        return self.problem.errors(self.model, self._evaluation_points)

    def _synchronize(self) -> None:
        """Wait for the device, so that the clock counts what was computed."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
