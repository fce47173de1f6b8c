"""Steps that are not taken: the parameters come back bit for bit, and the record says why."""

import copy
import itertools
import math

import pytest
import torch

from pinncurv.curvature import KFAC, GaussNewton, Objective
from pinncurv.diffops import Laplacian, Value
from pinncurv.linops import Damped, FactorDamping, FactorizationError
from pinncurv.optim import (
    CurvatureOptimizer,
    ExponentialAverage,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    Intervals,
    LevenbergMarquardt,
    QuadraticModel,
    ShortStepDamping,
    StepRecord,
)
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points
from tests.optim.cases import OPTIMIZERS, Obstacle, fixed, flat, network, poisson, same, values

STEP_SIZES = [FixedStep(1e-2), GridLineSearch(-3), QuadraticModel()]


@pytest.mark.parametrize("bad", [math.inf, math.nan, -math.inf, 1e300])
@pytest.mark.parametrize("step_size", STEP_SIZES)
def test_a_loss_that_always_rises(step_size, bad):
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(), KFAC(), FactorDamping(1e-2), step_size, max_halvings=3
    )
    before, obstacle = values(model), Obstacle(poisson(model), lambda loss, d: bad)
    record = optimizer.step(obstacle)
    assert not record.accepted
    assert same(before, values(model))
    why, scale = "raised the loss" if bad == 1e300 else "made the loss non-finite", 0.125
    tried = 4
    if bad == -math.inf:  # below every loss, so nothing calls for halving
        scale, tried = 1, 1
    assert record.reason == f"rejected: the update {why} even at {scale:g} of its length"
    assert (record.step_size, record.momentum, record.scale) == (0, 0, 0)
    assert record.new_loss == record.loss
    if isinstance(step_size, GridLineSearch):
        tried += 4 - (bad == 1e300)  # the loss at what it chose is known, if it chose by a loss
    assert len(obstacle.evaluated) == tried


def test_an_update_below_the_resolution_of_the_parameters():
    """It changes nothing, so it was not accepted, though the loss is not above that of before."""
    model = network()
    before = values(model)
    optimizer = fixed(model.parameters(), 1e-30)
    record = optimizer.step(poisson(model))
    assert not record.accepted
    assert record.reason == (
        "rejected: at 1 of its length, the update no longer moves the parameters"
    )
    assert same(before, values(model))
    assert not any(optimizer.state[p] for p in model.parameters())


def test_halving():
    model = network()
    start = flat(model)
    obstacle = Obstacle(poisson(model), lambda loss, d: loss if d < 1e-3 else 1e9)
    record = fixed(model.parameters(), 0.1).step(obstacle)
    assert record.accepted
    lengths = obstacle.evaluated
    assert all(a == pytest.approx(2 * b, rel=1e-6) for a, b in itertools.pairwise(lengths))
    assert record.scale == 0.5 ** (len(lengths) - 1) < 1
    assert record.step_size == 0.1 * record.scale
    assert record.reason == f"shortened to {record.scale:g} of its length (more raised the loss)"
    assert torch.linalg.vector_norm(flat(model) - start).item() == pytest.approx(lengths[-1])
    assert 5e-4 <= lengths[-1] < 1e-3


def test_a_step_after_a_shortened_one_starts_where_that_ended():
    """Twice its scale, or four times where the first trial worked; a rejected one starts anew."""
    model = network()
    longest = {"length": 1e-3}
    obstacle = Obstacle(poisson(model), lambda loss, d: loss if d < longest["length"] else 1e9)
    optimizer = fixed(model.parameters(), 0.1)
    first = optimizer.step(obstacle)
    obstacle.evaluated.clear()
    second = optimizer.step(obstacle)
    assert len(obstacle.evaluated) == 2 - round(math.log2(second.scale / first.scale))
    longest["length"] = math.inf
    scales = [optimizer.step(obstacle).scale for _ in range(8)]
    assert scales[0] == 2 * second.scale
    assert scales == [min(1, 4**k * scales[0]) for k in range(8)]
    longest["length"] = 0.0
    assert not optimizer.step(obstacle).accepted
    longest["length"] = math.inf
    assert optimizer.step(obstacle).scale == 1


