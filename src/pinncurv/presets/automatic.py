"""The method that needs no settings."""

from collections.abc import Iterable
from typing import Any

from pinncurv.curvature import CheaperSide, MatrixFreeGaussNewton
from pinncurv.linops import policy
from pinncurv.optim import CurvatureOptimizer, GeodesicFlow, GrowingBatch


def auto(
    params: Iterable[Any],
    damping: float = 1e-2,
    rows: int = 400,
    shortest: float = 2.0**-4,
    longest: float = 2.0**-2,
    calm: float = 0.25,
    floor: float = 1.0,
    largest: int = policy.LARGEST_SIDE,
    accelerate: bool = True,
    seed: int = 0,
    jacobi: bool = False,
) -> CurvatureOptimizer:
    """Return the exact Gauss-Newton method that chooses all by itself: no setting is needed.

    Steps follow the curve on which all of the residual falls alike (``GeodesicFlow``), with the
    exact matrix on the cheaper side (``CheaperSide``), at random points as long as these stand for
    all of them (``GrowingBatch``), and with a damping that is lowered as far as rounding allows,
    raised only where steps would be too short.

    Args:
        params: Parameters or parameter groups.
        damping: λ of the first step.
        rows: How many residuals the first step linearizes.
        shortest: The part of a full step below which the damping is raised.
        longest: The part of a full step from which on it is lowered.
        calm: How much a step may bend for the damping to be lowered, too.
        floor: Smallest damping, in units of what rounding makes of the matrix.
        largest: Most residuals that are linearized together, and largest matrix.
        accelerate: Whether to follow the curve, not its tangent.
        seed: Which points.
        jacobi: Whether parameters are damped by how much they matter, in place of alike.
    """
    return CurvatureOptimizer(
        params,
        curvature=MatrixFreeGaussNewton(),
        inverse=CheaperSide(damping, floor, largest, jacobi),
        step_size=GeodesicFlow(shortest, longest, calm, accelerate=accelerate),
        batch=GrowingBatch(min(rows, largest), largest=largest, seed=seed),
        max_halvings=0,
    )
