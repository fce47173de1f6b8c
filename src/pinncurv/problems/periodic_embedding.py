"""A first layer that makes any network periodic."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from pinncurv.problems.problem import TensorOrJet


class PeriodicEmbedding(nn.Module):
    """Sines and cosines of periodic coordinates; the others pass.

    x_i -> cos(2π m x_i / period_i), sin(2π m x_i / period_i),    m = 1, ..., modes

    A network of its values has all derivatives periodic: `nn.Sequential(embedding, network)`.

    Args:
        periods: The period of each coordinate, None for those that are not periodic.
        modes: The number of multiples of the lowest frequency.

    Attributes:
        d_out: The number of values: one for each coordinate that passes, 2 modes for each other.

    Raises:
        ValueError: If no coordinate is periodic, a period is not positive, or there is no mode.
    """

    def __init__(self, periods: Sequence[float | None], modes: int = 1) -> None:
        super().__init__()
        given = [period for period in periods if period is not None]
        if not given or not all(0 < period < math.inf for period in given):
            raise ValueError(
                "The periods must be positive numbers, or None for coordinates that are not "
                f"periodic, and at least one a number, got {tuple(periods)}. Pass e.g. (None, 2.0) "
                "for (t, x) with x in [-1, 1]."
            )
        if modes < 1:
            raise ValueError(f"There must be at least one mode, got modes={modes}. Pass 1.")
        self.periods, self.modes = tuple(periods), modes
        self.d_out = len(self.periods) - len(given) + 2 * modes * len(given)

    def forward(self, x: TensorOrJet) -> TensorOrJet:
        """Embed points [N, d], giving [N, d_out]."""
        if x.shape[1] != len(self.periods):
            raise ValueError(
                f"Points must have {len(self.periods)} coordinates, one for each period, got shape "
                f"{list(x.shape)}. Pass one period, or None, per coordinate."
            )
        columns = []
        for i, period in enumerate(self.periods):
            column = x[:, i : i + 1]
            if period is None:
                columns.append(column)
                continue
            # numbers, as a buffer would lose digits on its way from float32 to float64
            angles = [column * (2 * math.pi * m / period) for m in range(1, self.modes + 1)]
            angle = torch.cat(angles, 1)
            columns += [torch.cos(angle), torch.sin(angle)]
        return torch.cat(columns, 1)

    def extra_repr(self) -> str:
        return f"periods={self.periods}, modes={self.modes}"
