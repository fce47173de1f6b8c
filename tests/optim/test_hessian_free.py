"""Hessian-free: warm starts, backtracking over iterates, and damping that adapts to any inverse."""

import math

import pytest
import torch

from pinncurv import presets
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    MatrixFreeGaussNewton,
)
from pinncurv.curvature.iterative import PreconditionedCG
from pinncurv.linops import Damped, DenseLinearOperator, FactorDamping, trace_norm
from pinncurv.linops.cg import CGIterate, CGRecord, CGResult
from pinncurv.optim import (
    ArmijoLineSearch,
    CurvatureOptimizer,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    LevenbergMarquardt,
    QuadraticModel,
    Situation,
)
from pinncurv.optim.damping import ShortStepDamping
from pinncurv.optim.momentum import WarmStart
from pinncurv.optim.step_sizes import CGBacktracking
from tests.optim.cases import (
    MatrixOperator,
    Obstacle,
    flat,
    linear_fit,
    network,
    poisson,
    set_flat,
    taken,
)

matrix_free = MatrixFreeGaussNewton()
TRUNCATED = PreconditionedCG(1e-2, curvature=None, max_iterations=4, stop=None, spacing=1.3)


def like(vector, model):
    """Cut a vector into tensors of the shapes of a network's parameters."""
    parts = vector.split([p.numel() for p in model.parameters()])
    return [part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)]


def descent(model, recipe=TRUNCATED) -> Situation:
    linearized = poisson(model).linearize()
    inverse = recipe(matrix_free(linearized.linearizations))
    return Situation(linearized, linearized.gradient(), inverse)


# --- warm starts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_a_warm_start_solves_for_the_difference(decay):
    """Δ = ζδ - (C + λI)⁻¹(∇L + (C + λI) ζδ) with the same, truncated, solve."""
    model = network(2, 5, 4, 1)
    step = descent(model)
    previous = like(torch.linspace(-1, 1, len(flat(model)), dtype=torch.float64), model)
    received = flat(WarmStart(decay).direction(step, previous))
    C, start = matrix_free(step.linearized.linearizations), decay * flat(previous)
    residual = flat(step.gradient) + C @ start + 1e-2 * start
    torch.testing.assert_close(received, start - step.inverse @ residual, rtol=1e-10, atol=1e-12)
    cold = flat(WarmStart(decay).direction(step, None))
    torch.testing.assert_close(cold, -(step.inverse @ flat(step.gradient)), rtol=0, atol=0)
    assert not torch.allclose(received, cold, rtol=0.1)


