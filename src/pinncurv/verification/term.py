"""Checks of a loss term, of a network in it, and of a network alone."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops import Gradient, Laplacian, SecondOrder, Value, evaluate
from pinncurv.linearization import Linearization, linearize
from pinncurv.problems import L2, Energy, Fixed, LossTerm
from pinncurv.verification import brute_force
from pinncurv.verification.brute_force import Network, References, first_points, in_double
from pinncurv.verification.checklist import Checklist
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
        _check_term(checks, small, in_double(model), points, references or {})
    return checks.report


def verify_network(model: Network, x: Tensor, max_points: int = 3) -> Report:
    """Check that jets pass through a network, against nested ``torch.func``, point by point.

    Value, gradient, Laplacian and mixed second derivatives in x; that the points do not mix; and,
    if the network is a module with trainable parameters, that all of them are captured, influence
    the output, and have the right Jacobian.

    Args:
        model: The network, or any function ``[N, d]`` to ``[N, d_out]``, for example one that
            calls a function with a rule of its own (``@register_rule``).
        x: Points, ``[N, d]``.
        max_points: How many of the points to use.
    """
    checks = Checklist("network")
    with checks.guard():
        network = in_double(model)
        term, points = first_points(_all_derivatives(x), x, max_points)
        _check_term(checks, term, network, points, {})
        if isinstance(network, Module) and brute_force.trainable(network):
            name = "every parameter influences the output"
            silent = checks.by_brute_force(name, lambda: _silent(network, term, points))
            if silent is not None:
                checks.demand(name, silent)
    return checks.report


def _all_derivatives(x: Tensor) -> LossTerm:
    """Return a term with every derivative of order up to two in its residual."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(x.shape[1], x.shape[1], generator=generator, dtype=torch.float64)
    return LossTerm(
        {
            "value": Value(),
            "gradient": Gradient(),
            "laplacian": Laplacian(),
            "mixed": SecondOrder(matrix),
        },
        lambda x, **values: torch.cat([value.flatten(1) for value in values.values()], 1),
        Fixed(x),
        name="network",
    )


def _silent(model: Module, term: LossTerm, x: Tensor) -> str:
    """Name the parameters without influence, also after a change that no initialization hides."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.1 * noise.to(parameter))
    parameters = brute_force.trainable(moved)
    jacobian = brute_force.jacobian(moved, term, x, {}, parameters)
    parts = zip(
        parameters, jacobian.split([p.numel() for p in parameters.values()], -1), strict=True
    )
    silent = [name for name, rows in parts if not rows.count_nonzero()]
    if not silent:
        return ""
    return (
        f"{', '.join(silent)} does not: unused, or cut off by detach() or torch.no_grad(). Remove "
        "what cuts it off, or freeze it with requires_grad_(False)"
    )


def _check_term(
    checks: Checklist, term: LossTerm, model: Network, x: Tensor, references: References
) -> None:
    """Check a term, network and points in float64."""
    if isinstance(term, L2) and isinstance(model, Module):
        _check_linearization(checks, term, model, x, references)
        return
    together = checks.attempt("can be evaluated", lambda: term.evaluate(model, x))
    if together is None:
        return
    parts = [slice(n, n + 1) for n in range(len(x))]
    checks.compare(
        "points do not mix",
        lambda: torch.cat([term.at(part).evaluate(model, x[part]) for part in parts]),
        together,
    )
    at = (term, brute_force.at_point(model), x, references)
    values = evaluate(term.operators, model, x)
    for name, operator in term.operators.items():
        kind = type(operator)
        checks.compare(
            f"operator '{name}', {kind.__name__}",
            values[name],
            partial(_point_by_point, partial(brute_force.operator_value, name, *at), len(x)),
        )
        if kind.__module__.partition(".")[0] != "pinncurv" and name not in references:
            checks.skip(
                f"meaning of operator '{name}'",
                f"pass references={{{name!r}: lambda u, x: ...}} to check more than the "
                "derivatives that it declares",
            )
    checks.compare(
        "residual",
        term.evaluate(model, x),
        partial(_point_by_point, partial(brute_force.residual_at, *at), len(x)),
    )
    if isinstance(term, Energy):
        checks.skip("Jacobian", "the term is an energy, whose density alone was checked")
    elif isinstance(model, Module) and brute_force.trainable(model, term):
        _check_linearization(checks, term, model, x, references)


def _point_by_point(function: Callable[[int], Tensor], N: int) -> Tensor:
    return torch.stack([function(n) for n in range(N)])


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
        linearization.residual,
        lambda: brute_force.scaled_residual(model, term, x, references),
    )
    parameters = brute_force.trainable(model, term)
    jacobian = checks.by_brute_force(
        "Jacobian in every parameter",
        lambda: brute_force.jacobian(model, term, x, references, parameters),
    )
    if jacobian is None:
        return
    parts = jacobian.split([parameter.numel() for parameter in parameters.values()], -1)
    for name, expected in zip(parameters, parts, strict=True):
        checks.compare(
            f"Jacobian in '{name}'",
            partial(_jacobian_in, linearization, name),
            expected,
        )


def _jacobian_in(linearization: Linearization, name: str) -> Tensor:
    """Return ``[N, V, numel]`` from the blocks; zero if there is none."""
    for block in linearization.blocks.values():
        if name in block.names:
            rows = block.rows(slice(None))[block.names.index(name)].transpose(0, 1)
            return rows.reshape((*rows.shape[:2], -1))
    residual = linearization.residual
    return residual.new_zeros(*residual.shape, linearization.parameters[name].numel())
