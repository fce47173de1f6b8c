"""The device and the threads that a program computes with."""

from __future__ import annotations

import torch

from experiments.training.errors import UserError, first_line
from experiments.training.settings import ProblemSettings

_DEVICES = ("cpu", "cuda", "mps")


def set_up_device(settings: ProblemSettings) -> torch.device:
    """Set the number of threads, and return a device that works.

    Args:
        settings: The resolved settings.

    Raises:
        UserError: If the device does not exist here.
    """
    torch.set_num_threads(settings.threads or 1)
    try:
        device = torch.device(settings.device)
        if device.type not in _DEVICES:
            raise NotImplementedError(f"it is none of {', '.join(_DEVICES)}")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {settings.device} cannot be used here ({first_line(error)}). Use cpu"
            f"{' or cuda' if torch.cuda.is_available() else ''}."
        ) from error
    return device
