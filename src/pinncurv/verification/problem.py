"""All checks of a training problem in one call."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import Module

from pinncurv.problems import LossTerm
from pinncurv.verification.brute_force import References
from pinncurv.verification.checklist import Checklist
from pinncurv.verification.curvature import Curvature, Exact, verify_curvature
from pinncurv.verification.report import Report
from pinncurv.verification.term import verify_network, verify_term


def verify(
    model: Module,
    terms: Sequence[LossTerm],
    points: Sequence[Tensor],
    curvature: Curvature | None = None,
    *,
    exact: Exact | None = None,
    references: References | None = None,
    semidefinite: bool = True,
    max_points: int = 3,
) -> Report:
    """Check a network, its loss terms and a curvature against brute force.

    ``verify_network``, ``verify_term`` for each term and, if one is given, ``verify_curvature``,
    on copies in float64 at the first few points. It never raises.

    Args:
        model: The network, a small one.
        terms: The loss terms.
        points: The points of each term, ``[N_t, d]``.
        curvature: A recipe, as ``CurvatureOptimizer(curvature=...)`` takes it.
        exact: What the curvature should equal, for example ``verification.gauss_newton``.
        references: What differential operators that are not shipped mean, by their name in the
            term; see ``verify_term``.
        semidefinite: Whether the curvature should have no negative eigenvalue.
        max_points: How many points of each term to use.
    """
    checks = Checklist("problem")
    if not terms or len(terms) != len(points):
        message = f"got {len(terms)} terms and {len(points)} tensors of points"
        checks.demand("one tensor of points per term", message)
        return checks.report
    report = verify_network(model, points[0], max_points)
    for term, x in zip(terms, points, strict=True):
        report += verify_term(term, model, x, references, max_points)
    if curvature is not None:
        report += verify_curvature(
            curvature, model, terms, points, exact, semidefinite, max_points=max_points
        )
    return report
