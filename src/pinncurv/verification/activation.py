"""Checks of an elementwise function: its registered derivatives."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pinncurv.diffops import DifferentialOperator, Gradient, Laplacian, SecondOrder, evaluate
from pinncurv.jets import Contraction, Jet, Layout, seed
from pinncurv.verification import brute_force
from pinncurv.verification.checklist import TOLERANCE, Checklist
from pinncurv.verification.report import Report

_POINTS = 12
_HOW = ("of the jet", "by a backward pass through", "by a double backward pass through")
_BEHIND_LINEAR_MAP = {
    "gradient": Gradient(),
    "Laplacian": Laplacian(),
    "mixed second derivatives": SecondOrder(torch.tensor([[1.0, 0.7], [0.7, -2.0]]).double()),
}


def verify_activation(
    function: Callable[[Any], Any],
    low: float = -3.0,
    high: float = 3.0,
    device: torch.device | str = "cpu",
    tolerance: float = TOLERANCE,
) -> Report:
    """Check the derivatives of an elementwise function against nested ``torch.func.grad``.

    f, f', f'' as a jet carries them, f' to f''' by a backward pass through each, f'' to f'''' by
    one through that; second derivatives behind a linear map; shapes, dtype and device.

    Args:
        function: The function, on tensors and jets: for example ``torch.tanh``, an ``nn.Module``
            or one's own with ``@register_elementwise``.
        low: Where to begin.
        high: Where to end; the function must be smooth in between.
        device: Where to compute.
        tolerance: The largest relative error that passes.
    """
    checks = Checklist(getattr(function, "__name__", type(function).__name__))
    steps = (torch.arange(_POINTS, dtype=torch.float64, device=device) + 0.5) / _POINTS
    x = (low + (high - low) * steps)[:, None]
    if checks.attempt("accepts a jet", lambda: _push(function, x)) is None:
        return checks.report
    derivative = functools.cache(lambda order: _derivative(function, x, order))
    for passes, channel in itertools.product(range(3), range(3)):
        order = channel + passes
        checks.compare(
            f"f{_primes(order)} {_HOW[passes]}" + (f" f{_primes(channel)}" if passes else ""),
            functools.partial(_differentiated, function, x, channel, passes),
            functools.partial(derivative, order),
            tolerance,
        )
    composed, z = _behind_linear_map(function, x)
    u = brute_force.at_point(composed)
    for name, operator in _BEHIND_LINEAR_MAP.items():
        checks.compare(
            f"behind a linear map: {name}",
            functools.partial(_evaluated, operator, composed, z),
            functools.partial(_point_by_point, operator, u, z),
            tolerance,
        )
    with checks.guard():
        for shape in ([1], [3], [2, 3]):
            name = f"keeps the shape {['N', *shape]}, dtype and device"
            checks.demand(name, _changed(function, x, shape))
    return checks.report


def _primes(order: int) -> str:
    return "'" * order


def _push(function: Callable[[Any], Any], x: Tensor) -> Tensor:
    """Return f, f' and f'' at x ``[N, 1]`` as a jet carries them, ``[3, N, 1]``."""
    basis = torch.ones(1, 1, dtype=x.dtype, device=x.device)
    output = function(seed(x, Layout(basis, (Contraction((0,)),))))
    if not isinstance(output, Jet):
        raise TypeError(f"must return a jet for a jet, got {type(output).__name__}")
    return output.channels


def _differentiated(function: Callable[[Any], Any], x: Tensor, channel: int, passes: int) -> Tensor:
    """Differentiate one channel in x, so many times."""
    x = x.detach().requires_grad_()
    value = _push(function, x)[channel]
    for i in range(passes):
        if not value.requires_grad:  # a constant
            return torch.zeros_like(x)
        # only what is differentiated again needs a graph: without one, the fast backward runs
        (value,) = torch.autograd.grad(value.sum(), x, create_graph=i + 1 < passes)
    return value


def _derivative(function: Callable[[Any], Any], x: Tensor, order: int) -> Tensor:
    """Return the derivative of the given order at x, point by point."""

    def derivative(t: Tensor) -> Tensor:
        return function(t.reshape(1, 1)).reshape(())

    for _ in range(order):
        derivative = torch.func.grad(derivative)
    return torch.stack([derivative(t) for t in x.flatten()]).reshape(x.shape)


def _behind_linear_map(
    function: Callable[[Any], Any], x: Tensor
) -> tuple[Callable[[Any], Any], Tensor]:
    """Return z -> f(z M), and z for which all z M are in the interval."""
    center, radius = x.mean(), (x.max() - x.min()) / 2
    M = radius * x.new_tensor([[0.5, -0.3, 0.4], [0.4, 0.6, -0.5]])
    z = x.new_tensor([[0.9, -0.8], [-0.3, 0.5], [0.2, 1.0]])
    return lambda z: function(z @ M + center), z


def _evaluated(operator: DifferentialOperator, u: Callable[[Any], Any], z: Tensor) -> Tensor:
    return evaluate({"u": operator}, u, z)["u"]


def _point_by_point(operator: DifferentialOperator, u: Callable[[Any], Any], z: Tensor) -> Tensor:
    return torch.stack([brute_force.derivative(operator, u, point) for point in z])


def _changed(function: Callable[[Any], Any], x: Tensor, shape: list[int]) -> str:
    """Say what of shape, dtype and device a jet does not keep, in float32."""
    size = math.prod(shape)
    value = x[:, 0].float()[: (_POINTS // size) * size].reshape(-1, *shape)
    basis = torch.ones(1, 1, dtype=value.dtype, device=value.device)
    layout = Layout(basis, (Contraction((0,)),))
    output = function(Jet(torch.stack([value] * layout.S), layout))
    got = (list(output.shape), output.dtype, output.device)
    expected = (list(value.shape), value.dtype, value.device)
    if got == expected and output.channels.shape[0] == layout.S:
        return ""
    return f"returns {got} with {output.channels.shape[0]} channels for {expected} with {layout.S}"