def test_a_converged_solve_forgets_its_start():
    model = network()
    exact = PreconditionedCG(1e-2, tolerance=1e-13, max_iterations=None, stop=None)
    previous = like(torch.ones_like(flat(model)), model)
    dense = Situation(
        (linearized := poisson(model).linearize()),
        linearized.gradient(),
        Damped(1e-2)(GaussNewton()(linearized.linearizations)),
    )
    expected = flat(dense.step())
    for step in (descent(model, exact), dense):
        received = flat(WarmStart(0.9).direction(step, previous))
        torch.testing.assert_close(received, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("decay", [-0.1, 1.1, math.nan])
def test_decay_must_be_valid(decay):
    with pytest.raises(ValueError, match=r"decay of a warm start must be in \[0, 1\]"):
        WarmStart(decay)


def test_the_last_solution_is_remembered_not_the_iterate_that_was_taken():
    """Step by step against warm starts of one's own."""
    model = network(2, 5, 4, 1)
    objective, previous = poisson(model), None
    optimizer = CurvatureOptimizer(
        model.parameters(), matrix_free, TRUNCATED, CGBacktracking(), momentum=WarmStart(0.8)
    )
    shortened = []
    for _ in range(4):
        expected = flat(WarmStart(0.8).direction(descent(model), previous))
        before = flat(model)
        assert optimizer.step(objective).accepted
        previous = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
        torch.testing.assert_close(flat(previous), expected, rtol=1e-9, atol=1e-12)
        shortened.append(not torch.allclose(flat(model) - before, expected))
    assert any(shortened)


# --- backtracking over the iterates ---------------------------------------------------------------


class Iterates(MatrixOperator):
    """An inverse that has gone through given iterates of one number."""

    def __init__(self, *numbers):
        super().__init__(torch.eye(1), [(1, 1)], [(1, 1)])
        steps = [
            CGIterate(i, torch.tensor([float(x)]), -10.0 * i) for i, x in enumerate(numbers, 1)
        ]
        record = CGRecord(len(steps), (1.0,), 1.0, False, (0.0,))
        self.last_results = (CGResult(steps[-1].solution, record, tuple(steps)),)

    def solve_from(self, b, start):
        return b


@pytest.mark.parametrize(
    ("losses", "taken", "tried"),
    [
        ([5.0, 4.0, 3.0, 2.0], 4, [4, 3]),
        ([1.0, 4.0, 3.0, 3.5], 3, [4, 3, 2]),  # stops at the first that is no lower
        ([1.0, 2.0, 3.0, 4.0], 1, [4, 3, 2, 1]),
        ([5.0, 3.0, math.nan, math.inf], 2, [4, 3, 2, 1]),
        ([2.0, 2.0, 2.0, 2.0], 4, [4, 3]),
    ],
)
def test_goes_back_while_the_loss_falls(losses, taken, tried):
    seen = []

    def try_update(update, scale):
        seen.append(round(-update[0].item()))
        return losses[seen[-1] - 1]

    gradient, linearized = [torch.zeros(1, 1)], linear_fit(1.0).linearize()
    at = Situation(linearized, gradient, Iterates(1, 2, 3, 4), try_update=try_update)
    proposal = CGBacktracking().propose(at)
    assert seen == tried
    assert (proposal.step_size, proposal.momentum) == (1.0, 0.0)
    assert torch.equal(proposal.direction[0], torch.tensor([[-float(taken)]]))
    assert proposal.predicted_decrease == 10.0 * taken
    assert proposal.new_loss == losses[taken - 1]


def test_the_best_iterate_is_taken():
    """In the optimizer: parameters, loss and predicted decrease are those of a kept iterate."""
    model = network(2, 5, 1)
    objective, start = poisson(model), flat(model)
    recipe = PreconditionedCG(1.0, curvature=None, max_iterations=4, stop=None, spacing=1.3)
    step = descent(model, recipe)
    step.step()
    iterates = step.inverse.last_results[0].iterates
    losses = []
    for iterate in iterates:
        set_flat(model, start - iterate.solution)
        losses.append(objective.loss().item())
    set_flat(model, start.clone())  # it becomes the parameters' memory
    optimizer = CurvatureOptimizer(model.parameters(), matrix_free, recipe, CGBacktracking())
    record = optimizer.step(objective)
    best = losses.index(min(losses))
    assert 0 < best < 3
    assert losses[best] < record.loss
    assert record.new_loss == pytest.approx(losses[best], rel=1e-10)
    torch.testing.assert_close(flat(model), start - iterates[best].solution, rtol=1e-10, atol=1e-12)
    update = -iterates[best].solution
    set_flat(model, start)
    assert record.predicted_decrease == pytest.approx(model_at(objective, update, 1.0), rel=1e-8)


def test_an_inverse_without_iterates():
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-2), CGBacktracking()
    )
    with pytest.raises(TypeError, match="CGBacktracking needs an inverse that iterates"):
        optimizer.step(poisson(model))


# --- damping that adapts, with any operator, inverse and step size --------------------------------

WAYS = {
    "dense": (GaussNewton(), Damped(1e-3)),
    "blocks": (BlockDiagonalGaussNewton(), Damped(1e-3)),
    "diagonal": (DiagonalGaussNewton(), Damped(1e-3)),
    "kfac": (KFAC(), Damped(1e-3)),
    "kfac, damped factors": (KFAC(), FactorDamping(1e-3, trace_norm)),
    "kernel": (matrix_free, Damped(1e-3)),
    "cg": (matrix_free, PreconditionedCG(1e-3)),
    "cg, plain": (matrix_free, PreconditionedCG(1e-3, curvature=None)),
}


@pytest.mark.parametrize("name", WAYS)
def test_adaptive_damping_of_every_inverse(name):
    model = network(2, 8, 1)
    optimizer = CurvatureOptimizer(
        model.parameters(), *WAYS[name], QuadraticModel(), damping_rule=LevenbergMarquardt()
    )
    objective, start = poisson(model), flat(model)
    first = objective.loss().item()
    records = [optimizer.step(objective) for _ in range(12)]
    assert all(record.accepted and record.scale == 1 for record in records)
    assert records[-1].new_loss < (0.5 if name == "diagonal" else 0.1) * first
    assert len({record.damping for record in records}) > 2
    assert not torch.equal(start, flat(model))


