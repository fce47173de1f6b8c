"""Disks, uniform points in them and on their circles, and outward normals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pinncurv.problems.samplers import Drawn


@dataclass(frozen=True)
class Disk:
    """A disk in the plane.

    {x : |x - center| <= radius}

    Args:
        center: The center.
        radius: The radius.

    Raises:
        ValueError: If the center is no point of the plane, or the radius is not positive.
    """

    center: Sequence[float] = (0.0, 0.0)
    radius: float = 1.0

    def __post_init__(self) -> None:
        """Store the center as a tuple of floats and check it and the radius."""
        object.__setattr__(self, "center", tuple(float(c) for c in self.center))
        if len(self.center) != 2 or not all(map(math.isfinite, self.center)):
            raise ValueError(
                f"The center of a disk must be two finite numbers, got {self.center}. Pass (x, y)."
            )
        if not 0 < self.radius < math.inf:
            raise ValueError(
                f"The radius of a disk must be a positive, finite number, got {self.radius}. "
                "Pass half of the diameter."
            )

    @property
    def dim(self) -> int:
        """Dimension of a point."""
        return 2

    def interior(self, n: int) -> Drawn:
        """Return a sampler of n points, uniform in the disk."""
        return Drawn(self._inside, n, 2)

    def boundary(self, n: int) -> Drawn:
        """Return a sampler of n points, uniform on the circle."""
        return Drawn(self._on_circle, n, 2)

    def normal(self, x: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
        """Return the outward unit normals (x - center) / |x - center| at points of the circle."""
        offset = x - x.new_tensor(self.center)
        return offset / offset.norm(dim=1, keepdim=True)

    def _inside(self, n: int, generator: Generator) -> Tensor:
        share = torch.rand(n, 1, generator=generator, dtype=torch.float64, device=generator.device)
        center = share.new_tensor(self.center)
        return center + share.sqrt() * (self._on_circle(n, generator) - center)

    def _on_circle(self, n: int, generator: Generator) -> Tensor:
        turn = torch.rand(n, generator=generator, dtype=torch.float64, device=generator.device)
        angle = 2 * math.pi * turn
        unit = torch.stack([angle.cos(), angle.sin()], 1)
        return unit.new_tensor(self.center) + self.radius * unit
