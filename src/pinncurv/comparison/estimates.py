"""Estimates from random probes, with their standard errors."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from jaxtyping import Float
from torch import Generator, Tensor


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate and how uncertain it is.

    value ± standard_error, the latter the sample standard deviation over √m for m probes

    Attributes:
        value: The estimate, a number ``[]`` or an array of numbers.
        standard_error: Its standard error, in the same units.
    """

    value: Float[Tensor, "*shape"]
    standard_error: Float[Tensor, "*shape"]

    @classmethod
    def from_samples(cls, samples: Float[Tensor, " m *shape"]) -> Estimate:
        """Return the mean of m >= 2 independent samples."""
        return cls(samples.mean(0), standard_error(samples))


def standard_error(samples: Float[Tensor, " m *shape"]) -> Float[Tensor, "*shape"]:
    """Return the standard error of the mean of m >= 2 independent samples."""
    return samples.std(0) / sqrt(len(samples))


def rademacher(
    size: int, count: int, generator: Generator, device: torch.device
) -> Float[Tensor, "size count"]:
    """Return random signs, one probe per column, in float64.

    E z zᵀ = I
    """
    bits = torch.randint(0, 2, (size, count), generator=generator, device=generator.device)
    return (2 * bits - 1).to(device, torch.float64)
