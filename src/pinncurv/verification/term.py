"""Checks of a loss term: its operators, its residual, and the Jacobian of a network in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops import evaluate
from pinncurv.linearization import Linearization, linearize
from pinncurv.problems import LossTerm
from pinncurv.verification import brute_force
from pinncurv.verification.brute_force import References
from pinncurv.verification.checklist import Checklist
from pinncurv.verification.instance import Network, first_points, in_double
from pinncurv.verification.report import Report


def verify_term(
    term: LossTerm,
    model: Network,
    x: Tensor,
    references: References | None = None,
    max_points: int = 3,
) -> Report:
    """Check a loss term at a network against nested ``torch.func``, point by point.

    Every operator's value, the residual, that the points do not mix, weights and 1/N, and the
    Jacobian in every parameter.

    Args:
        term: The loss term.
        model: The network.
        x: Points, ``[N, d]``.
        references: What operators mean, by their name: functions of u (one point ``[d]`` to
            ``[d_out]``) and a point, that return one point's value of the operator. The shipped
            operators need none; of others only the derivatives that they declare can be checked
            without.
        max_points: How many of the points to use.
    """
    checks = Checklist(f"term '{getattr(term, 'name', term)}'")
    with checks.guard():
        small, points = first_points(term, x, max_points)
        check_term(checks, small, in_double(model), points, references or {})
    return checks.report


def check_term(
    checks: Checklist, term: LossTerm, model: Network, x: Tensor, references: References
) -> None:
    """Make the checks of ``verify_term``, on a term, network and points in float64."""
    if checks.attempt("can be evaluated", lambda: term.evaluate(model, x)) is None:
        return
    checks.compare(
        "points do not mix", lambda: term.evaluate(model, x), lambda: _one_by_one(term, model, x)
    )
    u = brute_force.at_point(model)
    for name in term.operators:
        _check_value(checks, name, term, model, x, references)
    checks.compare(
        "residual",
        lambda: term.evaluate(model, x),
        lambda: torch.stack(
            [brute_force.residual_at(term, u, x, n, references) for n in range(len(x))]
        ),
    )
    if isinstance(model, Module) and brute_force.trainable(model, term):
        _check_linearization(checks, term, model, x, references)


def _check_value(
    checks: Checklist,
    name: str,
    term: LossTerm,
    model: Network,
    x: Tensor,
    references: References,
) -> None:
    """Check the value of one operator."""
    u, kind = brute_force.at_point(model), type(term.operators[name])
    checks.compare(
        f"operator '{name}', {kind.__name__}",
        lambda: evaluate(term.operators, model, x)[name],
        lambda: torch.stack(
            [brute_force.operator_value(name, term, u, x, n, references) for n in range(len(x))]
        ),
    )
    if kind.__module__.partition(".")[0] != "pinncurv" and name not in references:
        checks.skip(
            f"meaning of operator '{name}'",
            f"pass references={{{name!r}: lambda u, x: ...}} to check more than the derivatives "
            "that it declares",
        )


def _one_by_one(term: LossTerm, model: Network, x: Tensor) -> Tensor:
    """Return the residual, one point at a time."""
    parts = [slice(n, n + 1) for n in range(len(x))]
    return torch.cat([term.at(part).evaluate(model, x[part]) for part in parts])


def _check_linearization(
    checks: Checklist, term: LossTerm, model: Module, x: Tensor, references: References
) -> None:
    """Check the scaled residual, and the Jacobian from inputs and output gradients."""
    linearization = checks.attempt(
        "every trained tensor has its rows of the Jacobian", lambda: linearize(term, model, x)
    )
    if linearization is None:
        return
    checks.compare(
        "scaled by sqrt(w / N)",
        lambda: linearization.residual,
        lambda: brute_force.scaled_residual(model, term, x, references),
    )
    jacobian = checks.attempt(
        "Jacobian by brute force", lambda: brute_force.jacobian(model, term, x, references)
    )
    for name, expected in (jacobian or {}).items():
        _check_jacobian(checks, linearization, name, expected)


def _check_jacobian(
    checks: Checklist, linearization: Linearization, name: str, expected: Tensor
) -> None:
    """Check the Jacobian in one parameter."""
    checks.compare(
        f"Jacobian in '{name}'", lambda: _jacobian_in(linearization, name), lambda: expected
    )


def _jacobian_in(linearization: Linearization, name: str) -> Tensor:
    """Return ``[N, V, *parameter]`` from the blocks; zero if there is none."""
    shape = linearization.parameters[name].shape
    for block in linearization.blocks.values():
        if name in block.names:
            rows = block.rows(slice(None))[block.names.index(name)].transpose(0, 1)
            return rows.reshape((*rows.shape[:2], *shape))
    residual = linearization.residual
    return residual.new_zeros(*residual.shape, *shape)
