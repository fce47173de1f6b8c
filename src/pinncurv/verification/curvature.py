"""Checks of a curvature: a function from linearizations to a linear operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.linearization import linearize, trained_tensors
from pinncurv.linops import PyTorchLinearOperator
from pinncurv.problems import LossTerm
from pinncurv.verification.checklist import TOLERANCE, Checklist
from pinncurv.verification.instance import first_points, in_double
from pinncurv.verification.operator import check_operator, identity_product
from pinncurv.verification.report import Report

Curvature = Callable[[Sequence[Any]], PyTorchLinearOperator]
# What the curvature should be: from network, terms and points to a matrix.
Exact = Callable[[Module, Sequence[LossTerm], Sequence[Tensor]], Tensor]


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
        instance = _Instance(curvature, in_double(model), pairs)
        operator = instance.build(pairs)
        checks.demand("acts on the trainable parameters", lambda: instance.wrong_space(operator))
        right = None
        if exact is not None:
            right = exact(instance.model, [term for term, _ in pairs], [x for _, x in pairs])
        check_operator(checks, operator, right, semidefinite, (1e-6, 1e-3, 1.0))
        if scale_laws:
            _check_scale(checks, instance)
    return checks.report


class _Instance:
    """A curvature at a small problem, which is rebuilt for variations of it."""

    def __init__(
        self, curvature: Curvature, model: Module, pairs: list[tuple[LossTerm, Tensor]]
    ) -> None:
        self.curvature, self.model, self.pairs = curvature, model, pairs

    def build(
        self, pairs: Sequence[tuple[LossTerm, Tensor]], chunk_size: int | None = None
    ) -> PyTorchLinearOperator:
        """Build the operator for terms with their points."""
        linearizations = [linearize(t, self.model, x, chunk_size=chunk_size) for t, x in pairs]
        return self.curvature(linearizations)

    def matrix(
        self, pairs: Sequence[tuple[LossTerm, Tensor]], chunk_size: int | None = None
    ) -> Tensor:
        """Return the operator as a matrix."""
        return identity_product(self.build(pairs, chunk_size))

    def wrong_space(self, operator: PyTorchLinearOperator) -> str:
        """Say on which shapes the operator acts if not on those of the parameters."""
        terms = [term for term, _ in self.pairs]
        expected = [list(p.shape) for p in trained_tensors(self.model, *terms).values()]
        got = [list(shape) for shape in operator._in_shape]
        return "" if got == expected else f"acts on {got}, the parameters are {expected}"


def _check_scale(checks: Checklist, instance: _Instance) -> None:
    """Check how the operator follows weights and points."""
    pairs, matrix = instance.pairs, instance.matrix
    doubled = [(replace(term, weight=_double(term.weight)), x) for term, x in pairs]
    twins = [(replace(term, name=f"{term.name} (twin)"), x) for term, x in pairs]
    checks.compare("doubled weights double it", lambda: matrix(doubled), lambda: 2 * matrix(pairs))
    checks.compare(
        "every term twice is as good as its weight doubled",
        lambda: matrix([*pairs, *twins]),
        lambda: matrix(doubled),
    )
    checks.compare(
        "chunk_size=1 changes nothing", lambda: matrix(pairs, 1), lambda: matrix(pairs), TOLERANCE
    )
    fixed = [t.name for t, _ in pairs if any(o.at(slice(1)) is not o for o in t.operators.values())]
    if fixed:
        checks.skip(
            "duplicated points change nothing",
            f"an operator of {', '.join(fixed)} has one coefficient per point, given as a tensor",
        )
        return
    duplicated = [(_duplicate(term), torch.cat([x, x])) for term, x in pairs]
    checks.compare(
        "duplicated points change nothing", lambda: matrix(duplicated), lambda: matrix(pairs)
    )


def _double(weight: Any) -> Any:
    """Return twice a weight: a number, a tensor, or a function of the points."""
    if isinstance(weight, tuple):
        return tuple(2 * w for w in weight)
    return (lambda x: 2 * weight(x)) if callable(weight) else 2 * weight


def _duplicate(term: LossTerm) -> LossTerm:
    """Return a term whose data and weights have every row twice."""
    data = {name: torch.cat([rows, rows]) for name, rows in term.data.items()}
    weight = term.weight
    return replace(
        term, data=data, weight=torch.cat([weight] * 2) if isinstance(weight, Tensor) else weight
    )
