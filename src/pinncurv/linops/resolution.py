"""Dampings that are smaller than what rounding makes of the matrix that they are added to."""

from __future__ import annotations

import warnings
from math import ceil, log10

import torch


class DampingBelowResolution(UserWarning):
    """A damping is smaller than what rounding makes of the matrix that it is added to."""


def resolved_damping(trace: float, dtype: torch.dtype) -> float:
    """Return the power of ten above ε tr C, a damping that rounding of C does not outweigh.

    Args:
        trace: tr C of a positive semidefinite C.
        dtype: The data type that C is known in, whose precision is ε.
    """
    smallest = torch.finfo(dtype).eps * trace
    return 10.0 ** ceil(log10(smallest)) if smallest > 0 else 0.0


def warn_below_resolution(
    damping: float, trace: float, dtype: torch.dtype, parameters: torch.dtype | None = None
) -> None:
    """Warn of a damping below ε tr C, and name one that would do.

    Numbers are rounded to powers of ten, so that Python shows the warning once in a training run.

    Args:
        damping: λ > 0.
        trace: tr C.
        dtype: The data type that C is known in.
        parameters: That of the parameters, if it may be another one.
    """
    higher = "parameters of a higher precision"
    if parameters not in (None, dtype):
        higher = f"form it in that of the parameters, {parameters}, without single=True"
    enough = resolved_damping(trace, dtype)
    if damping < enough / 10:
        warnings.warn(
            f"A damping below {enough:.0e} is less than rounding in {dtype} makes of the matrix "
            f"that it is added to, got {damping:.1e}. Pass {enough:.0e}, or {higher}.",
            DampingBelowResolution,
            stacklevel=4,
        )
