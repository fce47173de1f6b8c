"""Checks of a network: its derivatives, and the Jacobian in its parameters."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.diffops import Gradient, Laplacian, SecondOrder, Value
from pinncurv.problems import Fixed, LossTerm
from pinncurv.verification import brute_force
from pinncurv.verification.checklist import Checklist
from pinncurv.verification.instance import Network, first_points, in_double
from pinncurv.verification.report import Report
from pinncurv.verification.term import check_term


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
        check_term(checks, term, network, points, {})
        if isinstance(network, Module) and brute_force.trainable(network):
            checks.demand(
                "every parameter influences the output", lambda: _silent(network, term, points)
            )
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
    jacobian = brute_force.jacobian(moved, term, x, {})
    silent = [name for name, rows in jacobian.items() if not rows.count_nonzero()]
    if not silent:
        return ""
    return (
        f"{', '.join(silent)} does not: unused, or cut off by detach() or torch.no_grad(). Remove "
        "what cuts it off, or freeze it with requires_grad_(False)"
    )
