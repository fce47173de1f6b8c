"""SPRING against the least squares problem that defines it, and what a direction is made of."""

import copy
import math

import pytest
import torch

from pinncurv.curvature import GaussNewton, MatrixFreeGaussNewton, Objective
from pinncurv.curvature.woodbury import KernelInverseLinearOperator, Woodbury
from pinncurv.linops import Damped
from pinncurv.optim import (
    CurvatureOptimizer,
    ExponentialAverage,
    FixedStep,
    HeavyBall,
    Intervals,
    QuadraticModel,
    Situation,
    Spring,
    offers,
)
from pinncurv.problems import poisson2d
from tests.optim.cases import LeastSquaresFit, fixed, flat, gram, network, poisson, same, values

LAM = 1e-2
matrix_free = MatrixFreeGaussNewton()
# The dense inverse is given the gradient, the others the residual; 2-4-1 has 17 parameters.
WAYS = {
    "dense": {"curvature": GaussNewton(), "inverse": Damped(LAM)},
    "kernel": {"curvature": matrix_free, "inverse": Woodbury(LAM)},
    "smaller": {"curvature": matrix_free, "inverse": Damped(LAM)},
}


def spring(model, momentum=0.9, step=0.05, **settings) -> CurvatureOptimizer:
    return fixed(model.parameters(), step, momentum=Spring(momentum), **settings)


def linear_model(objective):
    """Return the dense Jacobian and the residual as a vector."""
    linearized = objective.linearize()
    return linearized.jacobian.to_dense(), flat(linearized.residual)


def minimizer(objective, anchor, damping=LAM):
    """Return argmin_b ‖r̃ + J b‖² + λ ‖b - anchor‖², from the stacked rows."""
    J, r = linear_model(objective)
    root = math.sqrt(damping)
    rows = torch.cat([J, root * torch.eye(J.shape[1], dtype=J.dtype)])
    return torch.linalg.lstsq(rows, torch.cat([-r, root * anchor])[:, None]).solution[:, 0]


def buffer(optimizer, model):
    return flat(optimizer.state[p]["momentum_buffer"] for p in model.parameters())


@pytest.mark.parametrize("n", [4, 20])
@pytest.mark.parametrize("way", WAYS)
def test_directions_minimize_their_least_squares_problem(way, n):
    """With fewer residuals than parameters and with more, on another batch in every step."""
    model = network()
    optimizer, previous = spring(model, **WAYS[way]), torch.zeros(17, dtype=torch.float64)
    for seed in range(4):
        objective = poisson(model, seed, n=n)
        expected = minimizer(objective, 0.9 * previous)
        start = flat(model)
        assert optimizer.step(objective).accepted
        previous = buffer(optimizer, model)
        torch.testing.assert_close(previous, expected, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(flat(model), start + 0.05 * expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_the_first_step_and_no_momentum_are_plain(way):
    model, twin = network(), network()
    optimizer = spring(model, momentum=0.0, **WAYS[way])
    plain = fixed(twin.parameters(), 0.05, **WAYS[way])
    other = network()
    spring(other, **WAYS[way]).step(poisson(other))
    for step in range(3):
        optimizer.step(poisson(model))
        plain.step(poisson(twin))
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)
        if step == 0:
            assert same(values(twin), values(other))


def test_chunks_change_nothing():
    model, twin = network(), network()
    whole, parts = (spring(m, **WAYS["kernel"]) for m in (model, twin))
    for _ in range(3):
        whole.step(poisson(model))
        parts.step(poisson(twin, chunk_size=5))
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("way", WAYS)
def test_a_rejection_forgets(way):
    model = network()
    optimizer = spring(model, **WAYS[way])
    optimizer.step(poisson(model))
    optimizer.step_size, optimizer.max_halvings = FixedStep(1e6), 0
    before = values(model)
    assert not optimizer.step(poisson(model)).accepted
    assert same(before, values(model))
    optimizer.step_size, objective = FixedStep(0.05), poisson(model)
    expected = minimizer(objective, torch.zeros(17, dtype=torch.float64))
    assert optimizer.step(objective).accepted
    torch.testing.assert_close(buffer(optimizer, model), expected, rtol=1e-8, atol=1e-10)


def test_what_is_kept_is_the_direction():
    """Neither the step size, nor the group's rate, nor a halving is in it."""
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(), **WAYS["kernel"], step_size=FixedStep(16.0), momentum=Spring(0.9), lr=2
    )
    objective = poisson(model)
    expected = minimizer(objective, torch.zeros(17, dtype=torch.float64))
    record = optimizer.step(objective)
    assert record.accepted
    assert record.scale < 1
    torch.testing.assert_close(buffer(optimizer, model), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("momentum", [HeavyBall(0.5), Spring(0.9)])
@pytest.mark.parametrize("way", WAYS)
def test_state_survives_bit_for_bit(way, momentum):
    def make(m):
        return fixed(m.parameters(), 0.05, momentum=momentum, **WAYS[way])

    model = network()
    optimizer = make(model)
    for seed in range(2):
        optimizer.step(poisson(model, seed))
    twin, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    resumed = make(twin)
    resumed.load_state_dict(state)
    for seed in range(2, 4):
        optimizer.step(poisson(model, seed))
        resumed.step(poisson(twin, seed))
    assert same(values(model), values(twin))


@pytest.mark.parametrize(
    ("settings", "curvature", "expected"),
    [
        ({}, matrix_free, 1),
        ({"average": ExponentialAverage(0.5)}, GaussNewton(), 0),
    ],
)
def test_residuals_go_to_current_inverses_only(settings, curvature, expected, monkeypatch):
    """Another step's (JᵀJ + λI)⁻¹ must not be given this step's residual."""
    calls = []
    solve = KernelInverseLinearOperator.solve_residual

    def spy(self, residual):
        calls.append(self)
        return solve(self, residual)

    monkeypatch.setattr(KernelInverseLinearOperator, "solve_residual", spy)
    model = network()
    inverse = Woodbury(LAM) if curvature is matrix_free else Damped(LAM)
    settings = {"curvature": curvature, "inverse": inverse} | settings
    assert spring(model, **settings).step(poisson(model)).accepted
    assert len(calls) == expected


def test_stale_inverses_precondition_the_gradient():
    """b = v - (C + λI)⁻¹ Jᵀ(r̃ + J v) with the C of the step before."""
    model = network()
    optimizer = spring(model, **WAYS["dense"], intervals=Intervals(curvature=2, inverse=2))
    first = poisson(model)
    old, _ = linear_model(first)
    optimizer.step(first)
    kept = 0.9 * buffer(optimizer, model)
    objective = poisson(model, seed=1)
    J, r = linear_model(objective)
    C = old.T @ old + LAM * torch.eye(17, dtype=old.dtype)
    optimizer.step(objective)
    expected = kept - torch.linalg.solve(C, J.T @ (r + J @ kept))
    torch.testing.assert_close(buffer(optimizer, model), expected, rtol=1e-8, atol=1e-10)


def test_steps_of_a_descent():
    """From the parameters and from an offset, with and without the residual."""
    model = network()
    linearized = poisson(model).linearize()
    J, r = linearized.jacobian.to_dense(), flat(linearized.residual)
    C = J.T @ J + LAM * torch.eye(17, dtype=J.dtype)
    offset = [torch.ones_like(p).detach() for p in model.parameters()]
    before = values(offset)
    operator = matrix_free(linearized.linearizations)
    for inverse in (Woodbury(LAM)(operator), GaussNewton()(linearized.linearizations).inverse(LAM)):
        descent = Situation(linearized, linearized.gradient(), inverse)
        for v, shift in ((None, 0), (offset, J @ flat(offset))):
            expected = -torch.linalg.solve(C, J.T @ (r + shift))
            torch.testing.assert_close(flat(descent.step(v)), expected, rtol=1e-8, atol=1e-10)
    assert same(before, offset)
    assert offers(Woodbury(LAM)(operator), "solve_residual")
    assert not offers(Damped(LAM)(GaussNewton()(linearized.linearizations)), "solve_residual")


def test_objectives_of_ones_own():
    """A residual in one vector, and an operator of another package, inverted iteratively."""
    parameter = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64))
    A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    objective = LeastSquaresFit([parameter], lambda p: A @ p[0] - 1)
    optimizer = CurvatureOptimizer(
        [parameter], gram, Damped(0.1), FixedStep(0.2), momentum=Spring(0.7)
    )
    previous = torch.zeros(3, dtype=torch.float64)
    for _ in range(3):
        r = (A @ parameter - 1).detach()
        v = 0.7 * previous
        C = A.T @ A + 0.1 * torch.eye(3, dtype=torch.float64)
        expected = v - torch.linalg.solve(C, A.T @ (r + A @ v))
        optimizer.step(objective)
        previous = optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(previous, expected, rtol=1e-8, atol=1e-10)


