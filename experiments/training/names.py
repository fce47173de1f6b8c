"""What can be chosen by name: for the command line one of the names, for mypy a string."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Literal

from experiments.training.network import ACTIVATIONS
from experiments.training.optimizers import Presets
from experiments.training.problems import PROBLEMS

if TYPE_CHECKING:
    ActivationName = str
    OptimizerName = str
    ProblemName = str
else:
    ActivationName = Literal[tuple(ACTIVATIONS)]
    OptimizerName = Literal[tuple(field.name.replace("_", "-") for field in fields(Presets))]
    ProblemName = Literal[tuple(PROBLEMS)]
