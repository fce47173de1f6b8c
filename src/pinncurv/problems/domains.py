"""Boxes, with and without time, uniform points in them and on their faces, and normals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from pinncurv.problems.samplers import Fixed, Product, Union, check_count


@dataclass(frozen=True)
class Box:
    """An axis-parallel box.

    {x : lower_i <= x_i <= upper_i}

    Args:
        lower: The d lower bounds.
        upper: The d upper bounds.

    Raises:
        ValueError: If the bounds are empty, differ in number, are not finite, or if a lower bound
            is not below its upper bound.
    """

    lower: Sequence[float]
    upper: Sequence[float]

    def __post_init__(self) -> None:
        """Store the bounds as tuples of floats and check them."""
        object.__setattr__(self, "lower", tuple(float(bound) for bound in self.lower))
        object.__setattr__(self, "upper", tuple(float(bound) for bound in self.upper))
        if not self.lower or len(self.lower) != len(self.upper):
            raise ValueError(
                "A box needs one lower and one upper bound per dimension and at least one "
                f"dimension, got {len(self.lower)} lower and {len(self.upper)} upper bounds. "
                "Pass two sequences of equal length."
            )
        if not all(math.isfinite(bound) for bound in (*self.lower, *self.upper)):
            raise ValueError(
                f"The bounds of a box must be finite, got lower={self.lower}, upper={self.upper}. "
                "Replace infinite or NaN bounds, e.g. by truncating the domain."
            )
        for i, (low, high) in enumerate(zip(self.lower, self.upper, strict=True)):
            if not low < high:
                raise ValueError(
                    "Every lower bound must be below its upper bound, got "
                    f"lower[{i}]={low}, upper[{i}]={high}. Swap them, or drop this dimension."
                )

    @classmethod
    def cube(cls, dim: int, lower: float, upper: float) -> "Box":
        """Return the cube [lower, upper]^dim."""
        return cls((lower,) * dim, (upper,) * dim)

    @classmethod
    def unit(cls, dim: int) -> "Box":
        """Return the unit cube [0, 1]^dim."""
        return cls.cube(dim, 0.0, 1.0)

    @property
    def dim(self) -> int:
        """Dimension of the box."""
        return len(self.lower)

    def interior(self, n: int) -> "Interior":
        """Return a sampler of n points, uniform in the box."""
        return Interior(self, n)

    def faces(self, n: int) -> "Faces":
        """Return a sampler of n points, uniform on the 2d faces."""
        return Faces(self, n)

    def normal(self, x: Float[Tensor, "N d"]) -> Float[Tensor, "N d"]:
        """Return the outward unit normals at points of the faces: those of the nearest face."""
        lower, upper = x.new_tensor(self.lower), x.new_tensor(self.upper)
        nearest = torch.cat([x - lower, upper - x], 1).abs().argmin(1)
        identity = torch.eye(self.dim, dtype=x.dtype, device=x.device)
        return torch.cat([-identity, identity])[nearest]


@dataclass(frozen=True)
class SpaceTimeBox:
    """A box in space times an interval in time; time is the first coordinate of a point.

    [start, end] x space

    Args:
        space: The box in space.
        start: The time at which the initial condition holds.
        end: The final time.

    Raises:
        TypeError: If the space is no box.
        ValueError: If the times are not finite or start is not before end.
    """

    space: Box
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        """Check space and times."""
        if not isinstance(self.space, Box):
            raise TypeError(
                f"The space must be a Box, got {type(self.space).__name__}. Write "
                "SpaceTimeBox.unit(1) or SpaceTimeBox(Box.unit(1))."
            )
        if not (math.isfinite(self.start) and math.isfinite(self.end) and self.start < self.end):
            raise ValueError(
                "Times must be finite and start before end, got "
                f"start={self.start}, end={self.end}. Pass a finite interval of positive length."
            )

    @classmethod
    def unit(cls, dim: int) -> "SpaceTimeBox":
        """Return [0, 1] x [0, 1]^dim."""
        return cls(Box.unit(dim))

    @property
    def dim(self) -> int:
        """Dimension of a point: that of space, plus one for time."""
        return 1 + self.space.dim

    @property
    def box(self) -> Box:
        """The same set as a plain box of dimension 1 + d."""
        return Box((self.start, *self.space.lower), (self.end, *self.space.upper))

    def interior(self, n: int) -> "Interior":
        """Return a sampler of n points, uniform in space and time."""
        return self.box.interior(n)

    def lateral(self, n: int) -> "Product":
        """Return a sampler of n points on the spatial faces, at uniform random times."""
        return Product((Box((self.start,), (self.end,)).interior(n), self.space.faces(n)))

    def normal(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Return the outward unit normals in space at points of `lateral`, with 0 for time."""
        return torch.cat([torch.zeros_like(x[:, :1]), self.space.normal(x[:, 1:])], 1)

    def initial(self, n: int) -> "Product":
        """Return a sampler of n points, uniform in space, at the start."""
        space = self.space.interior(n)
        return Product((Fixed(torch.full((n, 1), self.start, dtype=torch.float64)), space))

    def lateral_and_initial(self, n: int) -> "Union":
        """Return a sampler of n points: half `lateral`, half `initial` (which gets an odd one)."""
        if n < 2:
            raise ValueError(
                "Lateral and initial points together must be at least 2, one of each kind, got "
                f"n={n}. Raise n, or use lateral(n) or initial(n)."
            )
        return Union((self.lateral(n // 2), self.initial(n - n // 2)))


@dataclass(frozen=True)
class Interior:
    """n points, uniform in a box."""

    box: Box
    n: int

    def __post_init__(self) -> None:
        """Check the number of points."""
        check_count(self.n)

    @property
    def dim(self) -> int:
        """Dimension of a point."""
        return self.box.dim

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "{self.n} {self.dim}"]:
        """Draw the points on the generator's device in float64, then cast them."""
        return _uniform(self.box, self.n, generator).to(dtype=dtype, device=device)


@dataclass(frozen=True)
class Faces(Interior):
    """n points, uniform on the 2d faces of a box.

    A face is drawn with probability proportional to its area, then a point on it.
    """

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "{self.n} {self.dim}"]:
        """Draw the points on the generator's device in float64, then cast them."""
        x = _uniform(self.box, self.n, generator)
        bounds = x.new_tensor([self.box.lower, self.box.upper])
        # The area of a face is volume / (length along its normal); the volume cancels.
        axis = torch.multinomial(
            1 / (bounds[1] - bounds[0]), self.n, replacement=True, generator=generator
        )
        side = torch.randint(2, (self.n,), generator=generator, device=x.device)
        x.scatter_(1, axis[:, None], bounds[side, axis][:, None])
        return x.to(dtype=dtype, device=device)


def _uniform(box: Box, n: int, generator: Generator) -> Float[Tensor, "n d"]:
    device = generator.device
    unit = torch.rand(n, box.dim, generator=generator, dtype=torch.float64, device=device)
    lower, upper = unit.new_tensor(box.lower), unit.new_tensor(box.upper)
    return lower + (upper - lower) * unit
