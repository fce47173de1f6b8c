"""Damping that adapts: up when a step raises the loss, down when the model predicts well."""

import math
from dataclasses import replace

import pytest
import torch

from pinncurv import presets
from pinncurv.curvature import KFAC, GaussNewton, Objective
from pinncurv.diffops import Value
from pinncurv.linops import Damped, DenseLinearOperator, FactorDamping
from pinncurv.optim import (
    ConstantDamping,
    CurvatureOptimizer,
    FixedStep,
    LevenbergMarquardt,
    LossDamping,
    Proposal,
    QuadraticModel,
    ShortStepDamping,
    StepSize,
)
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points
from tests.optim.cases import (
    OPTIMIZERS,
    Obstacle,
    flat,
    linear_fit,
    network,
    poisson,
    same,
    taken,
    values,
)


def dense(linearizations):
    """Build JᵀJ with an inverse."""
    rows = linearizations[0].rows
    return DenseLinearOperator(rows.T @ rows, [p.shape for p in linearizations[0].parameters])


def adaptive(parameters, damping=1e-2, **settings) -> CurvatureOptimizer:
    rule = LevenbergMarquardt(**settings)
    return CurvatureOptimizer(
        parameters, dense, Damped(damping), QuadraticModel(), damping_rule=rule
    )


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(1.0, 1.0), (0.76, 1.0), (0.75, 3.0), (0.5, 3.0), (0.25, 3.0), (0.24, 6.0), (-1.0, 6.0)],
)
def test_after_a_step_that_was_taken(ratio, expected):
    assert LevenbergMarquardt().accepted(taken(3.0, ratio)) == expected


def test_without_a_prediction_the_damping_stays():
    assert LevenbergMarquardt().accepted(taken(3.0, math.nan)) == 3.0


def test_bounds():
    rule = LevenbergMarquardt(minimum=1e-3, maximum=1e3)
    assert rule.accepted(taken(2e-3, 1.0)) == 1e-3
    assert rule.accepted(taken(900.0, 0.0)) == 1e3
    assert rule.rejected(900.0) == 1e3
    assert rule.rejected(2.0) == 16.0
    assert rule.rejected(0.0) == 1e-3  # no factor would lead away from zero


class Uphill(StepSize):
    def propose(self, situation):
        return Proposal(-1.0)


@pytest.mark.parametrize("accepted", [True, False])
def test_constant_is_what_was_asked_for_though_an_inverse_takes_more(accepted: bool):
    objective = poisson(network())
    optimizer = presets.gauss_newton(objective.parameters(), damping=1e-18)
    if not accepted:
        optimizer.step_size, optimizer.max_halvings = Uphill(), 0
    record = optimizer.step(objective)
    assert record.accepted == accepted
    assert record.damping > 1e-18
    assert optimizer.preconditioner.state["damping"] == 1e-18


def test_constant():
    rule = ConstantDamping()
    assert rule.accepted(taken(3.0, 0.1)) == rule.rejected(3.0) == 3.0
    assert rule.retries == 0


def test_good_predictions_shrink_the_damping():
    """A linear problem is predicted well."""
    fit = linear_fit(1.0, -2.0)
    optimizer = adaptive(fit.parameters, damping=1e-2)
    for k in range(4):
        record = optimizer.step(fit)
        assert record.accepted
        assert record.damping == pytest.approx(1e-2 / 3**k)


def test_poor_predictions_grow_the_damping():
    fit = linear_fit(1.0, -2.0)
    optimizer = adaptive(fit.parameters, damping=1e-2)
    before = fit.loss().item()
    bad = Obstacle(fit, lambda loss, distance: 0.9 * before)
    assert optimizer.step(bad).accepted
    assert optimizer.step(fit).damping == pytest.approx(2e-2)


