"""Checks before a run that its dense matrices fit, lest it be killed in the first step."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch.nn import Parameter

from experiments.training.errors import UserError

# The matrix, its factorization, and the workspace in between.
_COPIES = 3


def check_dense_curvature(parameters: Sequence[Parameter]) -> None:
    """Check that matrices on the space of all parameters fit into the device's memory.

    Args:
        parameters: The parameters.

    Raises:
        UserError: If they do not.
    """
    dimension = sum(parameter.numel() for parameter in parameters)
    needed = _COPIES * dimension**2 * parameters[0].element_size()
    present = _memory(parameters[0].device)
    if present is not None and needed > present:
        raise UserError(
            f"The full Gauss-Newton matrix of {dimension} parameters needs about "
            f"{needed / 2**30:.0f} GiB of memory, and there are {present / 2**30:.0f}. Choose "
            "other --optimizers, e.g. kfac-star, engd-per-layer or adam, or fewer --hidden units."
        )


def _memory(device: torch.device) -> int | None:
    """Return the memory of a device in bytes; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
