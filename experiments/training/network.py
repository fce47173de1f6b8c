"""Networks by widths and activation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from experiments.training.errors import UserError, first_line


class Sine(nn.Module):
    """The sine as an activation."""

    def forward(self, x: Tensor) -> Tensor:
        """Return sin(x)."""
        return torch.sin(x)


ACTIVATIONS = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "sin": Sine,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


def build_network(
    widths: Sequence[int], activation: str, seed: int, dtype: torch.dtype, device: torch.device
) -> nn.Sequential:
    """Return a multilayer perceptron with torch's default initialization.

    Args:
        widths: Widths of input, hidden layers and output.
        activation: One of ``ACTIVATIONS``, after every layer but the last.
        seed: Seed of the initialization, which is drawn on the CPU in ``dtype``.
        dtype: Type of the parameters.
        device: Where the network ends up.

    Raises:
        UserError: If it does not fit into memory, or the device does not know the type.
    """
    try:
        return _build_network(widths, activation, seed, dtype, device)
    except (RuntimeError, TypeError, MemoryError) as error:
        raise UserError(
            f"the network {'-'.join(map(str, widths))} cannot be built ({first_line(error)}). "
            "Change --hidden, --dtype or --device."
        ) from error


def _build_network(
    widths: Sequence[int], activation: str, seed: int, dtype: torch.dtype, device: torch.device
) -> nn.Sequential:
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out, dtype=dtype), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1]).to(device)
