"""Steps at some of the points, more of them when these are not enough."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn

from pinncurv import linearization
from pinncurv.curvature import CheaperSide, MatrixFreeGaussNewton, Objective
from pinncurv.diffops import Value
from pinncurv.linops import Damped
from pinncurv.optim import (
    CurvatureOptimizer,
    FixedStep,
    GeodesicFlow,
    GridLineSearch,
    GrowingBatch,
    LevenbergMarquardt,
    QuadraticModel,
)
from pinncurv.problems import L2, Fixed, LossTerm
from tests.networks import points
from tests.optim.cases import Obstacle, flat, gram, linear_fit, network, poisson, same, values

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # which take longer than the steps


def optimizer(parameters, batch=None, step_size=None, damping=1e-2) -> CurvatureOptimizer:
    return CurvatureOptimizer(
        parameters,
        MatrixFreeGaussNewton(),
        CheaperSide(damping),
        step_size=GeodesicFlow() if step_size is None else step_size,
        batch=GrowingBatch(6) if batch is None else batch,
        max_halvings=0,
    )


def spied(monkeypatch) -> list[int]:
    """Return a list that the number of points of every backward pass is appended to."""
    sizes: list[int] = []
    original = linearization.BoundTerm.linearize

    def spy(bound, part):
        sizes.append(len(part.x))
        return original(bound, part)

    monkeypatch.setattr(linearization.BoundTerm, "linearize", spy)
    return sizes


def rows_of(stepper: CurvatureOptimizer) -> int:
    return stepper.state_dict()["state"]["curvature"]["rows"]


# --- the rule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decrease", "its", "grows"),
    [
        (0.5, 0.5, False),
        (0.26, 0.5, False),
        (0.24, 0.5, True),
        (0.9, 0.1, False),
        (0.0, 0.0, True),  # a rejected step
        (0.0, -1.0, True),
        (1e-9, -0.5, False),  # all points gain where those that were linearized lose
    ],
)
def test_grows_where_the_others_see_less(decrease, its, grows):
    batch = GrowingBatch(100, factor=1.5, share=0.5)
    assert batch.grown(100, decrease, its) == (150 if grows else 100)


def test_growth_never_stops_short_of_the_largest():
    for factor in (1.01, 1.5, 3.0):
        batch, rows = GrowingBatch(1, factor, largest=50), [1]
        while rows[-1] < 50:
            rows.append(batch.grown(rows[-1], 0.0, 1.0))
            assert rows[-1] > rows[-2]
        assert batch.grown(50, 0.0, 1.0) == 50


@pytest.mark.parametrize(
    "settings",
    [
        {"rows": 0},
        {"rows": 10, "largest": 9},
        {"factor": 1.0},
        {"factor": math.nan},
        {"share": 0.0},
        {"share": 1.1},
        {"rows": 2.5},
        {"largest": 500.5},
        {"seed": 1.5},
    ],
)
def test_settings_out_of_range(settings, shapes_unchecked):
    with pytest.raises(ValueError, match="Must hold: 1 <= rows <= largest, factor > 1 and 0 < sha"):
        GrowingBatch(**settings)


@pytest.mark.parametrize("bad", [GrowingBatch, 400, QuadraticModel()])
def test_a_batch_that_is_none(bad):
    with pytest.raises(TypeError, match="batch must be an object"):
        CurvatureOptimizer(
            network().parameters(), MatrixFreeGaussNewton(), CheaperSide(1e-2), batch=bad
        )


# --- in a step ------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_points_alone():
    """Direction and curvature of some points; the loss of all decides and is recorded."""
    model = network(2, 6, 1)
    objective = poisson(model)
    batch = GrowingBatch(8, seed=3)
    linearized = objective.linearize_some(8, torch.Generator().manual_seed(3))
    inverse = CheaperSide(1e-1)(MatrixFreeGaussNewton()(linearized))
    expected = flat(model) - 0.1 * flat(inverse.solve_residual(linearized.residual))
    loss = objective.loss().item()
    record = optimizer(model.parameters(), batch, FixedStep(0.1), 1e-1).step(objective)
    assert record.accepted
    torch.testing.assert_close(flat(model), expected)
    assert record.loss == pytest.approx(loss, rel=1e-12)
    assert record.new_loss == pytest.approx(objective.loss().item(), rel=1e-12)
    assert sum(record.term_losses.values()) == pytest.approx(loss, rel=1e-12)


def test_no_loss_is_evaluated_twice(monkeypatch):
    """The search has seen that of the point at which a step ends."""
    model, seen = network(2, 6, 1), []
    objective = poisson(model)
    loss = objective.loss
    monkeypatch.setattr(objective, "loss", lambda: seen.append(values(model)) or loss())
    stepper = optimizer(model.parameters(), GrowingBatch(8))
    for _ in range(5):
        seen.clear()
        record = stepper.step(objective)
        assert record.accepted
        assert record.new_loss == loss().item()
        assert len(seen) >= 2
        assert not any(same(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_seeds_and_steps_draw_other_points():
    model = network(2, 6, 1)
    objective = poisson(model)

    def drawn(seed: int, step: int):
        linearized = GrowingBatch(6, seed=seed).linearize(objective, 6, step)
        return torch.cat([part.x for part in linearized])

    assert torch.equal(drawn(0, 0), drawn(0, 0))
    assert not torch.equal(drawn(0, 0), drawn(0, 1))
    assert not torch.equal(drawn(0, 0), drawn(5, 0))


def test_the_whole_objective_where_it_is_no_larger():
    """Or is none that offers some of its points."""
    objective = poisson(network())
    batch = GrowingBatch(6)
    assert objective.rows == 14 + 8
    assert batch.linearize(objective, 22, 0) is None
    assert batch.linearize(objective, 21, 0) is not None
    assert batch.linearize(linear_fit(1.0), 1, 0) is None


def test_objectives_of_ones_own_are_linearized_as_a_whole():
    """Also one around an objective of this library."""
    fit = linear_fit(1.0, 2.0)
    batch = GrowingBatch(1)
    stepper = CurvatureOptimizer(fit.parameters, gram, Damped(1e-12), FixedStep(), batch=batch)
    assert stepper.step(fit).new_loss < 1e-20
    assert rows_of(stepper) == 1
    model, twin = network(2, 6, 1), network(2, 6, 1)
    around = Obstacle(poisson(model), lambda loss, distance: loss)
    plain = CurvatureOptimizer(
        twin.parameters(), MatrixFreeGaussNewton(), CheaperSide(1e-2), GeodesicFlow()
    )
    wrapped = optimizer(model.parameters(), GrowingBatch(2))
    for _ in range(2):
        wrapped.step(around)
        plain.step(poisson(twin))
    assert same(values(model), values(twin))
    assert rows_of(wrapped) == 2


def test_uses_all_in_the_end(monkeypatch):
    """A few points are fitted, and then more, until there are no others left."""
    model = network(2, 6, 1)
    objective = poisson(model)
    stepper, sizes, rows = optimizer(model.parameters(), GrowingBatch(4)), spied(monkeypatch), []
    first = objective.loss().item()
    for _ in range(40):
        sizes.clear()
        before = rows_of(stepper)
        record = stepper.step(objective)
        assert record.new_loss <= record.loss
        if before < objective.rows:
            assert sum(sizes) <= before + 1  # a point of each term at least
        else:
            assert set(sizes) == {14, 8}  # the next step goes on with what was evaluated last
        rows.append(before)
    assert rows == sorted(rows)
    assert rows[0] == 4
    assert rows[-1] >= objective.rows
    assert record.new_loss < 1e-2 * first


def test_does_not_grow_where_a_few_points_stand_for_all():
    """The same residual at every point: nothing is to be seen elsewhere."""
    model = network(2, 4, 1)
    x = points(1).repeat(60, 1)
    term = LossTerm({"u": Value()}, lambda x, u: u - 3, Fixed(x), name="fit")
    objective = Objective(model, [term], [x])
    stepper = optimizer(model.parameters(), GrowingBatch(5))
    for _ in range(4):
        record = stepper.step(objective)
        assert record.new_loss < record.loss
    assert rows_of(stepper) == 5


def test_grows_where_a_point_is_no_example():
    """Residuals of single points that contradict each other: what helps one harms the rest."""
    model = network(2, 4, 1)
    x = points(40)
    noise = torch.randn(40, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    term = LossTerm(
        {"u": Value()}, lambda x, u, y: u - y, Fixed(x), name="noise", data={"y": noise}
    )
    objective = Objective(model, [term], [x])
    stepper = optimizer(model.parameters(), GrowingBatch(1, factor=2.0), damping=1e-8)
    for _ in range(8):
        record = stepper.step(objective)
        assert record.new_loss <= record.loss
    assert rows_of(stepper) >= 16


def test_grows_after_a_step_that_was_rejected():
    model = network(2, 4, 1)
    objective = poisson(model)
    before = values(model)
    stepper = optimizer(model.parameters(), GrowingBatch(4, factor=2.0), FixedStep(1e4), 1e-8)
    record = stepper.step(objective)
    assert not record.accepted
    assert same(values(model), before)
    assert rows_of(stepper) == 8


@pytest.mark.parametrize("largest", [5, 8192])
def test_chunks_are_never_linearized_together_beyond_the_largest(largest, monkeypatch):
    """Losses go over all points in chunks; at most m residuals are linearized, even in the end."""
    model = network(2, 6, 1)
    objective = poisson(model, chunk_size=4, n=40)
    batch = GrowingBatch(4, factor=3.0, largest=largest)
    stepper, sizes = optimizer(model.parameters(), batch), spied(monkeypatch)
    for _ in range(12):
        sizes.clear()
        rows = rows_of(stepper)
        stepper.step(objective)
        assert sum(sizes) <= max(2, rows + 1)
        assert sum(sizes) <= objective.rows
    assert rows_of(stepper) <= largest


def test_chunks_change_nothing():
    """The curve and all dampings in one step, though the objective recomputes its chunks."""
    model, twin = network(2, 6, 1), network(2, 6, 1)
    pairs = [
        (optimizer(m.parameters(), GrowingBatch(7)), poisson(m, chunk_size=size))
        for m, size in ((model, None), (twin, 3))
    ]
    for _ in range(4):
        records = [stepper.step(objective) for stepper, objective in pairs]
        assert records[0].new_loss == pytest.approx(records[1].new_loss, rel=1e-9)
        assert records[0].damping == pytest.approx(records[1].damping, rel=1e-9)


@pytest.mark.parametrize(
    ("step_size", "scale"),
    [
        (FixedStep(), 1.0),
        (FixedStep(3.0), 0.5),  # shortened
        (QuadraticModel(), 1.0),
        (GridLineSearch(-2, 0), 1.0),
        (GeodesicFlow(), 1.0),
    ],
)
def test_a_few_points_predict_for_all(step_size, scale):
    """Residuals x (θ - 1) of all sizes: what part of them a step takes is the same at all points.

    The damping rule learns that the model is right, though the points have other losses.
    """
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 3.0)
    x = torch.logspace(-2, 0, 40, dtype=torch.float64)[:, None]
    term = LossTerm({"u": Value()}, lambda x, u: u - x, Fixed(x), name="fit")
    objective = Objective(model, [term], [x])
    linearized = objective.linearize_some(4, torch.Generator().manual_seed(0))
    seen = 0.5 * sum(float(r.square().sum()) for r in linearized.residual)
    assert not 0.7 < seen / objective.loss().item() < 1.4
    sets = isinstance(step_size, GeodesicFlow)
    stepper = CurvatureOptimizer(
        model.parameters(),
        MatrixFreeGaussNewton(),
        CheaperSide(1e-9),
        step_size,
        damping_rule=None if sets else LevenbergMarquardt(max_retries=0),
        batch=GrowingBatch(4),
    )
    record = stepper.step(objective)
    assert record.accepted
    assert record.scale == scale
    assert record.predicted_decrease == pytest.approx(record.loss - record.new_loss, rel=1e-4)
    assert stepper.preconditioner.damping < 1e-9


def test_records_tell_of_conjugate_gradients():
    """Weight decay has a row per parameter: a few points are no smaller side any more."""
    for decay in (False, True):
        model = network(2, 6, 1)
        plain = poisson(model)
        x = torch.empty(1, 0, dtype=torch.float64)
        terms, batch = ([L2(1e-3)], [x]) if decay else ([], [])
        objective = Objective(model, [*plain.terms, *terms], [*plain.points, *batch])
        inverse = CheaperSide(1e-2, largest=10)
        stepper = CurvatureOptimizer(
            model.parameters(),
            MatrixFreeGaussNewton(),
            inverse,
            GeodesicFlow(),
            batch=GrowingBatch(8, largest=10),
        )
        record = stepper.step(objective)
        assert record.accepted
        assert ("CG iterations" in str(record)) is decay


def test_new_points_in_every_step():
    model = network(2, 6, 1)
    first = poisson(model)
    stepper = optimizer(model.parameters(), GrowingBatch(6))
    before = first.loss().item()
    objective, generator = first, torch.Generator().manual_seed(5)
    for _ in range(25):
        record = stepper.step(objective)
        assert record.new_loss <= record.loss
        objective = objective.resampled(generator)
    assert first.loss().item() < 0.1 * before
    assert rows_of(stepper) >= 6


def test_a_loss_of_zero():
    """Nothing to see, nothing to do, and no division by it."""
    model, x = network(), points(20)
    term = LossTerm({"u": Value()}, lambda x, u: 0 * u, Fixed(x), name="nothing")
    objective = Objective(model, [term], [x])
    record = optimizer(model.parameters()).step(objective)
    assert record.loss == record.new_loss == 0
    assert record.stalled


# --- the state ------------------------------------------------------------------------------------


def state_of(stepper: CurvatureOptimizer):
    file = io.BytesIO()
    torch.save(stepper.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_resumed_run_draws_the_points_that_the_run_would_have_drawn():
    model = network(2, 6, 1)
    stepper, records = optimizer(model.parameters(), GrowingBatch(3, seed=2)), []
    for step in range(8):
        if step == 4:
            saved, weights = state_of(stepper), copy.deepcopy(model.state_dict())
        records.append(stepper.step(poisson(model)))
    assert saved["state"]["curvature"]["rows"] > 3
    twin = network(2, 6, 1, seed=7)
    twin.load_state_dict(weights)
    resumed = optimizer(twin.parameters(), GrowingBatch(3, seed=2))
    resumed.load_state_dict(saved)
    for record in records[4:]:
        assert repr(resumed.step(poisson(twin))) == repr(record)
    assert same(values(twin), values(model))
    assert rows_of(resumed) == rows_of(stepper)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_copies(duplicate):
    model = network(2, 6, 1)
    stepper = optimizer(model.parameters(), GrowingBatch(3))
    for _ in range(3):
        stepper.step(poisson(model))
    twin, copied = duplicate((model, stepper))
    for _ in range(3):
        assert repr(copied.step(poisson(twin))) == repr(stepper.step(poisson(model)))
    assert same(values(model), values(twin))
    assert rows_of(copied) == rows_of(stepper)


def test_a_state_without_a_batch_is_another_method():
    """It says nothing of how many points to take."""
    model = network(2, 6, 1)
    without = CurvatureOptimizer(
        model.parameters(), MatrixFreeGaussNewton(), CheaperSide(1e-2), GeodesicFlow()
    )
    without.step(poisson(model))
    stepper = optimizer(model.parameters())
    with pytest.raises(ValueError, match=r"batch None instead of GrowingBatch\(\)"):
        stepper.load_state_dict(without.state_dict())
    assert rows_of(stepper) == 6
    assert stepper.step(poisson(model)).accepted


def test_an_error_leaves_the_number_of_points():
    model = network(2, 6, 1)
    objective = poisson(model)
    stepper = optimizer(model.parameters(), GrowingBatch(3))
    stepper.step(objective)
    before, rows = values(model), rows_of(stepper)

    def interrupt(loss: float, distance: float) -> float:
        raise KeyboardInterrupt

    around = Obstacle(objective, interrupt)
    around.linearize_some, around.rows = objective.linearize_some, objective.rows
    with pytest.raises(KeyboardInterrupt):
        stepper.step(around)
    assert same(values(model), before)
    assert rows_of(stepper) == rows
