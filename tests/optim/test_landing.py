"""A step that was tried is linearized where it ended; the next step starts there if it may."""

import copy

import pytest
import torch

from pinncurv import presets
from tests.optim.cases import OPTIMIZERS, Calls, network, poisson, same, values


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", ["adaptive", "kfac_intervals"])
def test_reuse_changes_nothing(name, chunk_size):
    """Bit for bit the trajectory of an objective that is made anew for each step."""
    model, twin = network(), network()
    optimizer, reference = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    objective = poisson(model, chunk_size=chunk_size)
    for _ in range(3):
        record = optimizer.step(objective)
        expected = reference.step(poisson(twin, chunk_size=chunk_size))
        assert record.loss == expected.loss
        assert record.new_loss == expected.new_loss
    assert same(values(model), values(twin))


def linearizations(objective):
    """Count the linearizations that are asked for, other than those of an evaluation."""
    asked, evaluating = [], []
    linearize, evaluate = objective.linearize, objective.evaluate

    def counted():
        if not evaluating:
            asked.append(1)
        return linearize()

    def evaluated():
        evaluating.append(1)
        try:
            return evaluate()
        finally:
            evaluating.clear()

    objective.linearize, objective.evaluate = counted, evaluated
    return asked


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_reused(reverse):
    model = Calls(network())
    objective = poisson(model)
    asked = linearizations(objective)
    parameters = list(model.parameters())
    optimizer = presets.kfac_star(parameters[::-1] if reverse else parameters)
    for _ in range(3):
        assert optimizer.step(objective).accepted
    assert len(asked) == 1


def change_in_place(model):
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-3


def load_weights(model):
    state = copy.deepcopy(model.state_dict())
    state["2.bias"] += 1e-3
    model.load_state_dict(state)


def replace_data(model):
    model[2].weight.data = model[2].weight.data * 1.01


def swap_rows(model):
    """Only the order of the numbers changes."""
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0))


@pytest.mark.parametrize("change", [change_in_place, load_weights, replace_data, swap_rows])
def test_a_change_of_the_parameters_is_noticed(change):
    model, twin = network(), network()
    optimizer, reference = (presets.kfac_star(m.parameters()) for m in (model, twin))
    objective = poisson(model)
    optimizer.step(objective)
    reference.step(poisson(twin))
    change(model)
    change(twin)
    record, expected = optimizer.step(objective), reference.step(poisson(twin))
    assert record.loss == expected.loss
    assert same(values(model), values(twin))


def test_a_change_back_is_none():
    model = network()
    objective, optimizer = poisson(model), presets.kfac_star(model.parameters())
    asked = linearizations(objective)
    optimizer.step(objective)
    kept = values(model)
    change_in_place(model)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), kept, strict=True):
            parameter.copy_(value)
    optimizer.step(objective)
    assert len(asked) == 1


def test_another_objective_is_noticed():
    model, twin = network(), network()
    optimizer, reference = (presets.kfac_star(m.parameters()) for m in (model, twin))
    batches = [poisson(model, seed=0), poisson(model, seed=1)]
    for step in (0, 1, 0, 0, 1):
        optimizer.step(batches[step])
        reference.step(poisson(twin, seed=step))
    assert same(values(model), values(twin))


def test_nothing_is_kept_of_a_step_that_was_rejected():
    model = network()
    objective, optimizer = poisson(model), presets.gauss_newton(model.parameters(), 1e-1)
    asked = linearizations(objective)
    optimizer.step(objective)
    optimizer.max_halvings = 0
    optimizer.param_groups[0]["lr"] = 1e6
    assert not optimizer.step(objective).accepted
    optimizer.max_halvings, optimizer.param_groups[0]["lr"] = 30, 1.0
    before = objective.loss().item()
    record = optimizer.step(objective)
    assert record.loss == pytest.approx(before, rel=1e-12)
    assert record.accepted
    assert len(asked) == 2
