"""How far an approximation takes the training from here, with everything else the same."""

from __future__ import annotations

import copy

from experiments.comparing.operators import Entry
from pinncurv.curvature import Objective
from pinncurv.optim import CurvatureOptimizer, DampingRule, QuadraticModel


def continued_loss(
    objective: Objective, entry: Entry, damping: float, steps: int, rule: DampingRule
) -> float:
    """Return the loss after further steps of a copy of the network on the same points.

    θ ← θ - α (P + λI)⁻¹∇L + μ δ,  with α and μ from the exact quadratic model

    Args:
        objective: The loss.
        entry: How to build P and to invert it.
        damping: λ of the first step.
        steps: How many steps, at least one.
        rule: How λ changes.
    """
    model = copy.deepcopy(objective.model)
    loss = Objective(model, objective.terms, objective.points, objective.chunk_size)
    optimizer = CurvatureOptimizer(
        model.parameters(),
        entry.curvature,
        entry.inverse(damping),
        QuadraticModel(),
        damping_rule=rule,
    )
    return [optimizer.step(loss).new_loss for _ in range(steps)][-1]
