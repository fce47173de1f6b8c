"""Where a gradient is not finite though the loss is: at guarded singularities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from pinncurv.linearization import Linearization


def raise_for_gradient(linearizations: Sequence[Linearization]) -> NoReturn:
    """Name the terms and the points where rows of the Jacobian are not finite.

    Args:
        linearizations: The terms, whose residuals are finite but whose gradient is not.

    Raises:
        FloatingPointError: Always.
    """
    found = [text for text in map(_describe, linearizations) if text]
    raise FloatingPointError(
        "The gradient of the loss must be finite, as the loss is, but "
        f"{'; '.join(found) or 'it overflows as a sum over the points'}. Keep the argument of "
        "functions like sqrt, norm, log, a division or a fractional power away from where their "
        "derivative is infinite: torch.where behind them hides the value, not the derivative, so "
        "guard the argument, as in torch.sqrt(torch.where(s > 0, s, 1))."
    )


def _describe(linearization: Linearization) -> str:
    """Say at how many points of a term rows are not finite, and which is the first; '' if none."""
    bad = []
    for chunk in (part.slope or part for part in linearization):
        finite = torch.ones_like(chunk.residual[:, 0], dtype=torch.bool)
        for block in chunk.blocks.values():
            ones = [chunk.residual.new_ones(1, *shape) for shape in block.shapes]
            finite &= block.product(ones).isfinite().all(2).all(0)
        bad.append(~finite)
    places = torch.cat(bad).nonzero().flatten().tolist()
    if not places:
        return ""
    x = linearization.x
    return (
        f"that of term '{linearization.term.name}' is not at {len(places)} of {len(x)} points, the "
        f"first of them x[{places[0]}] = {x[places[0]].tolist()}"
    )
