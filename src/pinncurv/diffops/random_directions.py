"""Unbiased estimates of sums of second derivatives, from a few random directions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.diffops.point_bits import point_bits
from pinncurv.jets import Derivative

_SEEDS = 1 << 63


@dataclass(frozen=True)
class RandomDirections(ABC):
    """Random directions along which an operator differentiates, instead of along all k.

    Σ_ij c_ij ∂_i∂_j u  ≈  k/m Σ_r ∂_{z_r} ∂_{c z_r} u,    E[z zᵀ] = I/k,    r = 1, ..., m

    The estimate is unbiased, with m + 2 channels instead of k + 2, or 2 m + 2 where c z_r is no
    multiple of z_r. Directions are a function of the point and the seed: a point has the same in
    the loss, its gradient, every curvature, the line search and any chunk, and another point has
    others, so that their errors average out over the points. New points have new directions; at
    points that stay, ``Objective.resampled`` draws a new seed.

    The *square* of an unbiased residual is biased: E[r̂²] = r² + Var[r̂]. A loss is that much too
    large, and its minimizer fits the solution and keeps the variance small, too. It is right where
    the variance vanishes at the solution, and otherwise the better, the more samples. The product
    of two estimates with different seeds is unbiased: ``Energy`` with the density ½ r̂₁ r̂₂. That is
    not convex, so it has a loss and a gradient, for first-order optimizers, but no Gauss-Newton
    matrix. Directions that stay can be fitted as points can: draw new points while training, and
    measure with the exact operator.

    The channels, and so KFAC, depend on the directions: they are unit vectors, so that with all
    coordinates KFAC is that of the exact operator.

    A subclass says how directions are drawn.

    Args:
        samples: m, at least 1 and at most k.
        seed: Which directions, of 64 bits.

    Raises:
        TypeError: If one is no integer.
        ValueError: If there is no sample, or the seed has more than 64 bits.
    """

    samples: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, number in (("samples", self.samples), ("seed", self.seed)):
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(
                    f"{type(self).__name__} must be made of whole numbers, got {name}={number!r} "
                    f"of type {type(number).__name__}. Write e.g. {type(self).__name__}(16)."
                )
        if self.samples < 1:
            raise ValueError(
                f"There must be 1 or more samples, got {self.samples}. Leave sampling out for the "
                "exact operator."
            )
        if not -_SEEDS <= self.seed < _SEEDS:
            raise ValueError(f"The seed must have 64 bits, got {self.seed}. Take a smaller one.")

    @abstractmethod
    def draw(self, x: Float[Tensor, "N d"], k: int) -> Float[Tensor, "m N k"]:
        """Return m unit vectors z at every point, with E[z zᵀ] = I/k.

        Args:
            x: The points.
            k: The number of coordinates, not less than m.
        """

    def redrawn(self, seed: int) -> RandomDirections:
        """Return others of the same kind; those that were equal stay equal to each other.

        Args:
            seed: A random number of at most 63 bits.
        """
        return replace(self, seed=self.seed ^ seed)

    def estimate(
        self,
        x: Float[Tensor, "N d"],
        k: int,
        embed: Callable[[Tensor], Tensor],
        matrix: Tensor | None = None,
    ) -> Derivative:
        """Return the request for the estimate of Σ_ij c_ij ∂_{b_i}∂_{b_j} u.

        Args:
            x: The points.
            k: The number of directions b_i.
            embed: From coordinates z, ``[..., N, k]``, to Σ_i z_i b_i, ``[..., N, d]``.
            matrix: c, symmetric, ``[k, k]`` or ``[N, k, k]``; None for the identity.

        Raises:
            ValueError: If there are more samples than directions.
        """
        if self.samples > k:
            raise ValueError(
                f"There must be at most as many samples as the operator has directions, {k}, got "
                f"{self.samples}. Take fewer, or leave sampling out: it is then exact and costs "
                "no more."
            )
        z, scale = self.draw(x, k), k / self.samples
        directions, r = tuple(embed(z)), range(self.samples)
        if matrix is None:
            return Derivative(directions, {(i, i): scale for i in r})
        cz = z @ matrix if matrix.ndim == 2 else torch.einsum("nij,mnj->mni", matrix, z)
        multiples = (z * cz).sum(-1)
        if torch.equal(cz, multiples[..., None] * z):  # coordinates, and a diagonal matrix
            return Derivative(directions, {(i, i): scale * multiples[i] for i in r})
        others = tuple(embed(cz))
        return Derivative(directions + others, {(i, self.samples + i): scale for i in r})


class RandomCoordinates(RandomDirections):
    """Some of the coordinates at every point, drawn without replacement.

    Δu  ≈  d/m Σ_{i in I} ∂²u/∂x_i²,    Var = d²/m (1 - m/d) s²

    with s² the sample variance of ∂²u/∂x_i² over i. It is exact where these are equal, and with all
    samples; off-diagonal derivatives don't matter. Of a matrix c it takes some rows, and of
    ``from_factors`` some columns.

    Source: Hu, Shukla, Karniadakis, Kawaguchi 2023 (arXiv 2307.12306), SDGD.
    """

    def draw(self, x: Float[Tensor, "N d"], k: int) -> Float[Tensor, "m N k"]:
        order = point_bits(x, self.seed, k).topk(self.samples, sorted=False).indices
        chosen = order.sort(1).values.t()[..., None]  # of all samples: the standard basis
        return x.new_zeros(self.samples, len(x), k).scatter_(2, chosen, 1.0)


class RandomSigns(RandomDirections):
    """Directions in which every coordinate is 1/√k or -1/√k (Hutchinson, Rademacher).

    Δu  ≈  1/m Σ_r ∂²u/∂z_r²,  z_ri = ±1,    Var = 4/m Σ_{i<j} (∂²u/∂x_i∂x_j)²

    It is exact where the matrix of second derivatives is diagonal, so for sums of functions of one
    coordinate each.

    Source: Hu, Shi, Karniadakis, Kawaguchi 2024 (arXiv 2312.14499), section 3.
    """

    def draw(self, x: Float[Tensor, "N d"], k: int) -> Float[Tensor, "m N k"]:
        words = point_bits(x, self.seed, -(-self.samples // 64) * k).split(k, 1)
        bits = [words[r // 64] >> r % 64 & 1 for r in range(self.samples)]
        return (torch.stack(bits).to(x.dtype) * 2 - 1) / k**0.5
