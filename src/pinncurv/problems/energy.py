"""An energy: the integral of a convex function of the operators' values, as a term of the loss."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from pinncurv.problems.loss_term import LossTerm
from pinncurv.problems.residual import Residual


@dataclass(frozen=True, eq=False)
class Energy(LossTerm):
    """The mean of a density that is convex in the values of the operators (deep Ritz).

    1/N Σ_n w_n ℓ(x_n, D_1 u(x_n), ...),  gradient Σ_n Jᵀ ∂ℓ,  Gauss-Newton Σ_n Jᵀ (∂²ℓ) J

    For example ½|∇u|² - f u with the operators value and gradient. It may be negative, and its
    gradient need not lie in the range of its Gauss-Newton matrix, so that there is no residual:
    what needs one refuses it, or works by the gradient (curvature, inverses and optimizers do).
    The rows of the Jacobian, one for every value of the operators, are those of the values times a
    square root of ∂²ℓ. One more backward pass yields the gradient.

    The points must carry the integral: with too few for the parameters, the energy at the points
    has no minimum near that of the integral, and the network finds peaks between them. Nodes of a
    quadrature go further than random points, of which new ones should be drawn in every step.

    Args:
        operators: The differential operators D_k, declared by name.
        points: Where the points come from; for a quadrature its nodes, with its weights as weight.
        weight: As of ``LossTerm``, one for each point at most.
        name: How errors and records call this term.
        data: As of ``LossTerm``.
        density: ℓ, called as a residual is, returns [N] or [N, 1]; twice differentiable in the
            values. It must not be trained along.

    Raises:
        ValueError: If there is a weight per component, or as for ``LossTerm``.

    Source: E and Yu 2018 (deep Ritz); Müller and Zeinhofer 2023, section 3, for the matrix.
    """

    residual: Residual = field(init=False)
    name: str = "energy"
    density: Callable[..., Tensor] = field(kw_only=True)

    def __post_init__(self) -> None:
        """Check the declaration; the density is called and checked as a residual is."""
        object.__setattr__(self, "residual", self.density)
        super().__post_init__()
        if isinstance(self.weight, Sequence):
            raise ValueError(
                f"Term '{self.name}': the density of an energy has one component and so one "
                f"weight, got {len(self.weight)}. Write the factors into the density."
            )

    def scaled_residual(self, model: Callable[[Tensor], Tensor], x: Tensor) -> Float[Tensor, "N V"]:
        check_squares([self])
        return super().scaled_residual(model, x)


def check_squares(terms: Iterable[LossTerm]) -> None:
    """Check that terms are sums of squares, of a residual.

    Raises:
        TypeError: If one is an energy; names it.
    """
    for term in terms:
        if isinstance(term, Energy):
            raise TypeError(
                f"What is asked for needs a residual, whose squares the loss is the sum of, got "
                f"term '{term.name}', which is an Energy. Use its loss, gradient or operators, or "
                "write the equation that it leads to as a LossTerm."
            )