def test_an_update_that_was_shortened_is_remembered_as_it_was_taken():
    model = network()
    start = flat(model)
    obstacle = Obstacle(poisson(model), lambda loss, d: loss if d < 1e-3 else 1e9)
    optimizer = fixed(model.parameters(), 0.1)
    optimizer.step(obstacle)
    previous = flat(optimizer.state[p]["previous_update"] for p in model.parameters())
    torch.testing.assert_close(previous, flat(model) - start, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("momentum", [None, HeavyBall(0.5)])
def test_a_rejected_step_drops_momentum_and_previous_update(momentum):
    model = network()
    objective = poisson(model)
    optimizer = CurvatureOptimizer(
        model.parameters(), KFAC(), FactorDamping(1e-2), momentum=momentum, max_halvings=9
    )
    for _ in range(3):
        record = optimizer.step(objective)
    assert record.momentum != 0
    keys = {"previous_update", "momentum_buffer"} if momentum else {"previous_update"}
    assert all(set(optimizer.state[p]) == keys for p in model.parameters())
    assert not optimizer.step(Obstacle(objective, lambda loss, d: math.nan)).accepted
    assert not any(optimizer.state[p] for p in model.parameters())
    # the next one is the first step of a new optimizer
    new = CurvatureOptimizer(
        (twin := network()).parameters(), KFAC(), FactorDamping(1e-2), momentum=momentum
    )
    twin.load_state_dict(model.state_dict())
    record, expected = optimizer.step(objective), new.step(poisson(twin))
    assert record.accepted
    assert record.momentum == 0
    assert record.step_size == expected.step_size
    assert same(values(model), values(twin))


@pytest.mark.parametrize("name", ["kfac", "engd", "kfac_intervals", "adaptive_intervals"])
def test_every_optimizer_recovers(name):
    model = network()
    objective, optimizer = poisson(model), OPTIMIZERS[name](model.parameters())
    optimizer.step(objective)
    before = values(model)
    record = optimizer.step(Obstacle(objective, lambda loss, d: math.nan))
    assert not record.accepted
    assert same(before, values(model))
    start = objective.loss().item()
    optimizer.step(objective)
    assert objective.loss().item() < start


def test_the_record_of_a_proposal_that_is_not_finite():
    """α = NaN is not what was taken."""

    class Lost(FixedStep):
        def propose(self, situation):
            proposal = super().propose(situation)
            object.__setattr__(proposal, "step_size", math.nan)
            return proposal

    model = network()
    before = values(model)
    optimizer = CurvatureOptimizer(
        model.parameters(), KFAC(), FactorDamping(1e-2), Lost(), max_halvings=1
    )
    record = optimizer.step(poisson(model))
    assert not record.accepted
    assert (record.step_size, record.momentum) == (0, 0)
    assert same(before, values(model))


def test_no_halving():
    model = network()
    before = values(model)
    obstacle = Obstacle(poisson(model), lambda loss, d: 1e9)
    record = fixed(model.parameters(), 1e-2, max_halvings=0).step(obstacle)
    assert record.reason == "rejected: the update raised the loss even at 1 of its length"
    assert len(obstacle.evaluated) == 1
    assert same(before, values(model))


def test_at_a_minimum():
    """A zero gradient is a zero step, not a NaN."""
    model = network(2, 1)
    x = points(6)
    term = LossTerm({"u": Value()}, lambda x, u: 0 * u, Fixed(x))
    for step_size in (None, *STEP_SIZES):
        before = values(model)
        optimizer = CurvatureOptimizer(model.parameters(), GaussNewton(), Damped(1e-3), step_size)
        for _ in range(3):
            record = optimizer.step(Objective(model, [term], [x]))
            assert math.isfinite(record.step_size)
            assert record.new_loss == record.loss == 0
            assert not record.accepted
        assert same(before, values(model))


# --- errors leave everything as it was ------------------------------------------------------------


def broken_terms() -> list[LossTerm]:
    x = points(5)
    return [
        LossTerm({"u": Value()}, lambda x, u: u, Fixed(x), name="fine"),
        LossTerm({"lap": Laplacian()}, lambda x, lap: (lap - 1e6).log(), Fixed(x), name="log_term"),
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_not_finite_at_the_start(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    before = values(model)
    objective = Objective(model, broken_terms(), [points(5), points(5)])
    with pytest.raises(FloatingPointError, match=r"these terms are not: log_term \(nan\)"):
        optimizer.step(objective)
    assert same(before, values(model))


@pytest.mark.parametrize("name", ["engd", "kfac_intervals", "adaptive_intervals"])
def test_an_error_does_not_count(name):
    """Neither a bad batch nor an interrupted evaluation leaves a trace in the trajectory."""
    model, twin = network(), network()
    optimizer, reference = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    bad = Objective(model, poisson(model).terms, poisson(model).points)
    for step in range(3):
        with torch.no_grad():
            kept = model[0].weight[0, 0].clone()
            model[0].weight[0, 0] = math.nan
        with pytest.raises(FloatingPointError, match="interior"):
            optimizer.step(bad)
        with torch.no_grad():
            model[0].weight[0, 0] = kept

        def interrupt():
            raise KeyboardInterrupt

        objective = poisson(model, seed=step)
        objective.evaluate = objective.loss = interrupt
        before = values(model)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(objective)
        assert same(before, values(model))
        optimizer.step(poisson(model, seed=step))
        reference.step(poisson(twin, seed=step))
        assert same(values(model), values(twin))
    assert_same_state(optimizer.state_dict(), reference.state_dict())


def assert_same_state(left, right):
    states = [copy.deepcopy(part["state"]) for part in (left, right)]
    for key in ("names", "method"):  # strings, which torch does not compare
        mine, theirs = (state["curvature"].pop(key) for state in states)
        assert mine == theirs
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert left["param_groups"] == right["param_groups"]


def test_an_inverse_that_fails_does_not_spoil_the_average():
    """A singular matrix without damping: the error names it, and the next batch works."""
    model = network()
    optimizer = fixed(
        model.parameters(), 1e-3, inverse=Damped(0.0), average=ExponentialAverage(0.5)
    )
    with pytest.raises(FactorizationError):
        optimizer.step(poisson(model, n=2))
    assert optimizer.state_dict()["state"]["curvature"]["average"] is None
    assert optimizer.state_dict()["state"]["curvature"]["step"] == 0


def test_the_state_survives_an_error():
    """The state that is saved is the state that is used."""
    model = network()
    optimizer = fixed(
        model.parameters(), 1e-3, average=ExponentialAverage(0.5), intervals=Intervals(2, 2)
    )
    optimizer.step(poisson(model))
    with pytest.raises(FloatingPointError):
        optimizer.step(Objective(model, broken_terms(), [points(5), points(5)]))
    for _ in range(3):
        optimizer.step(poisson(model))
    assert optimizer.state_dict()["state"]["curvature"]["step"] == 4


@pytest.mark.parametrize("objective", [lambda: torch.zeros(()), None, torch.zeros(2)])
def test_a_step_needs_an_objective(objective):
    optimizer = fixed(network().parameters())
    with pytest.raises(TypeError, match="objective"):  # from beartype where it is on
        optimizer.step(objective)


def test_the_record_is_complete():
    model = network()
    objective = poisson(model)
    optimizer = CurvatureOptimizer(
        model.parameters(), KFAC(), FactorDamping(1e-2), damping_rule=LevenbergMarquardt()
    )
    losses = {name: loss.item() for name, loss in objective.term_losses().items()}
    record = optimizer.step(objective)
    assert isinstance(record, StepRecord)
    assert record.term_losses == pytest.approx(losses, rel=1e-12)
    assert record.loss == pytest.approx(sum(losses.values()), rel=1e-12)
    assert record.new_loss == pytest.approx(objective.loss().item(), rel=1e-12)
    assert record.new_loss < record.loss
    assert record.predicted_decrease > 0
    assert len(record.solver["reports"]) > 0
    with pytest.raises(AttributeError):
        record.loss = 0.0


def test_parameters_never_overflow_behind_a_saturated_network():
    """With tanh the loss stays finite while a weight is infinite."""
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-3), FixedStep(1e308), max_halvings=0
    )
    before = values(model)
    record = optimizer.step(poisson(model))
    assert not record.accepted
    assert "non-finite" in record.reason
    assert same(values(model), before)


@pytest.mark.parametrize("step", [1e-2, 1e-30], ids=["taken", "stalled"])
@pytest.mark.parametrize("name", ["kfac", "hessian_free"])
def test_a_record_prints_on_one_line(name, step):
    """With what one looks for in a log, and without the tensors of the solver."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.step_size = FixedStep(step)
    record = optimizer.step(poisson(model))
    line = str(record)
    assert line == repr(record)
    assert "\n" not in line
    assert len(line) < 250
    assert line.startswith(f"loss {record.loss:.6g} -> {record.new_loss:.6g} [interior ")
    assert f"damping {record.damping:.3g}" in line
    assert record.reason in line


def test_a_step_that_need_not_descend_takes_what_raises_the_loss():
    model = network()
    before = values(model)
    obstacle = Obstacle(poisson(model), lambda loss, d: loss + 1e9)
    record = fixed(model.parameters(), 1e-2, monotone=False).step(obstacle)
    assert record.accepted
    assert record.new_loss > 1e9 > record.loss
    assert (record.scale, record.reason) == (1, "")
    assert not same(before, values(model))


@pytest.mark.parametrize("worst", [math.nan, math.inf])
def test_a_step_that_need_not_descend_stays_finite(worst):
    model = network()
    obstacle = Obstacle(poisson(model), lambda loss, d: loss + 1e9 if d < 1e-3 else worst)
    optimizer = fixed(model.parameters(), 0.1, monotone=False)
    record = optimizer.step(obstacle)
    assert record.accepted
    assert 0 < record.scale < 1
    assert record.new_loss > 1e9
    assert "(more made the loss non-finite)" in record.reason


def test_a_rule_that_waits_for_rejections_needs_steps_that_descend():
    model = network()
    with pytest.raises(ValueError, match=r"monotone must be True .* LevenbergMarquardt"):
        fixed(model.parameters(), 0.1, monotone=False, damping_rule=LevenbergMarquardt())
    with pytest.raises(ValueError, match=r"monotone must be True .* ShortStepDamping"):
        fixed(model.parameters(), 0.1, monotone=False, damping_rule=ShortStepDamping())
    rule = LevenbergMarquardt(max_retries=0)
    fixed(model.parameters(), 0.1, monotone=False, damping_rule=rule).step(poisson(model))
