"""Layouts of every form, and the comparison of jets with the oracle point by point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pinncurv.jets import Contraction, Jet, Layout
from tests.oracles import assert_close, push

N, D = 3, 3


@dataclass(frozen=True, eq=False)
class Case:
    """A layout, and for the oracle its directions and coefficient matrices at every point."""

    layout: Layout
    directions: Callable[[int], Tensor]
    sums: Callable[[int], list[Tensor]]


def _random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _case(directions: Tensor, *contractions: Contraction) -> Case:
    def at(n: int) -> Tensor:
        return directions[:, n] if directions.ndim == 3 else directions

    def matrix(c: Contraction, n: int) -> Tensor:
        k, v = len(c.indices), at(n)[list(c.indices)]
        Q = torch.eye(k, dtype=torch.float64)
        if c.weights is not None:
            Q = torch.diag(c.weights[:, n] if c.weights.ndim == 2 else c.weights)
        if c.matrix is not None:
            Q = c.matrix[n] if c.matrix.ndim == 3 else c.matrix
        return v.T @ Q @ v

    layout = Layout(directions, contractions)
    return Case(layout, at, lambda n: [matrix(c, n) for c in contractions])


def _symmetric(*shape: int, seed: int) -> Tensor:
    matrix = _random(*shape, seed=seed)
    return matrix + matrix.mT


BASIS = torch.eye(D, dtype=torch.float64)

CASES: dict[str, Case] = {
    "value": _case(BASIS[:0]),
    "gradient": _case(BASIS),
    "laplacian": _case(BASIS, Contraction((0, 1, 2))),
    "two_sums": _case(
        _random(3, D, seed=3),
        Contraction((0, 2), weights=_random(2, seed=4)),
        Contraction((1, 2), matrix=_symmetric(2, 2, seed=5)),
    ),
    "matrix": _case(BASIS[:2], Contraction((0, 1), matrix=_symmetric(2, 2, seed=6))),
    "point_weights": _case(BASIS, Contraction((2, 0), weights=_random(2, N, seed=7))),
    "point_matrix": _case(BASIS, Contraction((0, 1, 2), matrix=_symmetric(N, 3, 3, seed=8))),
    "point_directions": _case(_random(2, N, D, seed=9), Contraction((0, 1))),
}


def channels(case: Case, *shape: int, seed: int = 0, around: float = 0.3) -> Tensor:
    """Return random channels ``[S, N, *shape]`` with positive values around a number."""
    data = _random(case.layout.S, N, *shape, seed=seed)
    data[0] = around * (1 + 0.5 * torch.tanh(data[0]))
    return data


def check(
    case: Case,
    function: Callable[..., Tensor],
    *inputs: Tensor,
    gradients: bool = True,
    double: bool = False,
) -> None:
    """Compare the channels of function(jets) and their gradients with the oracle.

    Args:
        case: The layout.
        function: Maps tensors ``[N, ...]``, one per input, to ``[N, ...]``.
        inputs: Channels of the inputs.
        gradients: Whether to compare the gradients with respect to the channels.
        double: Whether to compare a second derivative with respect to the channels, too.
    """
    leaves = [data.clone().requires_grad_() for data in inputs]
    output = function(*(Jet(leaf, case.layout) for leaf in leaves))
    assert isinstance(output, Jet)
    assert output.layout is case.layout
    widths = [data[0, 0].numel() for data in inputs]

    def flat(joint: Tensor) -> Tensor:  # [1, Σ widths] -> [1, ...]
        parts = joint.split(widths, 1)
        tensors = [p.reshape(1, *data.shape[2:]) for p, data in zip(parts, inputs, strict=True)]
        return function(*tensors)

    def oracle(joint: Tensor) -> Tensor:  # [S, N, Σ widths] -> [S, N, ...]
        columns = [push(flat, joint[:, n], case.directions(n), case.sums(n)) for n in range(N)]
        return torch.stack(columns, 1)

    joint = torch.cat([data.flatten(2) for data in inputs], 2).requires_grad_()
    expected = oracle(joint)
    assert_close(output.channels.detach(), expected.detach())
    if not gradients:
        return
    cotangent = _random(*expected.shape, seed=11)
    received = torch.autograd.grad(output.channels, leaves, cotangent, create_graph=double)
    wanted = torch.autograd.grad(expected, joint, cotangent, create_graph=double)[0]
    together = torch.cat([g.flatten(2) for g in received], 2)
    assert_close(together.detach(), wanted.detach())
    if double:
        direction = _random(*wanted.shape, seed=12)
        if not wanted.requires_grad:  # the function is constant
            assert_close(together.detach(), torch.zeros_like(wanted))
            return
        again = torch.autograd.grad((together * direction).sum(), leaves)
        second = torch.autograd.grad((wanted * direction).sum(), joint)[0]
        assert_close(torch.cat([g.flatten(2) for g in again], 2), second)
