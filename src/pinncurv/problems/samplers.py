"""What a sampler of points is, and samplers made from given points and from other samplers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor


@runtime_checkable
class Sampler(Protocol):
    """Draws n points of dimension dim, with explicit randomness."""

    @property
    def n(self) -> int:
        """Number of points of one sample."""

    @property
    def dim(self) -> int:
        """Dimension of a point."""

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """Draw one sample of shape [n, dim]."""


def is_fixed(sampler: Sampler) -> bool:
    """Whether every sample of a sampler is the same, so that tensors may belong to its points.

    A sampler of one's own says so by an attribute ``fixed = True``.
    """
    if isinstance(sampler, Product | Union):
        return all(
            map(is_fixed, sampler.factors if isinstance(sampler, Product) else sampler.parts)
        )
    return isinstance(sampler, Fixed) or bool(getattr(sampler, "fixed", False))


def check_count(n: int) -> None:
    """Check a number of points.

    Raises:
        ValueError: If it is no positive integer.
    """
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(
            f"The number of points must be an int of at least 1, got n={n!r}. Raise n."
        )


@dataclass(frozen=True)
class Drawn:
    """Points that a function draws.

    x = draw(n, generator)

    Args:
        draw: Returns points [n, dim] in float64 on the generator's device.
        n: The number of points.
        dim: Dimension of a point.
    """

    draw: Callable[[int, Generator], Tensor]
    n: int
    dim: int

    def __post_init__(self) -> None:
        """Check the number of points."""
        check_count(self.n)

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "{self.n} {self.dim}"]:
        """Draw the points, then cast them."""
        return self.draw(self.n, generator).to(dtype=dtype, device=device)


@dataclass(frozen=True)
class Product:
    """Points whose coordinates are those of several samplers, side by side."""

    factors: tuple[Sampler, ...]

    def __post_init__(self) -> None:
        """Check that the factors have equally many points."""
        counts = [factor.n for factor in self.factors]
        if len(set(counts)) != 1:
            raise ValueError(
                "The factors of a product must have the same number of points and there must be at "
                f"least one, got n={counts}. Build all of them with the same n."
            )

    @property
    def n(self) -> int:
        """Number of points of one sample."""
        return self.factors[0].n

    @property
    def dim(self) -> int:
        """Dimension of a point."""
        return sum(factor.dim for factor in self.factors)

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "{self.n} {self.dim}"]:
        """Draw from the factors in their order."""
        return torch.cat([factor.sample(generator, dtype, device) for factor in self.factors], 1)


@dataclass(frozen=True)
class Union:
    """The points of several samplers, one after the other."""

    parts: tuple[Sampler, ...]

    def __post_init__(self) -> None:
        """Check that the parts have points of the same dimension."""
        dims = [part.dim for part in self.parts]
        if len(set(dims)) != 1:
            raise ValueError(
                "The parts of a union must have points of the same dimension and there must be at "
                f"least one, got dim={dims}. Build all of them from domains of one dimension."
            )

    @property
    def n(self) -> int:
        """Number of points of one sample."""
        return sum(part.n for part in self.parts)

    @property
    def dim(self) -> int:
        """Dimension of a point."""
        return self.parts[0].dim

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "{self.n} {self.dim}"]:
        """Draw from the parts in their order."""
        return torch.cat([part.sample(generator, dtype, device) for part in self.parts])


@dataclass(frozen=True, eq=False)
class Fixed:
    """The user's own points: every sample is the same.

    Args:
        points: The points, [n, dim]. They are not copied; a sample is a copy of them.

    Raises:
        TypeError: If the points are no tensor.
        ValueError: If the points are no non-empty, finite matrix.
    """

    points: Tensor

    def __post_init__(self) -> None:
        """Check the points."""
        if not isinstance(self.points, Tensor):
            raise TypeError(
                f"Points must be a tensor, got {type(self.points).__name__}. Use torch.as_tensor."
            )
        shape = tuple(self.points.shape)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(
                f"Points must form a non-empty matrix [n, dim], got shape {shape}. "
                "Use points[:, None] for points on a line."
            )
        if not self.points.isfinite().all():
            raise ValueError(
                "Points must be finite, got NaN or infinite coordinates. Remove those points."
            )

    @property
    def n(self) -> int:
        """Number of points."""
        return self.points.shape[0]

    @property
    def dim(self) -> int:
        """Dimension of a point."""
        return self.points.shape[1]

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "{self.n} {self.dim}"]:
        """Return a copy of the points; the generator is not used."""
        return self.points.detach().to(dtype=dtype, device=device, copy=True)
