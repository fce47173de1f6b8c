"""Optimizers of torch on the same objective, against a loop that is written by hand."""

import copy
import math

import pytest
import torch

from pinncurv.optim import SSBFGS, FirstOrder, SSBroyden, offers
from pinncurv.presets import kfac_star
from tests.optim.cases import Calls, flat, network, poisson, same, set_flat, values

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=1e-3),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=4),
    "lbfgs_wolfe": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
    "ssbfgs": lambda p: SSBFGS(p, max_iter=4),
    "ssbroyden": lambda p: SSBroyden(p, max_iter=4),
}


def nested_loss(model, points):
    """Return the loss of poisson2d by torch.autograd alone."""
    interior, boundary = points
    x = interior.clone().requires_grad_()
    first = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    laplacian = sum(
        torch.autograd.grad(first[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)
    )
    source = 2 * math.pi**2 * torch.sin(math.pi * interior).prod(1)
    u = torch.sin(math.pi * boundary).prod(1)
    return (
        0.5 * (-laplacian - source).square().mean()
        + 0.5 * (model(boundary)[:, 0] - u).square().mean()
    )


@pytest.mark.parametrize("chunk_size", [None, 5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trajectory(name, chunk_size):
    model, twin = network(), network()
    optimizer, reference = (
        FirstOrder(OPTIMIZERS[name](model.parameters())),
        OPTIMIZERS[name](twin.parameters()),
    )
    points = poisson(model).points

    def closure():
        reference.zero_grad()
        loss = nested_loss(twin, points)
        loss.backward()
        return loss

    for _ in range(2):
        expected = reference.step(closure)
        record = optimizer.step(poisson(model, chunk_size=chunk_size))
        assert record.loss == pytest.approx(expected.item(), rel=1e-9)
        torch.testing.assert_close(flat(model), flat(twin), rtol=1e-8, atol=1e-10)


def test_record():
    model = network()
    optimizer = FirstOrder(torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=3))
    objective = poisson(model)
    assert offers(objective, "backward")
    losses = {name: loss.item() for name, loss in objective.term_losses().items()}
    record = optimizer.step(objective)
    assert record.term_losses == pytest.approx(losses)
    assert record.loss == pytest.approx(sum(losses.values()))
    assert record.step_size == 0.5
    assert record.accepted
    assert math.isnan(record.damping)
    assert math.isnan(record.new_loss)
    assert record.solver["evaluations"] == 3


def test_gradients_that_somebody_left_are_refused():
    """They would be ignored; a step itself leaves none, so that another optimizer may follow."""
    model = network()
    optimizer = FirstOrder(torch.optim.SGD(model.parameters(), lr=1e-3))
    objective = poisson(model)
    objective.backward()
    kept = [p.grad.clone() for p in model.parameters()]
    before = values(model)
    with pytest.raises(ValueError, match=r"got gradients of 4 of 4 .* Call zero_grad\(\) first"):
        optimizer.step(objective)
    assert same(before, values(model))
    optimizer.zero_grad()
    optimizer.step(objective)
    assert all(p.grad is None for p in model.parameters())
    for old, p, g in zip(before, model.parameters(), kept, strict=True):
        torch.testing.assert_close(p.detach(), old - 1e-3 * g)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_evaluation_per_closure(name):
    model = Calls(network())
    objective = poisson(model)
    model.count = 0
    record = FirstOrder(OPTIMIZERS[name](model.parameters())).step(objective)
    assert model.count == 2 * record.solver["evaluations"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_round_trip(name):
    model = network()
    optimizer = FirstOrder(OPTIMIZERS[name](model.parameters()))
    optimizer.step(poisson(model))
    twin = network()
    set_flat(twin, flat(model))
    resumed = FirstOrder(OPTIMIZERS[name](twin.parameters()))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.step(poisson(model, seed=1))
    resumed.step(poisson(twin, seed=1))
    assert same(values(model), values(twin))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_that_is_not_finite(name):
    """Neither the parameters nor what the optimizer remembers is spoilt."""
    model, twin = network(), network()
    optimizer, reference = (FirstOrder(OPTIMIZERS[name](m.parameters())) for m in (model, twin))
    bad = poisson(model)
    bad.points[1][0, 0] = math.nan
    for step in range(2):
        before = values(model)
        with pytest.raises(ValueError, match=r"Term 'boundary'.*NaN or infinity in 1 of"):
            optimizer.step(bad)
        assert same(before, values(model))
        optimizer.step(poisson(model, seed=step))
        reference.step(poisson(twin, seed=step))
    assert same(values(model), values(twin))


def test_inside_no_grad():
    """As torch's own closures do, it differentiates nevertheless."""
    model = network()
    before = poisson(model).loss().item()
    with torch.no_grad():
        FirstOrder(OPTIMIZERS["sgd"](model.parameters())).step(poisson(model))
    assert poisson(model).loss().item() < before


def test_an_optimizer_of_some_parameters_leaves_the_gradients_of_the_others():
    model = network()
    objective = poisson(model)
    first, *others = model.parameters()
    others[0].grad = torch.ones_like(others[0])
    optimizer = FirstOrder(torch.optim.SGD([first], lr=1e-3))
    for _ in range(2):
        optimizer.step(objective)
    assert first.grad is None
    assert torch.equal(others[0].grad, torch.ones_like(others[0]))
    assert all(p.grad is None for p in others[1:])


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, "adam", kfac_star])
def test_what_is_no_optimizer_of_torch(optimizer, shapes_unchecked):
    with pytest.raises(TypeError, match="must be given an optimizer of torch"):
        FirstOrder(optimizer)


def test_a_curvature_optimizer_is_not_wrapped():
    optimizer = kfac_star(network().parameters(), damping=1e-3)
    with pytest.raises(TypeError, match="got CurvatureOptimizer"):
        FirstOrder(optimizer)