@pytest.mark.parametrize("failures", [1, 3])
@pytest.mark.parametrize("bad", [1e3, math.nan, math.inf])
def test_rejected_steps_are_tried_again_with_more_damping(failures, bad):
    """Within one step, without halving, from the same point."""
    fit = linear_fit(1.0, -2.0)
    optimizer = adaptive(fit.parameters, damping=1.0)
    count = []

    def elsewhere(loss, distance):
        count.append(distance)
        return bad if len(count) <= failures else loss

    record = optimizer.step(Obstacle(fit, elsewhere))
    assert record.accepted
    assert (record.scale, record.reason) == (1.0, "")
    assert record.damping == 8.0**failures
    assert len(count) == failures + 1
    start = torch.tensor([1.0, -2.0], dtype=torch.float64)
    # the quadratic model scales the direction, with the damping in it
    damping = 8.0**failures
    torch.testing.assert_close(flat(fit.parameters), start * (1 - 1 / (1 + damping)))
    assert optimizer.step(fit).damping == pytest.approx(
        damping / 3 if _ratio(record) > 0.75 else damping
    )


def _ratio(record):
    return (record.loss - record.new_loss) / record.predicted_decrease


def test_retries_run_out():
    fit = linear_fit(1.0, -2.0)
    optimizer = adaptive(fit.parameters, damping=1.0, max_retries=2)
    before = values(fit.parameters)
    obstacle = Obstacle(fit, lambda loss, distance: 1e3)
    record = optimizer.step(obstacle)
    assert not record.accepted
    assert "rejected: the update raised the loss" in record.reason
    assert len(obstacle.evaluated) == 3
    assert record.damping == 64.0
    assert same(before, values(fit.parameters))
    assert optimizer.step(fit).damping == 512.0


def test_no_retries_halve_instead():
    fit = linear_fit(1.0, -2.0)
    optimizer = adaptive(fit.parameters, damping=1.0, max_retries=0)
    record = optimizer.step(Obstacle(fit, lambda loss, d: loss if d < 0.5 else 1e3))
    assert record.accepted
    assert record.scale == 0.25
    assert record.damping == 1.0


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_adaptive_damping_of_a_network(chunk_size):
    """Retries need the linearization at the point of before, also if it is recomputed."""
    model = network()
    optimizer = presets.gauss_newton(model.parameters(), 1e-3, damping_rule=LevenbergMarquardt())
    objective = poisson(model, chunk_size=chunk_size)
    records = [optimizer.step(objective) for _ in range(6)]
    dampings = [record.damping for record in records]
    assert max(dampings) > 1e-3  # the first steps are too bold
    losses = [record.loss for record in records]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.9 * losses[0]


def test_damping_of_kronecker_factors_adapts():
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(), KFAC(), FactorDamping(1e-6), damping_rule=LevenbergMarquardt()
    )
    objective = poisson(model)
    dampings = {optimizer.step(objective).damping for _ in range(4)}
    assert len(dampings) > 1


def test_adaptive_damping_with_a_fixed_step():
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(),
        GaussNewton(),
        Damped(1.0),
        FixedStep(0.01),
        damping_rule=LevenbergMarquardt(shrink=2.0),
    )
    objective = poisson(model)
    assert [optimizer.step(objective).damping for _ in range(3)] == [1.0, 0.5, 0.25]