def test_momentum_accelerates_small_batches():
    """Few rows of a consistent linear problem at a time: steps remember the rows of before."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(60, 20, generator=generator, dtype=torch.float64)
    A = A @ torch.diag(0.8 ** torch.arange(20, dtype=torch.float64))
    errors = {}
    for momentum in (0.0, 0.95):
        parameter = torch.nn.Parameter(torch.ones(20, dtype=torch.float64))
        optimizer = CurvatureOptimizer(
            [parameter], gram, Damped(1e-3), FixedStep(0.3), momentum=Spring(momentum)
        )
        rows = torch.Generator().manual_seed(1)
        for _ in range(150):
            batch = A[torch.randint(60, (5,), generator=rows)]
            optimizer.step(LeastSquaresFit([parameter], lambda p, batch=batch: batch @ p[0]))
        errors[momentum] = (A @ parameter.detach()).norm().item()
    assert errors[0.95] < 0.5 * errors[0.0]


def test_single_precision():
    model = network(dtype=torch.float32)
    optimizer = spring(model, **WAYS["kernel"])
    for _ in range(3):
        assert optimizer.step(poisson(model)).accepted
    assert all(p.dtype == torch.float32 for p in values(model))


def test_with_the_quadratic_model():
    """The model chooses how far to go along SPRING's direction, and its own momentum."""
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(), **WAYS["kernel"], step_size=QuadraticModel(), momentum=Spring(0.9)
    )
    losses = [optimizer.step(poisson(model)).loss for _ in range(6)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("kind", [HeavyBall, Spring])
@pytest.mark.parametrize("momentum", [1.0, -0.1, math.nan])
def test_momentum_must_be_valid(kind, momentum):
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        kind(momentum)


def test_a_curvature_of_other_terms_or_of_another_order_gets_the_gradient():
    """Its kernel must not be given this loss's residual: the rows would not belong together."""
    torch.manual_seed(0)
    problem = poisson2d(30, 12)
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    ends = []
    for choose in (
        MatrixFreeGaussNewton(),
        lambda made: MatrixFreeGaussNewton()(made[::-1]),
        lambda made: MatrixFreeGaussNewton()(made[:1]),
    ):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ).double()
        objective = Objective(model, problem.terms, batch)
        optimizer = CurvatureOptimizer(model.parameters(), choose, Damped(1e-2))
        records = [optimizer.step(objective) for _ in range(3)]
        assert records[-1].new_loss < records[0].loss
        ends.append(records[-1].new_loss)
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)
