"""Step sizes: fixed, the grid, and the minimum of the quadratic model."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import GaussNewton, Objective
from pinncurv.diffops import Partial, Value
from pinncurv.linops import Damped
from pinncurv.optim import (
    ArmijoLineSearch,
    CurvatureOptimizer,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    QuadraticModel,
    Situation,
)
from pinncurv.optim.step_sizes import NormConstrained, minimize_quadratic
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points
from tests.optim.cases import Calls, fixed, flat, network, poisson, set_flat, values


def situation(objective, direction, previous=None, damping=0.0, try_update=None) -> Situation:
    linearized = objective.linearize()
    tried = {} if try_update is None else {"try_update": try_update}
    return Situation(linearized, linearized.gradient(), None, damping, previous, direction, **tried)


def random_like(model, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in model.parameters()
    ]


# --- the minimum of a quadratic -------------------------------------------------------------------


def solved(M, b):
    """Return minimizer and decrease by a dense solve."""
    M, b = torch.tensor(M, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    c = -torch.linalg.lstsq(M, b[:, None], driver="gelsd").solution[:, 0]
    return c, float(-(0.5 * c @ M @ c + b @ c))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("seed", range(4))
def test_minimum_equals_a_dense_solve(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    A[:, 1] *= scale  # the previous update may be much longer or shorter than the direction
    b = A.T @ torch.randn(3, generator=generator, dtype=torch.float64)
    M = A.T @ A
    c, decrease = minimize_quadratic(M.tolist(), b.tolist())
    normalized = torch.tensor([1.0, 1 / scale], dtype=torch.float64)
    expected, best = solved(
        (M * normalized[:, None] * normalized).tolist(), (b * normalized).tolist()
    )
    torch.testing.assert_close(
        torch.tensor(c, dtype=torch.float64) / normalized, expected, rtol=1e-9, atol=1e-12
    )
    assert decrease == pytest.approx(best, rel=1e-9)


def test_minimum_along_one_direction():
    assert minimize_quadratic([[4.0]], [-2.0]) == ([0.5], 0.5)


@pytest.mark.parametrize("factor", [1.0, -2.0, 1e-8, 1e8])
def test_parallel_directions(factor):
    """The minimum is that along one of them, whatever the split."""
    M = [[4.0, 4.0 * factor], [4.0 * factor, 4.0 * factor**2]]
    c, decrease = minimize_quadratic(M, [-2.0, -2.0 * factor])
    assert c[0] + factor * c[1] == pytest.approx(0.5, rel=1e-12)
    assert decrease == pytest.approx(0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("M", "b", "expected"),
    [
        ([[0.0]], [0.0], [0.0]),
        ([[4.0, 0.0], [0.0, 0.0]], [-2.0, 0.0], [0.5, 0.0]),
        ([[0.0, 0.0], [0.0, 4.0]], [0.0, -2.0], [0.0, 0.5]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0], [0.0, 0.0]),
    ],
)
def test_zero_directions_are_not_taken(M, b, expected):
    c, decrease = minimize_quadratic(M, b)
    assert c == expected
    assert decrease == (0.5 if any(expected) else 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_model_that_is_not_finite_proposes_nan(bad):
    for M, b in [([[bad]], [1.0]), ([[1.0, 0.0], [0.0, bad]], [1.0, 1.0]), ([[1.0]], [bad])]:
        c, decrease = minimize_quadratic(M, b)
        assert all(math.isnan(x) for x in [*c, decrease])


# --- the quadratic model --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [False, True])
def test_model_against_the_dense_jacobian(damping, momentum, chunk_size):
    """½‖r̃ + J v‖² + ½ λ‖v‖² over v = αΔ + μδ, by a dense least squares solve and by search."""
    model = network()
    objective = poisson(model, chunk_size=chunk_size)
    direction, previous = random_like(model, 2), random_like(model, 3)
    proposal = QuadraticModel().propose(
        situation(objective, direction, previous if momentum else None, damping)
    )
    linearized = objective.linearize()
    J = linearized.jacobian.to_dense()
    r = torch.cat([part.flatten() for part in linearized.residual])
    V = torch.stack([flat(direction), flat(previous)], 1)[:, : 2 if momentum else 1]

    def m(c):
        v = V @ c
        return float(0.5 * (r + J @ v).square().sum() + 0.5 * damping * v.square().sum())

    rows = torch.cat([J @ V, math.sqrt(damping) * V])
    rhs = torch.cat([-r, torch.zeros(len(V), dtype=r.dtype)])
    best = torch.linalg.lstsq(rows, rhs[:, None]).solution[:, 0]
    coefficients = [proposal.step_size, proposal.momentum][: len(best)]
    received = torch.tensor(coefficients, dtype=torch.float64)
    torch.testing.assert_close(received, best, rtol=1e-8, atol=0)
    start = m(torch.zeros_like(best))
    assert proposal.predicted_decrease == pytest.approx(start - m(received), rel=1e-8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):  # no neighbour is better
        step = torch.randn(len(best), generator=generator, dtype=r.dtype)
        assert m(best + 1e-3 * step * best.norm()) > m(received)


def test_previous_update_can_be_left_out():
    model = network()
    direction, previous = random_like(model, 2), random_like(model, 3)
    objective = poisson(model)
    without = QuadraticModel(use_momentum=False).propose(situation(objective, direction, previous))
    assert without == QuadraticModel().propose(situation(objective, direction))
    assert without.momentum == 0


def test_previous_update_parallel_to_the_direction():
    model = network()
    direction, objective = random_like(model, 2), poisson(network())
    alone = QuadraticModel().propose(situation(objective, direction))
    both = QuadraticModel().propose(situation(objective, direction, [3 * d for d in direction]))
    assert both.step_size + 3 * both.momentum == pytest.approx(alone.step_size, rel=1e-9)
    assert both.predicted_decrease == pytest.approx(alone.predicted_decrease, rel=1e-9)


def test_model_makes_no_pass(monkeypatch):
    model = Calls(network())
    at = situation(poisson(model), random_like(model, 2), random_like(model, 3))
    model.count = 0

    def forbidden(*args, **kwargs):
        raise AssertionError("differentiated")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    QuadraticModel().propose(at)
    assert model.count == 0


def test_passes_of_a_step():
    """Two terms: one pass of each to linearize, one of each to try the step, which is reused.

    A shortened step is looked at without a graph first, which is one more, and starts at up to four
    times the scale of the last.
    """
    model = Calls(network())
    objective = poisson(model)
    optimizer = presets.kfac_star(model.parameters(), damping=1e-2)
    for first in (True, False, False, False):
        skipped = optimizer.preconditioner.state["halvings"]
        model.count = 0
        record = optimizer.step(objective)
        tried = 1 - math.log2(record.scale) - skipped
        assert model.count == 2 * first + 2 * tried + 2 * (record.scale < 1)


def test_the_model_of_a_step_predicts_a_linear_problem():
    """The decrease is what was predicted, and one step without damping solves the problem."""
    model = network(2, 1)
    x = points(9)
    term = LossTerm(
        {"u": Value(), "u_x": Partial(0)},
        lambda x, u, u_x: torch.cat([u + 2 * u_x - torch.sin(3 * x[:, :1]), u_x - x[:, 1:]], 1),
        Fixed(x),
    )
    objective = Objective(model, [term], [x])
    optimizer = CurvatureOptimizer(model.parameters(), GaussNewton(), Damped(1e-14))
    linearized = objective.linearize()
    J, r = linearized.jacobian.to_dense(), linearized.residual[0].flatten()
    best = flat(model) - torch.linalg.lstsq(J, r[:, None]).solution[:, 0]
    record = optimizer.step(objective)
    torch.testing.assert_close(flat(model), best, rtol=1e-9, atol=1e-12)
    assert record.step_size == pytest.approx(1, rel=1e-9)
    assert record.loss - record.new_loss == pytest.approx(record.predicted_decrease, rel=1e-9)
    assert record.new_loss == pytest.approx(objective.loss().item(), rel=1e-12)
    again = optimizer.step(objective)
    assert again.predicted_decrease < 1e-20


# --- the grid -------------------------------------------------------------------------------------


def test_grid_picks_the_best_of_all():
    model = network()
    objective = poisson(model)
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-4), GridLineSearch()
    )
    start = flat(model)
    linearized = objective.linearize()
    J, g = linearized.jacobian.to_dense(), flat(linearized.gradient())
    direction = -torch.linalg.solve(J.T @ J + 1e-4 * torch.eye(len(g), dtype=g.dtype), g)
    losses = {}
    for k in range(-30, 1):
        set_flat(model, start + 2.0**k * direction)
        losses[2.0**k] = objective.loss().item()
    set_flat(model, start)
    record = optimizer.step(objective)
    assert record.step_size == min(losses, key=losses.get)
    assert 2.0**-30 < record.step_size < 1
    assert record.new_loss == pytest.approx(min(losses.values()), rel=1e-9)


def test_grid_evaluates_without_a_graph():
    model = network()
    objective, seen = poisson(model), []
    loss = objective.loss

    def spy():
        value = loss()
        seen.append((torch.is_grad_enabled(), value.requires_grad))
        return value

    objective.loss = spy
    presets.kfac(model.parameters()).step(objective)
    assert seen == [(False, False)] * 31
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_never_wins(bad):
    losses = {2.0**k: 1.0 + k**2 for k in range(-5, 1)} | {1.0: bad, 2.0**-5: bad}
    objective = poisson(network())
    at = situation(objective, [], try_update=lambda update, scale: losses[scale])
    proposal = GridLineSearch(first=-5).propose(at)
    assert (proposal.step_size, proposal.new_loss) == (0.5, 2.0)
    at = situation(objective, [], try_update=lambda update, scale: bad)
    proposal = GridLineSearch(first=-5).propose(at)
    assert proposal.step_size == 2.0**-5
    assert math.isnan(proposal.new_loss)


def test_grid_of_one_step():
    at = situation(poisson(network()), [], try_update=lambda update, scale: scale)
    assert GridLineSearch(-3, -3).propose(at).step_size == 0.125


# --- the longest step that falls enough -----------------------------------------------------------


@pytest.mark.parametrize(
    ("decrease", "expected"),
    [(0.0, 0.25), (0.01, 0.25), (0.7, 0.0625), (0.99, 2.0**-9)],
)
def test_the_longest_step_that_falls_enough(decrease, expected):
    """Along L(α) - L(0) = -α + 3 α² + 2 α³, which must be at most -c α."""
    at = along_gradient(lambda a: -a + 3 * a**2 + 2 * a**3)
    proposal = ArmijoLineSearch(0.5, decrease).propose(at)
    assert proposal.step_size == proposal.scale == expected
    assert proposal.new_loss == at.try_update(at.direction, expected) < at.loss


@pytest.mark.parametrize("rise", [1.0, math.nan, math.inf, -math.inf])
def test_no_step_falls_enough(rise):
    at = along_gradient(lambda a: rise)
    proposal = ArmijoLineSearch(0.5, trials=4).propose(at)
    assert proposal.step_size == 0.125
    assert proposal.new_loss == pytest.approx(at.loss + rise, nan_ok=True)


def along_gradient(change):
    """Return a situation whose direction has the slope -1, where the loss changes as is said."""
    at = situation(poisson(network()), [])
    square = sum(part.square().sum() for part in at.gradient)
    direction = [-part / square for part in at.gradient]
    return replace(at, direction=direction, try_update=lambda _, a: at.loss + change(a))


@pytest.mark.parametrize("lr", [5.0, 0.1])
@pytest.mark.parametrize("search", [ArmijoLineSearch(decrease=0.3), GridLineSearch(-10)])
def test_a_search_is_along_the_update_that_is_taken(search, lr):
    """With a learning rate, which multiplies the update."""
    model = network(2, 8, 1)
    objective = poisson(model)
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-3), search, max_halvings=0, lr=lr
    )
    for _ in range(4):
        before, gradient = flat(model), flat(objective.linearize().gradient())
        record = optimizer.step(objective)
        assert record.accepted
        if isinstance(search, ArmijoLineSearch):
            decrease = record.loss - record.new_loss
            assert decrease >= 0.3 * -(gradient @ (flat(model) - before)).item() > 0


def test_what_no_search_can_be():
    for arguments, message in (
        ({"factor": 1e-10}, "factor must not vanish in as many powers as there are trials"),
        ({"factor": 1.0}, r"factor must be in \(0, 1\), got 1.0"),
        ({"decrease": math.nan}, r"decrease must be in \[0, 1\), got nan"),
        ({"trials": 0}, "trials must be a whole number >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ArmijoLineSearch(**arguments)


# --- steps of bounded length ----------------------------------------------------------------------


@pytest.mark.parametrize("norm", [1e-3, 0.05, 1e6])
def test_steps_are_no_longer_than_allowed(norm):
    """α = min(η, c / ‖Δ‖), by the length of the update of all parameters together."""
    model = network()
    objective, before = poisson(model), flat(model)
    linearized = objective.linearize()
    J, g = linearized.jacobian.to_dense(), flat(linearized.gradient())
    direction = -torch.linalg.solve(J.T @ J + 1e-2 * torch.eye(len(g), dtype=g.dtype), g)
    expected = min(0.02, norm / direction.norm().item())
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-2), NormConstrained(0.02, norm)
    )
    record = optimizer.step(objective)
    assert record.accepted
    assert record.step_size == pytest.approx(expected, rel=1e-9)
    assert (expected < 0.02) == (norm < 1)
    torch.testing.assert_close(flat(model), before + expected * direction, rtol=1e-9, atol=1e-12)


def test_bounded_steps_of_no_length():
    at = situation(poisson(network()), [torch.zeros(3), torch.zeros(2, 2)])
    assert NormConstrained(0.5, 0.1).propose(at).step_size == 0.5


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_bounds_must_be_positive(bad):
    with pytest.raises(ValueError, match="step_size must be finite and positive"):
        NormConstrained(bad, 1.0)
    with pytest.raises(ValueError, match="norm must be finite and positive"):
        NormConstrained(1.0, bad)


# --- fixed steps and heavy ball -------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [None, 0.7])
def test_fixed_steps_against_a_loop(momentum):
    model, twin = network(), network()
    objective, mirror = poisson(model), poisson(twin)
    optimizer = fixed(
        model.parameters(), 0.02, momentum=None if momentum is None else HeavyBall(momentum)
    )
    velocity = 0.0
    for _ in range(6):
        linearized = mirror.linearize()
        J, g = linearized.jacobian.to_dense(), flat(linearized.gradient())
        C = J.T @ J + 1e-2 * torch.eye(len(g), dtype=g.dtype)
        velocity = (momentum or 0.0) * velocity - torch.linalg.solve(C, g)
        set_flat(twin, flat(twin) + 0.02 * velocity)
        record = optimizer.step(objective)
        assert record.accepted
        assert (record.scale, record.step_size, record.momentum) == (1, 0.02, 0)
        assert math.isnan(record.predicted_decrease)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-11)


def test_model_and_heavy_ball_together():
    """The update is α b + μ δ with b the heavy ball and δ the previous update."""
    model = network()
    objective = poisson(model)
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-1), momentum=HeavyBall(0.5)
    )
    optimizer.step(objective)
    b, start = flat(optimizer.state[p]["momentum_buffer"] for p in model.parameters()), flat(model)
    previous = flat(optimizer.state[p]["previous_update"] for p in model.parameters())
    linearized = objective.linearize()
    J, g = linearized.jacobian.to_dense(), flat(linearized.gradient())
    C = J.T @ J + 0.1 * torch.eye(len(g), dtype=g.dtype)
    b = 0.5 * b - torch.linalg.solve(C, g)
    record = optimizer.step(objective)
    assert record.momentum != 0
    expected = start + record.step_size * b + record.momentum * previous
    torch.testing.assert_close(flat(model), expected, rtol=1e-9, atol=1e-11)


def test_fixed_step_of_one_is_the_default():
    assert FixedStep() == FixedStep(1.0)


def test_trying_leaves_no_trace():
    """However many updates were tried, the parameters are those of before."""
    model = network()
    before, objective = values(model), poisson(model)
    seen = []

    class Curious(FixedStep):
        def propose(self, at: Situation):
            for scale in (1.0, 1e9, math.nan):
                at.try_update(at.direction, scale)
                seen.append(all(map(torch.equal, before, values(model))))
            return super().propose(at)

    optimizer = CurvatureOptimizer(model.parameters(), GaussNewton(), Damped(1e-2), Curious(1e-3))
    assert optimizer.step(objective).accepted
    assert seen == [True] * 3


def test_a_scalar_network_parameter():
    """One weight and no bias: all vectors have length one."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False, dtype=torch.float64))
    x = points(4, 1)
    term = LossTerm({"u": Value()}, lambda x, u: u - 3 * x, Fixed(x))
    optimizer = presets.gauss_newton(model.parameters())
    for _ in range(3):
        optimizer.step(Objective(model, [term], [x]))
    assert model[0].weight.item() == pytest.approx(3, rel=1e-9)


# --- a step size of one's own ---------------------------------------------------------------------


def test_a_step_size_that_returns_no_proposal_is_refused():
    class Forgetful(FixedStep):
        def propose(self, situation):
            super().propose(situation)

    model = network()
    optimizer = fixed(model.parameters())
    optimizer.step_size = Forgetful(0.1)
    with pytest.raises(TypeError, match=r"Forgetful\.propose must return a Proposal, got NoneType"):
        optimizer.step(poisson(model))