FOLLOWERS = {
    "gauss_newton": lambda p, rule: presets.gauss_newton(p, 1.0, damping_rule=rule),
    "engd_w": lambda p, rule: presets.engd_w(p, 1.0, damping_rule=rule),
    "gauss_newton_cg": lambda p, rule: presets.gauss_newton_cg(p, 1.0, damping_rule=rule),
    "subspace": lambda p, rule: presets.subspace_gauss_newton(p, 5, 1.0, damping_rule=rule),
    "kfac": lambda p, rule: CurvatureOptimizer(p, KFAC(), FactorDamping(1.0), damping_rule=rule),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_damping_that_follows_the_loss(name):
    """That of the last step that was taken, between two bounds, with any curvature."""
    model = network()
    objective = poisson(model)
    rule = LossDamping(1e-2, 1e-9, maximum=0.9e-2 * objective.loss().item())
    optimizer = FOLLOWERS[name](model.parameters(), rule)
    expected = 1.0  # the inverse's own
    for _ in range(4):
        record = optimizer.step(objective)
        assert record.accepted
        assert record.damping == expected
        expected = min(1e-2 * record.new_loss, rule.maximum)
    assert expected < rule.maximum


def test_bounds_of_a_damping_that_follows_the_loss():
    rule = LossDamping(0.1, 1e-6, 1e-2)
    for loss, expected in ((1e-7, 1e-6), (1e-3, 1e-4), (1.0, 1e-2)):
        record = replace(taken(3.0, 1.0), new_loss=loss)
        assert rule.accepted(record) == pytest.approx(expected)
    assert rule.rejected(1e-5) == pytest.approx(1e-4)
    assert (rule.rejected(1e-2), rule.rejected(0.0)) == (1e-2, 1e-6)
    assert rule.retries == 0
    with pytest.raises(ValueError, match=r"must be a sum of squares, .* got -1, as of"):
        rule.accepted(replace(taken(3.0, 1.0), new_loss=-1.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 0.0}, "factor must be positive and finite, got 0.0"),
        ({"factor": math.nan}, "factor must be positive"),
        ({"factor": math.inf}, "factor must be positive"),
        ({"minimum": 1.0, "maximum": 0.1}, "minimum <= maximum"),
    ],
)
def test_bad_settings_of_a_damping_that_follows_the_loss(settings, message):
    with pytest.raises(ValueError, match=message):
        LossDamping(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shrink": 1.0}, "must be greater than 1, got 1.0"),
        ({"grow": 0.5}, "must be greater than 1"),
        ({"reject": math.nan}, "must be greater than 1"),
        ({"poor": 0.8}, "poor <= good"),
        ({"good": math.nan}, "poor <= good"),
        ({"minimum": 0.0}, "0 < minimum"),
        ({"minimum": 1.0, "maximum": 0.1}, "minimum <= maximum"),
        ({"maximum": math.inf}, "maximum < inf"),
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LevenbergMarquardt(**settings)


RULES = [ConstantDamping(), LevenbergMarquardt(), LevenbergMarquardt(max_retries=0)]
RULES += [ShortStepDamping(), ShortStepDamping(short=0.4, long=0.5), LossDamping()]
STILL = ["warm-up", "below the resolution", "converged", "flat"]


def still(model, how):
    """Return an objective and a rate with which no step can move the parameters."""
    x = points(5)
    if how == "converged":
        data = {"y": model(x).detach()}
        term = LossTerm({"u": Value()}, lambda x, u, y: u - y, Fixed(x), data=data)
        return Objective(model, [term], [x]), 1.0
    if how == "flat":
        term = LossTerm({"u": Value()}, lambda x, u: 0 * u + 1, Fixed(x))
        return Objective(model, [term], [x]), 1.0
    return poisson(model), {"warm-up": 0.0, "below the resolution": 1e-30}[how]


@pytest.mark.parametrize("how", STILL)
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((name, LevenbergMarquardt()) for name in OPTIMIZERS),
        *(("gauss_newton", rule) for rule in RULES),
    ],
)
def test_no_rule_learns_from_a_step_that_cannot_move(name, rule, how):
    """The record says so, the damping stays, and so do the parameters, in every preset."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.damping_rule = rule
    objective, lr = still(model, how)
    optimizer.param_groups[0]["lr"] = lr
    before, damping = values(model), optimizer.preconditioner.damping
    for _ in range(2):
        record = optimizer.step(objective)
        assert (record.accepted, record.stalled, record.scale) == (False, True, 0)
        assert "no longer moves the parameters" in record.reason
        assert record.damping == damping == optimizer.preconditioner.damping
    assert same(before, values(model))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_halvings_act_under_every_rule_or_are_refused(rule):
    model = network()
    tried = Obstacle(poisson(model), lambda loss, d: 1e300)

    def make():
        return CurvatureOptimizer(
            model.parameters(),
            GaussNewton(),
            Damped(1e-1),
            FixedStep(1.0),
            damping_rule=rule,
            max_halvings=3,
        )

    if rule.retries:
        with pytest.raises(ValueError, match=r"max_halvings must be left out .* got 3 and Lev"):
            make()
        return
    record = make().step(tried)
    assert not record.accepted
    assert len(tried.evaluated) == 4
