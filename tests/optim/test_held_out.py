"""The loss on points that are not trained on: measured now and then, and one warning."""

import math
import warnings

import pytest
import torch

from pinncurv.curvature import Objective
from pinncurv.diffops import Value
from pinncurv.optim import FirstOrder, HeldOut, StepRecord, exhausted
from pinncurv.presets import gauss_newton
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points
from tests.optim.cases import network, poisson


def test_a_record_has_it_when_it_is_due():
    model = network()
    other = poisson(model, seed=5)
    held_out = HeldOut(other, every=2)
    optimizer = FirstOrder(torch.optim.SGD(model.parameters(), lr=1e-3))
    for step in range(1, 5):
        record = held_out(optimizer.step(poisson(model)))
        if step % 2:
            assert math.isnan(record.held_out)
            assert "held out" not in str(record)
        else:
            assert record.held_out == other.loss().item()
            assert f"held out {record.held_out:.3g}" in str(record)
    assert all(p.grad is None for p in model.parameters())


def test_exhausted_points_are_told_once():
    """Six points and 41 parameters: the loss at the points vanishes, and not between them."""
    model = network(2, 10, 1)
    objective, held_out = poisson(model, n=6), HeldOut(poisson(model, seed=5, n=200), every=1)
    optimizer = gauss_newton(model.parameters(), 1e-6)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(40):
            record = held_out(optimizer.step(objective))
    assert record.held_out > 100 * record.new_loss
    (warning,) = told
    assert "more than 100 times" in str(warning.message)
    assert "Take more points, or draw new ones" in str(warning.message)


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([(1.0, 101.0)] * 3, True),
        ([(0.0, 1e-9)] * 3, True),
        ([(1.0, 101.0)] * 2, False),
        ([(1.0, 101.0), (1.0, 99.0), (1.0, 101.0)], False),
        ([(1.0, 99.0)] + [(1.0, 101.0)] * 3, True),
        ([(1.0, 101.0)] * 3 + [(1.0, 99.0)], False),
        ([(-1.0, -0.5)] * 3, False),  # an energy
        ([(0.0, 0.0)] * 3, False),
        ([(1.0, 1.0 + 1e-7)] * 2, False),
        ([(1.0, 1.0 + 1e-3)] * 3, False),
        ([(math.nan, 1.0)] * 3, False),
    ],
)
def test_the_rule(losses, told):
    assert bool(exhausted(losses)) is told


def test_a_negative_energy():
    """Told if it rises elsewhere by more than it falls; not if it falls, too, or rises less."""
    words = exhausted([(-1.0, -0.9), (-1.1, -0.5), (-1.2, 0.3)])
    assert "3.00e-01 and rises, while it falls, to -1.20e+00, on those that are" in words
    assert not exhausted([(-1.0, -0.9), (-1.1, -0.95), (-1.2, -0.8)])
    assert not exhausted([(-1.0, -0.9), (-1.1, -0.88), (-1.2, -0.85)])
    assert not exhausted([(-1.1, -0.5), (-1.2, 0.3)])


@pytest.mark.parametrize("loss", [1.0, -0.5])
def test_the_same_points_are_no_others(loss):
    words = exhausted([(loss, loss * (1 + 1e-7))] * 3)
    assert "these are the same, as ``Fixed`` ones always are" in words


def test_fixed_points_stay_those_that_are_trained_on():
    model, x = network(), points(20)
    term = LossTerm({"u": Value()}, lambda x, u: u - x[:, :1], Fixed(x), name="fit")
    objective = Objective(model, [term], [x])
    held_out = HeldOut(objective.resampled(torch.Generator()), every=1)
    optimizer = gauss_newton(objective.parameters(), 1e-3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(5):
            held_out(optimizer.step(objective))
    (warning,) = told
    assert "Pass HeldOut an objective at points of its own" in str(warning.message)


def test_the_loss_after_the_step_counts_where_it_is_known():
    model = network()
    held_out = HeldOut(poisson(model), every=1)
    other = held_out.objective.loss().item()
    before, after = StepRecord(other, {}), StepRecord(other, {}, new_loss=other / 1000)
    held_out(before)
    held_out(after)
    held_out(after)
    with pytest.warns(UserWarning, match="the network fits its points"):
        held_out(after)


def test_what_is_refused():
    model = network()
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        HeldOut(poisson(model), every=0)
    with pytest.raises(TypeError, match=r"must be an object such as pinncurv.Objective.*got Seq"):
        HeldOut(model)
