"""Checks of a curvature: a function from linearizations to a linear operator."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.linearization import Linearization, bind, trained_tensors
from pinncurv.linops import PyTorchLinearOperator
from pinncurv.problems import L2, LossTerm
from pinncurv.verification.brute_force import first_points, in_double
from pinncurv.verification.checklist import Checklist
from pinncurv.verification.operator import check_operator, identity_product
from pinncurv.verification.report import Report

Curvature = Callable[[Sequence[Any]], PyTorchLinearOperator]
# What the curvature should be: from network, terms and points to a matrix.
Exact = Callable[[Module, Sequence[LossTerm], Sequence[Tensor]], Tensor]
_Pairs = Sequence[tuple[LossTerm, Tensor]]


def verify_curvature(
    curvature: Curvature,
    model: Module,
    terms: Sequence[LossTerm],
    points: Sequence[Tensor],
    exact: Exact | None = None,
    semidefinite: bool = True,
    scale_laws: bool = True,
    max_points: int = 3,
) -> Report:
    """Check a curvature: its operator's laws, how it scales, and what it should equal.

    Doubled weights double it; duplicated points change nothing; each term twice is as good as its
    weight doubled; so is no difference made by ``chunk_size``. Most errors of a factor N, of a
    weight or of its square root violate one of these.

    Args:
        curvature: The recipe, as ``CurvatureOptimizer(curvature=...)`` takes it.
        model: The network.
        terms: The loss terms.
        points: The points of each term.
        exact: What it should equal, for example ``verification.gauss_newton`` or
            ``verification.hessian``; None for an approximation.
        semidefinite: Whether it should have no negative eigenvalue.
        scale_laws: Whether it should be proportional to the loss.
        max_points: How many points of each term to use.
    """
    checks = Checklist("curvature")
    with checks.guard():
        pairs = [first_points(t, x, max_points) for t, x in zip(terms, points, strict=True)]
        model = in_double(model)

        def build(pairs: _Pairs, chunk_size: int | None = None) -> PyTorchLinearOperator:
            terms = [term for term, _ in pairs]
            bound = [bind(t, model, x, chunk_size, terms) for t, x in pairs]
            return curvature([Linearization(b) for b in bound])

        operator, small_terms = build(pairs), [term for term, _ in pairs]
        got = [list(shape) for shape in operator._in_shape]
        expected = [list(p.shape) for p in trained_tensors(model, *small_terms).values()]
        wrong = "" if got == expected else f"acts on {got}, the parameters are {expected}"
        checks.demand("acts on the trainable parameters", wrong)
        right = None
        if exact is not None:
            points = [x for _, x in pairs]
            right = checks.by_brute_force(
                "is the right matrix", partial(exact, model, small_terms, points)
            )
        check_operator(checks, operator, right, semidefinite, (1e-6, 1e-3, 1.0))
        if scale_laws:
            _check_scale(checks, pairs, lambda *args: identity_product(build(*args)))
    return checks.report


def _check_scale(checks: Checklist, pairs: _Pairs, matrix: Callable[..., Tensor]) -> None:
    """Check how the operator follows weights and points."""
    original = matrix(pairs)
    doubled = [(replace(term, weight=_double(term.weight)), x) for term, x in pairs]
    twins = [(replace(term, name=f"{term.name} (twin)"), x) for term, x in pairs]
    checks.compare("doubled weights double it", lambda: matrix(doubled), 2 * original)
    checks.compare(
        "every term twice is as good as its weight doubled",
        lambda: matrix([*pairs, *twins]),
        lambda: matrix(doubled),
    )
    checks.compare("chunk_size=1 changes nothing", lambda: matrix(pairs, 1), original)
    name = "duplicated points change nothing"
    fixed = [t.name for t, _ in pairs if any(o.at(slice(1)) is not o for o in t.operators.values())]
    if fixed:
        why = "has one coefficient per point, given as a tensor"
        checks.skip(name, f"an operator of {', '.join(fixed)} {why}")
    else:
        duplicated = [(_duplicate(term), torch.cat([x, x])) for term, x in pairs]
        checks.compare(name, lambda: matrix(duplicated), original)


def _double(weight: Any) -> Any:
    """Return twice a weight: a number, a tensor, or a function of the points."""
    if isinstance(weight, tuple):
        return tuple(2 * w for w in weight)
    return (lambda x: 2 * weight(x)) if callable(weight) else 2 * weight


def _duplicate(term: LossTerm) -> LossTerm:
    """Return a term whose data and weights have every row twice."""
    if isinstance(term, L2):
        return term
    data = {name: torch.cat([rows, rows]) for name, rows in term.data.items()}
    weight = term.weight
    if isinstance(weight, Tensor) and weight.ndim:
        weight = torch.cat([weight, weight])
    return replace(term, data=data, weight=weight)
