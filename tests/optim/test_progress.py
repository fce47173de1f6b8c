"""An optimizer says once, in words, that it has stopped making progress."""

import warnings

import pytest
import torch

from pinncurv.optim import FirstOrder, StepRecord, StoppedProgress
from pinncurv.optim.progress import Progress
from tests.optim.cases import fixed, network, poisson


def observe(progress, losses, **fields):
    for loss in losses:
        record = StepRecord(loss, {"term": loss}, step_size=1.0, damping=1e-3)
        progress.observe(StepRecord(**{**vars(record), **fields}))


@pytest.mark.parametrize(
    ("losses", "fields", "advice"),
    [
        ([1.0] * 200, {"accepted": False}, "100 of these steps were rejected.*damping of 1.0e-03"),
        ([1.0] * 200, {"scale": 2.0**-9}, r"ShortStepDamping\(\)"),
        ([1.0, 3.0] * 100, {}, "varies by a factor of 3: what is left is the choice of points"),
        ([1.0] * 200, {}, "The steps were not short.*larger network"),
    ],
)
def test_what_is_said(losses, fields, advice):
    progress = Progress()
    observe(progress, losses[:-1], **fields)
    with pytest.warns(StoppedProgress, match=f"less than 1 % in 100 steps.*{advice}"):
        observe(progress, losses[-1:], **fields)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        observe(progress, losses, **fields)


def test_progress_is_not_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observe(Progress(), [0.999**k for k in range(500)])
        observe(Progress(), [0.0] * 300)  # nothing is left to gain
        observe(Progress(first_order=True), [1.0] * 3999)


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([-0.5] * 200, True),
        ([-0.5 - 1e-9 * k for k in range(200)], True),
        ([-0.5 + 1e-4 * 0.98**k for k in range(200)], False),  # 2 % less distance a step
        ([1.0 - 0.01 * k for k in range(200)], False),  # through zero
        ([1.0] * 100 + [-1.0] * 100, False),
        ([0.5] * 50 + [-1.0] * 50 + [-0.9, -0.8] * 50, True),  # rises
        ([torch.inf] * 200, False),
    ],
)
def test_energies_have_no_zero_to_compare_with(losses, told):
    progress = Progress()
    observe(progress, losses[:-1])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        observe(progress, losses[-1:])
    assert bool(said) is told
    if told:
        assert "less than 0.0001 % in 100 steps, to -" in str(said[0].message)


def take(optimizer, objective, steps):
    for _ in range(steps):
        optimizer.step(objective)


def test_optimizers_tell():
    model = network()
    objective = poisson(model)
    optimizer = fixed(model.parameters(), step=1e-12)
    with pytest.warns(StoppedProgress, match="rejected or shortened"):
        take(optimizer, objective, 201)


def test_methods_of_the_first_order(monkeypatch):
    monkeypatch.setattr("pinncurv.optim.progress._FIRST_ORDER_STEPS", 5)
    model = network()
    objective = poisson(model)
    optimizer = FirstOrder(torch.optim.SGD(model.parameters(), lr=1e-12))
    with pytest.warns(StoppedProgress, match="Lower the learning rate"):
        take(optimizer, objective, 11)
