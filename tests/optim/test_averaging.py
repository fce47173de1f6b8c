"""Averages of the curvature, and steps between two estimates or inversions."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    Hessian,
    MatrixFreeGaussNewton,
    SubspaceGaussNewton,
)
from pinncurv.linops import Damped, FactorDamping
from pinncurv.optim import (
    CurvatureOptimizer,
    ExponentialAverage,
    FixedStep,
    Intervals,
    from_first,
    from_identity,
    from_zero,
)
from tests.optim.cases import (
    fixed,
    flat,
    gram,
    linear_fit,
    network,
    poisson,
    set_flat,
    values,
)

CURVATURES = {
    "kfac": KFAC(),
    "dense": GaussNewton(),
    "blocks": BlockDiagonalGaussNewton(),
    "diagonal": DiagonalGaussNewton(),
}


@dataclass(frozen=True)
class Counting:
    """A curvature or inverse that counts its calls."""

    wrapped: Any
    calls: list[int] = field(default_factory=list)

    @property
    def damping(self) -> float:
        return self.wrapped.damping

    def __call__(self, argument):
        self.calls.append(1)
        return self.wrapped(argument)


@pytest.mark.parametrize(
    ("name", "start"),
    [("kfac", from_identity), ("kfac", from_zero), ("kfac", from_first)]
    + [(name, from_identity) for name in ("dense", "blocks", "diagonal")],
)
def test_average_against_its_formula(name, start):
    """T̄_k = β T̄_{k-1} + (1 - β) T_k for every tensor."""
    model, beta = network(), 0.8
    inverse = FactorDamping(1e-1) if name == "kfac" else Damped(1e-1)
    optimizer = fixed(
        model.parameters(),
        1e-3,
        curvature=CURVATURES[name],
        inverse=inverse,
        average=ExponentialAverage(beta, start),
    )
    expected = None
    for k in range(3):
        objective = poisson(model, seed=k)
        T = CURVATURES[name](objective.linearize().linearizations).tensors()
        if expected is None:
            expected = {
                from_first: lambda T=T: T,
                from_zero: lambda T=T: [torch.zeros_like(t) for t in T],
                from_identity: lambda T=T: (
                    [torch.ones_like(t) for t in T]
                    if name == "diagonal"
                    else [torch.eye(len(t)).to(t) for t in T]
                ),
            }[start]()
        expected = [beta * old + (1 - beta) * t for old, t in zip(expected, T, strict=True)]
        optimizer.step(objective)
        received = optimizer.state_dict()["state"]["curvature"]["average"].values()
        for a, b in zip(received, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_the_average_is_what_is_inverted():
    model, twin = network(), network()
    optimizer = fixed(model.parameters(), 1e-2, average=ExponentialAverage(0.7, from_identity))
    C = torch.eye(flat(model).numel(), dtype=torch.float64)
    for k in range(4):
        linearized = poisson(twin, seed=k).linearize()
        J, g = linearized.jacobian.to_dense(), flat(linearized.gradient())
        C = 0.7 * C + 0.3 * J.T @ J
        damped = C + 1e-2 * torch.eye(len(g), dtype=g.dtype)
        set_flat(twin, flat(twin) - 1e-2 * torch.linalg.solve(damped, g))
        assert optimizer.step(poisson(model, seed=k)).accepted
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-11)


def test_no_history_is_no_average():
    runs = []
    for average in (None, ExponentialAverage(0.0, from_identity)):
        model = network()
        optimizer = fixed(model.parameters(), 1e-2, average=average)
        for k in range(3):
            optimizer.step(poisson(model, seed=k))
        runs.append(values(model))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


def test_average_and_factors_are_not_aliases():
    """An average that was read before is not changed by later steps."""
    model = network()
    optimizer = fixed(model.parameters(), 1e-3, average=ExponentialAverage(0.5, from_first))
    optimizer.step(poisson(model))
    kept = list(optimizer.state_dict()["state"]["curvature"]["average"].values())
    before = [tensor.clone() for tensor in kept]
    optimizer.step(poisson(model))
    assert all(map(torch.equal, kept, before))


# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("curvature", "inverse"), [(1, 1), (2, 3), (3, 2), (1, 4), (4, 1)])
def test_estimated_and_inverted_only_when_due(curvature, inverse):
    model = network()
    estimate, invert = Counting(KFAC()), Counting(FactorDamping(1e-1))
    optimizer = fixed(
        model.parameters(),
        1e-3,
        curvature=estimate,
        inverse=invert,
        average=ExponentialAverage(0.5),
        intervals=Intervals(curvature, inverse),
    )
    for step in range(9):
        estimate.calls.clear()
        invert.calls.clear()
        optimizer.step(poisson(model, seed=step))
        assert len(estimate.calls) == (step % curvature == 0)
        assert len(invert.calls) == (step % inverse == 0)


def test_intervals_against_a_loop():
    """The curvature of steps 0, 2, 4, ... is inverted in steps 0, 3, 6, ...."""
    model, twin = network(), network()
    optimizer = fixed(model.parameters(), 1e-3, intervals=Intervals(curvature=2, inverse=3))
    for k in range(8):
        linearized = poisson(twin, seed=k).linearize()
        J, g = linearized.jacobian.to_dense(), flat(linearized.gradient())
        if k % 2 == 0:
            latest = J.T @ J + 1e-2 * torch.eye(len(g), dtype=g.dtype)
        if k % 3 == 0:
            inverted = latest
        set_flat(twin, flat(twin) - 1e-3 * torch.linalg.solve(inverted, g))
        assert optimizer.step(poisson(model, seed=k)).accepted
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("intervals", [Intervals(curvature=2), Intervals(inverse=2)])
@pytest.mark.parametrize(
    "curvature",
    [MatrixFreeGaussNewton(), SubspaceGaussNewton(10), Hessian()],
)
def test_intervals_need_an_operator_with_tensors(curvature, intervals, chunk_size):
    """A later step could not go on with it, be it after a checkpoint or with chunks."""
    model = network()
    optimizer = fixed(
        model.parameters(), 1e-3, curvature=curvature, inverse=Damped(1e-1), intervals=intervals
    )
    before = values(model)
    with pytest.raises(
        TypeError, match=r"interval above 1 .* tensors and with_tensors, .* got .* with Intervals"
    ):
        optimizer.step(poisson(model, chunk_size=chunk_size))
    assert all(map(torch.equal, before, values(model)))


# --- bad settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [1.0, -0.1, 1.5, float("nan")])
def test_decay_must_be_below_one(decay):
    with pytest.raises(ValueError, match=r"decay of an average must be in \[0, 1\), got"):
        ExponentialAverage(decay)


@pytest.mark.parametrize("bad", [0, -1])
def test_intervals_must_be_positive(bad):
    for arguments in [(bad, 1), (1, bad)]:
        with pytest.raises(ValueError, match="Intervals must be at least 1, got"):
            Intervals(*arguments)


def test_an_operator_that_cannot_be_averaged():
    fit = linear_fit(1.0, 2.0)
    optimizer = CurvatureOptimizer(
        fit.parameters, gram, Damped(1e-2), FixedStep(0.1), average=ExponentialAverage(0.5)
    )
    before = values(fit.parameters)
    with pytest.raises(TypeError, match=r"tensors, with_tensors and identity, got MatrixOperator"):
        optimizer.step(fit)
    assert all(map(torch.equal, before, values(fit.parameters)))
