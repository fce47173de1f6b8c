"""What a user of torch expects: groups, schedulers, any order of parameters, freezing."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, StepLR

from pinncurv import presets
from pinncurv.curvature import GaussNewton
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer, FixedStep, QuadraticModel
from tests.optim.cases import OPTIMIZERS, fixed, network, poisson, same, values


def update_of(model, step):
    """Return how a step changes the parameters."""
    before = values(model)
    record = step()
    assert record.accepted
    assert record.scale == 1
    return [new - old for new, old in zip(values(model), before, strict=True)]


def test_groups_with_different_rates():
    model, twin = network(), network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.5},
        {"params": [model[2].weight], "lr": 0.25},
        {"params": [model[2].bias]},
    ]
    received = update_of(model, lambda: fixed(groups, 0.02).step(poisson(model)))
    plain = update_of(twin, lambda: fixed(twin.parameters(), 0.02).step(poisson(twin)))
    for update, whole, lr in zip(received, plain, (0.5, 0.5, 0.25, 1.0), strict=True):
        torch.testing.assert_close(update, lr * whole, rtol=1e-9, atol=1e-14)


def test_rate_multiplies_the_whole_update():
    """lr (α Δ + μ δ), and δ is what was taken."""
    model = network()
    objective = poisson(model)
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-1), QuadraticModel(), lr=0.01
    )
    first = update_of(model, lambda: optimizer.step(objective))
    for update, p in zip(first, model.parameters(), strict=True):
        torch.testing.assert_close(optimizer.state[p]["previous_update"], update)
    linearized = objective.linearize()
    g = linearized.gradient()
    C = GaussNewton()(linearized.linearizations)
    direction = [-part for part in Damped(1e-1)(C) @ g]
    before = values(model)
    record = optimizer.step(objective)
    assert record.momentum != 0
    for p, old, d, previous in zip(model.parameters(), before, direction, first, strict=True):
        expected = old + 0.01 * (record.step_size * d + record.momentum * previous)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "rates"),
    [
        (lambda o: StepLR(o, step_size=2, gamma=0.1), [1.0, 1.0, 0.1, 0.1, 0.01]),
        (lambda o: LambdaLR(o, lambda k: 1 / (1 + k)), [1.0, 0.5, 1 / 3, 0.25, 0.2]),
    ],
)
def test_schedulers(build, rates):
    """The rate of each step is that of the schedule, and it is saved with the state."""
    model, twin = network(), network()
    optimizer, reference = (fixed(m.parameters(), 0.01) for m in (model, twin))
    scheduler = build(optimizer)
    for step, rate in enumerate(rates):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
        optimizer.step(poisson(model, seed=step))
        scheduler.step()
        reference.param_groups[0]["lr"] = rate
        reference.step(poisson(twin, seed=step))
    for a, b in zip(values(model), values(twin), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    rate = optimizer.param_groups[0]["lr"]
    assert optimizer.state_dict()["param_groups"][0]["lr"] == rate


def test_a_schedule_that_ends_at_zero():
    model = network()
    optimizer = presets.kfac_star(model.parameters())
    scheduler = LambdaLR(optimizer, lambda k: max(0.0, 1 - k))
    optimizer.step(poisson(model))
    scheduler.step()
    before = values(model)
    record = optimizer.step(poisson(model))
    assert not record.accepted
    assert record.new_loss == record.loss
    assert same(before, values(model))


def test_hooks():
    model, seen = network(), []
    optimizer = presets.kfac_star(model.parameters())
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.step(poisson(model))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("name", ["kfac", "gauss_newton", "kfac_intervals"])
def test_parameters_in_another_order(name):
    model, twin = network(), network()
    shuffled = list(model.parameters())[::-1]
    optimizer = OPTIMIZERS[name]([{"params": shuffled[:1]}, {"params": shuffled[1:]}])
    reference = OPTIMIZERS[name](twin.parameters())
    objective, mirror = poisson(model), poisson(twin)
    for _ in range(3):
        optimizer.step(objective)
        reference.step(mirror)
    assert same(values(model), values(twin))


def test_named_parameters():
    model = network()
    optimizer = presets.kfac_star(model.named_parameters())
    assert optimizer.step(poisson(model)).accepted


def test_a_group_that_is_added_later():
    model, twin = network(), network()
    optimizer = presets.kfac_star(model[0].parameters())
    with pytest.raises(ValueError, match=r"lacks 2 of .* Pass objective\.parameters"):
        optimizer.step(poisson(model))
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.step(poisson(model))
    presets.kfac_star(twin.parameters()).step(poisson(twin))
    assert same(values(model), values(twin))


def test_parameters_of_another_model():
    model, other = network(), network()
    before = values(model)
    optimizer = presets.kfac_star(other.parameters())
    with pytest.raises(ValueError, match=r"got 4 that the objective lacks and lacks 4"):
        optimizer.step(poisson(model))
    extra = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = presets.kfac_star([*model.parameters(), extra])
    with pytest.raises(ValueError, match=r"got 1 that the objective lacks and lacks 0"):
        optimizer.step(poisson(model))
    assert same(before, values(model))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_somebody_left_are_refused(set_to_none):
    """They would be ignored; after zero_grad the step is that without them."""
    model, twin = network(), network()
    optimizer, reference = (presets.kfac_star(m.parameters()) for m in (model, twin))
    for step in range(2):
        objective = poisson(model, seed=step)
        objective.backward()
        before = values(model)
        model[0].zero_grad()
        with pytest.raises(ValueError, match=r"got gradients of 2 of 4 .* Call zero_grad\(\)"):
            optimizer.step(objective)
        assert same(before, values(model))
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step(objective)
        reference.step(poisson(twin, seed=step))
    assert same(values(model), values(twin))
    assert all(p.grad is None for p in twin.parameters())


@pytest.mark.parametrize("name", ["kfac", "engd_per_layer", "engd_diagonal", "adaptive"])
def test_frozen_layers(name):
    """Parameters that need no gradient may be in the groups, and stay as they are."""
    model, twin = network(2, 4, 4, 1), network(2, 4, 4, 1)
    for m in (model, twin):
        m[2].requires_grad_(False)
    optimizer = OPTIMIZERS[name](model.parameters())
    reference = OPTIMIZERS[name](p for p in twin.parameters() if p.requires_grad)
    before, objective, mirror = values(model[2]), poisson(model), poisson(twin)
    start = objective.loss().item()
    optimizer.step(objective)
    reference.step(mirror)
    assert same(before, values(model[2]))
    assert same(values(model), values(twin))
    assert objective.loss().item() < start


@pytest.mark.parametrize("name", ["gauss_newton", "adaptive"])
def test_freezing_in_the_middle(name):
    """Also on the objective of the last step, whose linearization was kept."""
    model = network(2, 4, 4, 1)
    objective, optimizer = poisson(model), OPTIMIZERS[name](model.parameters())
    optimizer.step(objective)
    for frozen in (True, False):
        model[2].requires_grad_(not frozen)
        before = values(model[2])
        assert optimizer.step(objective).accepted
        assert same(before, values(model[2])) == frozen


def test_freezing_in_the_middle_of_an_average():
    """The average is of other layers, which is said and harms nothing."""
    model = network(2, 4, 4, 1)
    optimizer = presets.kfac_star(model.parameters())
    optimizer.step(poisson(model))
    model[2].requires_grad_(False)
    before = values(model)
    with pytest.raises(ValueError, match=r"choice of frozen layers: build a new optimizer"):
        optimizer.step(poisson(model))
    assert same(before, values(model))
    model[2].requires_grad_(True)
    assert optimizer.step(poisson(model)).accepted


def test_repr_and_defaults():
    optimizer = presets.kfac_star(network().parameters())
    assert "lr: 1.0" in repr(optimizer)
    assert optimizer.defaults == {"lr": 1.0}
    assert isinstance(optimizer, torch.optim.Optimizer)


@pytest.mark.parametrize("lr", [math.nan, math.inf, 0.0, -1.0])
def test_rates_must_be_positive(lr):
    model = network()
    with pytest.raises(ValueError, match="lr must be finite and positive, got"):
        fixed(model.parameters(), lr=lr)
    with pytest.raises(ValueError, match="lr must be finite and positive, got"):
        fixed([{"params": model[0].parameters(), "lr": lr}, {"params": model[2].parameters()}])
    optimizer = fixed(model[0].parameters())
    with pytest.raises(ValueError, match="lr must be finite and positive, got"):
        optimizer.add_param_group({"params": model[2].parameters(), "lr": lr})
    optimizer.add_param_group({"params": model[2].parameters()})
    assert optimizer.step(poisson(model)).accepted
    optimizer.param_groups[1]["lr"] = lr
    if lr != 0:  # where a schedule may end
        with pytest.raises(ValueError, match="lr must be finite and positive, got"):
            optimizer.step(poisson(model))


@pytest.mark.parametrize("option", ["weight_decay", "betas", "momentum", "learning_rate"])
def test_unknown_options_of_a_group(option):
    """They would be ignored: at the start, added later, or written into a group."""
    model = network()
    message = f"no options but lr, got {option}, which would be ignored"
    with pytest.raises(ValueError, match=message):
        fixed([{"params": model.parameters(), option: 0.1}])
    optimizer = fixed(model[0].parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": model[2].parameters(), option: 0.1})
    optimizer.add_param_group({"params": model[2].parameters()})
    optimizer.param_groups[1][option] = 0.1
    before = values(model)
    with pytest.raises(ValueError, match=message):
        optimizer.step(poisson(model))
    assert same(before, values(model))


def test_no_parameters():
    with pytest.raises(ValueError, match="empty parameter list"):
        fixed([])


@pytest.mark.parametrize("halvings", [-1, -5])
def test_halvings_must_not_be_negative(halvings):
    with pytest.raises(ValueError, match="max_halvings must be at least 0, got -"):
        CurvatureOptimizer(
            network().parameters(), GaussNewton(), Damped(1.0), max_halvings=halvings
        )


@pytest.mark.parametrize("step", [0.0, -1.0, math.nan, math.inf])
def test_steps_must_be_positive(step):
    with pytest.raises(ValueError, match="step_size must be finite and positive, got"):
        FixedStep(step)