def model_at(objective, update, damping):
    """m(0) - m(v) by the dense Jacobian."""
    linearized = objective.linearize()
    J, r = linearized.jacobian.to_dense(), torch.cat([p.flatten() for p in linearized.residual])
    m = 0.5 * (r + J @ update).square().sum() + 0.5 * damping * update.square().sum()
    return (0.5 * r @ r - m).item()


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.3, 0.3), (0.3, 0.7)])
@pytest.mark.parametrize(
    "step_size",
    [QuadraticModel(), FixedStep(0.02), GridLineSearch(-8), ArmijoLineSearch(), CGBacktracking()],
)
def test_prediction_is_of_the_update_that_was_taken(step_size, rates):
    """Also with learning rates below one, and with step sizes that know no model."""
    model = network(2, 5, 1)
    groups = [
        {"params": layer.parameters(), "lr": lr}
        for layer, lr in zip((model[0], model[2]), rates, strict=True)
    ]
    optimizer = CurvatureOptimizer(
        groups, matrix_free, TRUNCATED, step_size, damping_rule=LevenbergMarquardt()
    )
    objective = poisson(model)
    for _ in range(3):
        start = flat(model)
        linearized = poisson(model)
        record, before = optimizer.step(objective), flat(model)
        set_flat(model, start)
        expected = model_at(linearized, before - start, record.damping)
        set_flat(model, before)
        assert record.accepted
        assert record.predicted_decrease == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_prediction_of_a_shortened_update():
    model = network(2, 5, 1)
    objective, start = poisson(model), flat(model)
    obstacle = Obstacle(objective, lambda loss, d: loss if d < 0.01 else 1e9)
    optimizer = CurvatureOptimizer(model.parameters(), GaussNewton(), Damped(1e-3))
    record = optimizer.step(obstacle)
    assert 0 < record.scale < 1
    update = flat(model) - start
    set_flat(model, start)
    assert record.predicted_decrease == pytest.approx(model_at(objective, update, 1e-3), rel=1e-7)


def test_half_a_step_on_a_linear_problem_is_predicted_well():
    """With lr = ½ the decrease is ¾ of the whole; λ must not take that for a poor model."""
    fit = linear_fit(1.0, -2.0)
    optimizer = presets.levenberg_marquardt(
        [{"params": fit.parameters, "lr": 0.5}], curvature=plain_gauss_newton
    )
    record = optimizer.step(fit)
    assert record.loss - record.new_loss == pytest.approx(record.predicted_decrease, rel=1e-2)
    assert optimizer.preconditioner.damping == pytest.approx(1e-3 / 3)


def plain_gauss_newton(linearizations):
    rows = linearizations[0].rows
    return DenseLinearOperator(rows.T @ rows, [p.shape for p in linearizations[0].parameters])


@pytest.mark.parametrize(
    ("scale", "expected"), [(2.0**-11, 1e-3), (2.0**-10, 1e-4), (0.0625, 1e-4), (0.125, 1e-5)]
)
def test_damping_of_short_steps(scale, expected):
    rule = ShortStepDamping()
    assert rule.accepted(taken(1e-4, math.nan, scale)) == pytest.approx(expected)
    assert rule.rejected(1e-4) == pytest.approx(1e-3)
    assert rule.accepted(taken(1e-12, 1.0)) == 1e-12
    assert rule.rejected(1e8) == 1e8
    assert rule.retries == 0


def test_short_steps_raise_the_damping():
    model = network()
    optimizer = presets.gauss_newton(model.parameters(), 1e-6, damping_rule=ShortStepDamping())
    wall = Obstacle(poisson(model), lambda loss, d: loss if d < 1e-6 else 1e9)
    assert optimizer.step(wall).accepted
    assert optimizer.step(poisson(model)).damping == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 1.0}, "factor > 1 and 0 < short <= long, got 1.0"),
        ({"short": 0.5}, "short <= long"),
        ({"minimum": 0.0}, "0 < minimum <= maximum"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ShortStepDamping(**settings)


# --- the methods ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("curvature", [None, KFAC()])
def test_hessian_free_trains(curvature):
    model = network(2, 12, 1)
    objective = poisson(model, n=6)
    optimizer = presets.hessian_free(model.parameters(), curvature=curvature)
    records = [optimizer.step(objective) for _ in range(20)]
    losses = [record.loss for record in records]
    assert losses == sorted(losses, reverse=True)
    assert records[-1].new_loss < 1e-2 * losses[0]
    for record in records:
        (solve,) = record.solver["last_records"]
        assert 0 < solve.iterations <= 250
        assert len(solve.values) == solve.iterations + 1
        assert record.predicted_decrease > 0
        assert record.scale == record.accepted  # never shortened
    assert records[-1].accepted


@pytest.mark.slow
def test_gauss_newton_cg_trains():
    model = network(2, 12, 1, seed=2)
    objective, optimizer = poisson(model, n=6), presets.gauss_newton_cg(model.parameters())
    records = [optimizer.step(objective) for _ in range(30)]
    assert records[-1].new_loss < 1e-4 * records[0].loss
    assert all(len(record.solver["last_records"]) == 1 for record in records)


def test_momentum_beside_backtracking():
    """Any momentum may be given; the iterates replace its direction."""
    model = network(2, 5, 1)
    optimizer = CurvatureOptimizer(
        model.parameters(), matrix_free, TRUNCATED, CGBacktracking(), momentum=HeavyBall(0.5)
    )
    records = [optimizer.step(poisson(model)) for _ in range(3)]
    assert records[-1].new_loss < records[0].loss
    assert len(records[-1].solver["last_records"]) == 1
