"""Points where the residual is large, as a sampler."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from pinncurv.problems.energy import check_squares
from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.numbers import check_finite, check_positive
from pinncurv.problems.samplers import check_count, is_fixed


@dataclass(frozen=True, eq=False)
class ResidualBased:
    """n of the points that a term draws, those with a large residual with higher probability.

    P(x) ∝ |r(x)|^k / mean |r|^k + c

    It chooses among what the sampler of a term draws, without replacement, by the residuals of the
    network as it is at that moment. It is the sampler of a copy of the term, for example
    ``dataclasses.replace(term, points=ResidualBased(term, model, n))``.

    Args:
        term: The term, whose sampler draws the candidates, and whose weights do not enter.
        model: The network that is trained.
        n: Number of points to choose.
        power: The exponent k.
        floor: The number c; the larger, the more uniform.
        draws: How often the sampler of the term is drawn for the candidates.

    Raises:
        TypeError: If the term is an energy, which has no residual.
        ValueError: If there are fewer candidates than points to choose, points that stay are drawn
            several times, the floor is not positive, or a number not finite.

    Source: Wu, Zhu, Tan, Kartha, Lu 2023 (arXiv 2207.10289), section 2.4: RAD.
    """

    term: LossTerm
    model: nn.Module
    n: int
    power: float = 1.0
    floor: float = 1.0
    draws: int = 1

    def __post_init__(self) -> None:
        """Check that there are residuals and a choice."""
        check_squares([self.term])
        check_count(self.n)
        check_count(self.draws)
        if not self.n <= self.draws * self.term.points.n:
            raise ValueError(
                f"The points must be chosen among as many candidates or more, got n={self.n} of "
                f"{self.draws * self.term.points.n}. Give the term '{self.term.name}' more points, "
                "or draw more often."
            )
        if self.draws > 1 and is_fixed(self.term.points):
            raise ValueError(
                "Points that are drawn several times must be others every time, got those of term "
                f"'{self.term.name}', which stay. Draw them once, or use points of a domain."
            )
        check_positive("floor", self.floor)  # so that every point can be drawn
        check_finite("power", self.power)

    @property
    def dim(self) -> int:
        """Dimension of a point."""
        return self.term.points.dim

    def sample(
        self, generator: Generator, dtype: torch.dtype, device: torch.device | str
    ) -> Float[Tensor, "{self.n} {self.dim}"]:
        """Draw candidates, and choose among them.

        Raises:
            FloatingPointError: If a residual is not finite.
        """
        drawn = [self.term.points.sample(generator, dtype, device) for _ in range(self.draws)]
        candidates = torch.cat(drawn)
        # by random directions of their own, or the points with the largest errors would be chosen
        judged = self.term.redrawn(generator)
        with torch.no_grad():
            size = judged.evaluate(self.model, candidates).norm(dim=1).double() ** self.power
        mean = size.mean()
        if not mean.isfinite():
            raise FloatingPointError(
                f"Residuals must be finite where points are chosen by them, got those of term "
                f"'{self.term.name}' with a mean of {float(mean)}. The training has diverged: "
                "start anew with smaller steps."
            )
        density = size / torch.where(mean > 0, mean, 1) + self.floor
        chosen = torch.multinomial(density.to(generator.device), self.n, generator=generator)
        return candidates[chosen.to(candidates.device)]
