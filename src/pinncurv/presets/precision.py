"""Defaults that depend on the precision of the parameters."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pinncurv.optim import DampingRule, ShortStepDamping

# Rounding moves the eigenvalues of JᵀJ by about 6e-8 ‖JᵀJ‖ in float32. With ‖JᵀJ‖ of some hundreds,
# as for the PDEs here, training stalls with a damping of 1e-6, and does not with 1e-5 or more.
SINGLE_PRECISION_DAMPING = 1e-4


def adapting(
    damping: float | None, start: float, rule: DampingRule | None
) -> tuple[float, DampingRule | None]:
    """Return damping and rule of a method that was published with a constant damping.

    A damping that is given stays, as published; the default one is raised while steps are short.

    Args:
        damping: What was given, or None.
        start: The default.
        rule: What was given, or None.
    """
    if rule is not None or damping is not None:
        return start if damping is None else damping, rule
    return start, ShortStepDamping(short=2.0**-4, long=2.0**-2, minimum=start)


def groups_of(params: Iterable[Any]) -> list[Any]:
    """Return parameters or groups that can be looked at before the optimizer gets them."""
    return [
        {**group, "params": list(group["params"])}
        if isinstance(group, dict) and not isinstance(group["params"], Tensor)
        else group
        for group in params
    ]


def default_damping(groups: list[Any], double_precision: float, single: bool = False) -> float:
    """Return the default of an exact method for the dtype of the first parameter.

    Args:
        groups: The parameter groups.
        double_precision: The default in float64.
        single: Whether the matrix is formed in float32 whatever the dtype.
    """
    if single:
        return SINGLE_PRECISION_DAMPING
    first = groups[0]["params"] if groups and isinstance(groups[0], dict) else groups
    while not isinstance(first, Tensor):
        if isinstance(first, str) or not first:
            return double_precision
        first = first[-1] if isinstance(first, tuple) else first[0]
    return double_precision if first.dtype == torch.float64 else SINGLE_PRECISION_DAMPING
