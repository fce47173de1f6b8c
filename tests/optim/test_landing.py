"""A step that was tried is linearized where it ended; the next step starts there if it may."""

import copy

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import Objective
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


def scale_buffer(model, objective):
    model.scale.mul_(2.0)


def move_points(model, objective):
    objective.points[0].mul_(0.5)


def write_frozen(model, objective):
    with torch.no_grad():
        model[0].weight.mul_(0.5)


class Scaled(nn.Sequential):
    """A network with a buffer."""

    def __init__(self, *layers):
        super().__init__(*layers)
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.scale * super().forward(x)


@pytest.mark.parametrize("change", [scale_buffer, move_points, write_frozen])
def test_a_change_of_anything_else_is_noticed(change):
    def partly_frozen():
        model = Scaled(*network())
        model[0].requires_grad_(False)
        return model

    model, twin = partly_frozen(), partly_frozen()
    trained = ([p for p in m.parameters() if p.requires_grad] for m in (model, twin))
    optimizer, reference = map(presets.kfac_star, trained)
    objective, fresh = poisson(model), poisson(twin)
    optimizer.step(objective)
    reference.step(fresh)
    change(model, objective)
    change(twin, fresh)
    fresh = Objective(twin, fresh.terms, fresh.points)
    record, expected = optimizer.step(objective), reference.step(fresh)
    assert record.loss == expected.loss
    assert same(values(model), values(twin))


def test_alternating_over_layers_sees_the_true_loss():
    model = network()
    objective = poisson(model)
    first = presets.kfac_star(model[0].parameters())
    rest = presets.kfac_star([p for layer in list(model)[1:] for p in layer.parameters()])
    for step in range(6):
        model[0].requires_grad_(step % 2 == 0)
        for layer in list(model)[1:]:
            layer.requires_grad_(step % 2 == 1)
        with torch.no_grad():
            loss = float(objective.loss())
        record = (first, rest)[step % 2].step(objective)
        assert record.loss == pytest.approx(loss, rel=1e-12)
        assert record.new_loss <= record.loss


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
