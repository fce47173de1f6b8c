"""What an approximation does to a step: its direction, its decrease, and solver iterations."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from pinncurv.comparison.checks import check_same_space, check_square
from pinncurv.comparison.products import apply, flat_vector
from pinncurv.linops import CGRecord, PyTorchLinearOperator, check_damping, conjugate_gradients


def step_cosine(
    first: PyTorchLinearOperator,
    second: PyTorchLinearOperator,
    gradient: Tensor | Sequence[Tensor],
) -> float:
    """Return the cosine of the angle between the steps of two inverses.

    cos = sᵀt / (‖s‖ ‖t‖),  s = −P₁⁻¹ g, t = −P₂⁻¹ g
    """
    check_same_space(first, second)
    g = flat_vector(gradient, first, "gradient")
    s, t = apply(first, g), apply(second, g)
    norms = (s.norm() * t.norm()).item()
    if norms == 0:
        raise ValueError(
            "The steps must not be zero to have an angle, got steps of norms "
            f"{s.norm().item():.1e} and {t.norm().item():.1e}. Pass a nonzero gradient."
        )
    return max(-1.0, min(1.0, torch.dot(s, t).item() / norms))


@dataclass(frozen=True)
class QuadraticDecrease:
    """The minimum of the damped quadratic model along one direction.

    m(αv) = α gᵀv + α²/2 vᵀ(C + λI)v,  α* = −slope / curvature,  −m(α*v) = slope² / (2 curvature)

    Attributes:
        slope: gᵀv, in units of the loss; negative for descent.
        curvature: vᵀ(C + λI)v, in units of the loss.
    """

    slope: float
    curvature: float

    @property
    def step_length(self) -> float:
        """α*, the multiple of the direction that minimizes the model."""
        return -self.slope / self.curvature

    @property
    def decrease(self) -> float:
        """−m(α*v) >= 0, in units of the loss."""
        return self.slope**2 / (2 * self.curvature)


def quadratic_decrease(
    operator: PyTorchLinearOperator,
    damping: float,
    gradient: Tensor | Sequence[Tensor],
    direction: Tensor | Sequence[Tensor],
) -> QuadraticDecrease:
    """Minimize the damped quadratic model along a direction.

    m(v) = gᵀv + 1/2 vᵀ(C + λI)v
    """
    check_square(operator)
    g = flat_vector(gradient, operator, "gradient")
    v = flat_vector(direction, operator, "direction")
    curvature = torch.dot(v, apply(operator, v, check_damping(damping))).item()
    if not curvature > 0:
        raise ValueError(
            "The curvature along the direction must be positive for the model to have a minimum, "
            f"got vᵀ(C + λI)v = {curvature:.1e} for a v of norm {v.norm().item():.1e}. "
            "Pass a nonzero direction or raise the damping."
        )
    return QuadraticDecrease(torch.dot(g, v).item(), curvature)


def best_decrease(inverse: PyTorchLinearOperator, gradient: Tensor | Sequence[Tensor]) -> float:
    """Return the largest decrease of the damped quadratic model in any direction.

    −min_v m(v) = 1/2 gᵀ(C + λI)⁻¹g
    """
    g = flat_vector(gradient, inverse, "gradient")
    return 0.5 * torch.dot(g, apply(inverse, g)).item()


def decrease_fraction(
    operator: PyTorchLinearOperator,
    damping: float,
    gradient: Tensor | Sequence[Tensor],
    direction: Tensor | Sequence[Tensor],
    inverse: PyTorchLinearOperator,
) -> float:
    """Return the share of the best possible decrease that one direction reaches.

    (gᵀv)² / (vᵀ(C + λI)v · gᵀ(C + λI)⁻¹g)

    It is the squared cosine between v and the exact step in the inner product of C + λI.
    """
    check_same_space(operator, inverse)
    best = best_decrease(inverse, gradient)
    if not best > 0:
        raise ValueError(
            f"The best decrease must be positive, got 1/2 gᵀ(C + λI)⁻¹g = {best:.1e}. "
            "Pass a nonzero gradient and a positive definite inverse."
        )
    return quadratic_decrease(operator, damping, gradient, direction).decrease / best


@dataclass(frozen=True)
class StepComparison:
    """A step s against the exact step t = −(C + λI)⁻¹g of the damped quadratic model m.

    Attributes:
        decrease_fraction: max_α −m(αs) over −m(t), in [0, 1].
        length: ‖αs‖ / ‖t‖ for that α. Where it is large, a nonlinear loss will not follow.
        cosine: sᵀt / (‖s‖ ‖t‖).
    """

    decrease_fraction: float
    length: float
    cosine: float


def compare_steps(
    operator: PyTorchLinearOperator,
    damping: float,
    gradient: Tensor | Sequence[Tensor],
    step: Tensor | Sequence[Tensor],
    exact_step: Tensor | Sequence[Tensor],
) -> StepComparison:
    """Compare a step with the exact one in the damped quadratic model, see ``StepComparison``."""
    s = flat_vector(step, operator, "step")
    t = flat_vector(exact_step, operator, "exact_step")
    model, best = (quadratic_decrease(operator, damping, gradient, v) for v in (s, t))
    if not best.decrease > 0:
        raise ValueError(
            f"The decrease along the exact step must be positive, got {best.decrease:.1e}. "
            "Pass a nonzero gradient and exact_step = −(C + λI)⁻¹g."
        )
    return StepComparison(
        decrease_fraction=model.decrease / best.decrease,
        length=abs(model.step_length) * (s.norm() / t.norm()).item(),
        cosine=torch.cosine_similarity(s, t, dim=0).item(),
    )


def subspace_overlap(U: Float[Tensor, "D K"], V: Float[Tensor, "D K"]) -> Float[Tensor, " K"]:
    """Return how much the spans of the first k of two sets of vectors overlap, for every k.

    ‖U_kᵀV_k‖² / k, k = 1, …, K

    It is 1 for equal spans and about k/D for random ones. The vectors are orthonormal, such as
    those of ``largest_eigenpairs``.
    """
    for name, X in (("U", U), ("V", V)):
        deviation = (X.mT @ X - torch.eye(X.shape[1]).to(X)).abs().max().item()
        if not deviation < torch.finfo(X.dtype).eps ** 0.5:
            raise ValueError(
                f"{name} must have orthonormal columns, got a deviation of {deviation:.1e}. "
                "Orthogonalize them with torch.linalg.qr."
            )
    squares = (U.double().mT @ V.double()).square()
    leading = squares.cumsum(0).cumsum(1).diagonal()
    return leading / torch.arange(1, len(squares) + 1, device=squares.device)


def cg_records(
    operator: PyTorchLinearOperator,
    damping: float,
    gradient: Tensor | Sequence[Tensor],
    preconditioners: Mapping[str, PyTorchLinearOperator | None],
    *,
    tolerance: float = 1e-6,
    max_iterations: int | None = None,
) -> dict[str, CGRecord]:
    """Solve for the exact step with conjugate gradients under each of several preconditioners.

    (C + λI) s = g  to  ‖g − (C + λI)s‖ ≤ tolerance ‖g‖ in at most 10 D iterations by default

    Preconditioners approximate (C + λI)⁻¹; ``None`` is for no preconditioner.
    """
    check_square(operator)
    damping = check_damping(damping)
    g = flat_vector(gradient, operator, "gradient").to(operator.dtype)
    records = {}
    for name, preconditioner in preconditioners.items():
        if preconditioner is not None:
            check_same_space(operator, preconditioner)
        records[name] = conjugate_gradients(
            operator,
            g,
            damping=damping,
            preconditioner=preconditioner,
            tolerance=tolerance,
            max_iterations=max_iterations,
        ).record
    return records
