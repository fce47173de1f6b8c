"""Self-scaled quasi-Newton methods, against the dual formula and on functions with known minima."""

import copy
import math

import pytest
import torch
from torch import nn

from pinncurv.machine import NotEnoughMemoryError, memory
from pinncurv.optim import SSBFGS, FirstOrder, SSBroyden
from pinncurv.optim.quasi_newton import update_inverse
from tests.optim.cases import flat, network, poisson, same, values

METHODS = [SSBFGS, SSBroyden]


def spd(n, seed, condition=1e2):
    """Return a random symmetric matrix with eigenvalues from 1 to a condition number."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
    return (q * torch.logspace(0, math.log10(condition), n, dtype=torch.float64)) @ q.T


def vector(n, seed):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluated(parameters, function):
    """Return a closure that counts, as training loops for LBFGS have it."""

    def closure():
        closure.count += 1
        for parameter in parameters:
            parameter.grad = None
        loss = function(*parameters)
        loss.backward()
        return loss

    closure.count = 0
    return closure


# --- the update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("method", METHODS)
def test_the_update_is_the_inverse_of_the_dual_one(method, seed, start):
    """B₊ = τ (B - B s sᵀB / sᵀB s + θ (sᵀB s) w wᵀ) + y yᵀ / sᵀy, written out in B."""
    n = 5
    hessian = torch.eye(n).double() if start else spd(n, seed)
    s = vector(n, seed + 10)
    y = spd(n, seed + 20, 10.0) @ s * 10.0 ** (seed - 2)
    sy, sbs = s @ y, s @ hessian @ s
    b, h = float(sbs / sy), float(y @ torch.linalg.solve(hessian, y) / sy)
    a = b * h - 1
    theta, tau = method._member(a, b, h, n)
    if start:
        tau = h / (1 + a * theta)
    bs = hessian @ s
    w = y / sy - bs / sbs
    scaled = hessian - torch.outer(bs, bs) / sbs + theta * sbs * torch.outer(w, w)
    expected = torch.linalg.inv(tau * scaled + torch.outer(y, y) / sy)
    inverse = torch.linalg.inv(hessian)
    update_inverse(inverse, s, y, b, method._member, start)
    torch.testing.assert_close(inverse, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(inverse @ y, s, rtol=1e-10, atol=1e-12)
    assert torch.linalg.eigvalsh(inverse).min() > 0


def test_the_members_by_hand():
    """Numbers from the equations of arXiv 2405.04230, each side of θ = 0."""
    assert SSBFGS._member(3.0, 4.0, 1.0, 7) == (0.0, 0.25)
    assert SSBFGS._member(3.0, 0.5, 8.0, 7) == (0.0, 1.0)
    # b = 2, h = 4.5, a = 8: ρ = min(1, 4.5 (1 - √(8/9))), θ = -1/2 < θ⁻ = (ρ - 1) / 8
    rho = 4.5 * (1 - math.sqrt(8 / 9))
    theta = (rho - 1) / 8
    sigma = 1 + 8 * theta
    assert SSBroyden._member(8.0, 2.0, 4.5, 5) == pytest.approx(
        (theta, min(0.5 * sigma**-0.25, sigma))
    )
    # b = 1/2, h = 18, a = 8: ρ = min(1, 18 (1 - √(8/9))) = 1, θ = min(1 / ρ, 1) = 1 is DFP
    assert SSBroyden._member(8.0, 0.5, 18.0, 5) == pytest.approx((1.0, 9**-0.25))


@pytest.mark.parametrize("method", METHODS)
def test_a_quadratic_takes_n_steps_with_exact_searches(method):
    """The scaling keeps the directions conjugate."""
    n = 6
    matrix, x = spd(n, 1), vector(n, 2)
    inverse, gradient = torch.eye(n).double(), matrix @ x
    sizes = []
    for step in range(n):
        direction = -inverse @ gradient
        length = -(direction @ gradient) / (direction @ matrix @ direction)
        s = length * direction
        y = matrix @ s
        b = float(-length * (s @ gradient) / (s @ y))
        update_inverse(inverse, s, y, b, method._member, start=step == 0)
        gradient = gradient + y
        sizes.append(gradient.norm() / (matrix @ x).norm())
    assert sizes[-1] < 1e-9 < 1e-4 < sizes[-2]


# --- the optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_quadratic(method):
    n = 8
    matrix = spd(n, 3)
    x = nn.Parameter(vector(n, 4))
    closure = evaluated([x], lambda x: 0.5 * x @ matrix @ x)
    optimizer = method([x], max_iter=60)
    optimizer.step(closure)
    assert x.detach().norm() < 1e-8
    assert closure.count < 80


@pytest.mark.parametrize("method", METHODS)
def test_a_rotated_rosenbrock_function(method):
    n = 6
    rotation = torch.linalg.qr(spd(n, 5))[0]

    def rosenbrock(x):
        z = rotation @ x
        return (100 * (z[1:] - z[:-1] ** 2) ** 2 + (1 - z[:-1]) ** 2).sum()

    x = nn.Parameter(rotation.T @ torch.tensor([-1.2, 1.0] * 3, dtype=torch.float64))
    closure = evaluated([x], rosenbrock)
    optimizer = method([x])
    for _ in range(8):
        optimizer.step(closure)
    torch.testing.assert_close(rotation @ x.detach(), torch.ones(n).double())
    assert closure.count < 300


@pytest.mark.slow
def test_ten_times_below_lbfgs_after_as_many_evaluations():
    """On poisson2d with 257 parameters, and mostly one evaluation a step."""
    evaluations = 300

    def train(optimizer_of):
        model = network(2, 64, 1)
        optimizer, objective = FirstOrder(optimizer_of(model)), poisson(model, n=80)
        spent, steps = 0, 0
        while spent < evaluations:
            spent += optimizer.step(objective).solver["evaluations"]
            steps += 20
        return objective.loss().item(), spent / steps

    reference = train(
        lambda m: torch.optim.LBFGS(m.parameters(), history_size=100, line_search_fn="strong_wolfe")
    )[0]
    for method in METHODS:
        loss, per_step = train(lambda m: method(m.parameters()))  # noqa: B023 - called right here
        assert loss < 0.1 * reference
        assert per_step < 1.3


@pytest.mark.parametrize("method", METHODS)
def test_single_precision(method):
    model = network(2, 8, 1, dtype=torch.float32)
    objective, optimizer = poisson(model), FirstOrder(method(model.parameters()))
    before = objective.loss().item()
    for _ in range(10):
        optimizer.step(objective)
    assert objective.loss().item() < 1e-3 * before


def test_a_state_goes_through_torch_and_continues_to_the_same_bits():
    model, twin = network(2, 5, 1), network(2, 5, 1)
    optimizer, resumed = (FirstOrder(SSBroyden(m.parameters(), max_iter=3)) for m in (model, twin))
    optimizer.step(poisson(model))
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(2):
        records = [o.step(poisson(m, seed=seed)) for o, m in ((optimizer, model), (resumed, twin))]
        assert records[0].solver == records[1].solver
    assert same(values(model), values(twin))


def test_frozen_parameters_stay_and_may_be_frozen_later():
    model = network(2, 5, 1)
    first = next(model.parameters())
    first.requires_grad_(False)
    optimizer = FirstOrder(SSBFGS(model.parameters(), max_iter=5))
    before = first.clone()
    optimizer.step(poisson(model))
    assert torch.equal(first, before)
    bias = model[0].bias.requires_grad_(False)
    before, loss = bias.clone(), poisson(model).loss().item()
    optimizer.step(poisson(model))
    assert torch.equal(bias, before)
    assert poisson(model).loss().item() < loss


def test_groups_are_one_vector():
    model, twin = network(2, 5, 1), network(2, 5, 1)
    layers = [{"params": list(twin[i].parameters())} for i in (0, 2)]
    for optimizer, m in ((SSBroyden(model.parameters()), model), (SSBroyden(layers), twin)):
        FirstOrder(optimizer).step(poisson(m))
    assert torch.equal(flat(model), flat(twin))
    layers[0]["lr"] = 0.5
    with pytest.raises(ValueError, match=r"same options, .* got \(lr, max_iter\) of \(0.5, 20\)"):
        FirstOrder(SSBroyden(layers)).step(poisson(twin))


def test_a_loss_that_overflows_further_away():
    x = nn.Parameter(torch.tensor([3.0], dtype=torch.float64))

    def barrier(x):
        if x < 0.5:
            raise FloatingPointError
        return (x - torch.log(x - 0.5) if x < 3.5 else x * math.inf).sum()

    SSBFGS([x], lr=100.0).step(evaluated([x], barrier))
    assert x.item() == pytest.approx(1.5)


def test_where_the_loss_does_not_decrease_along_its_gradient_nothing_moves():
    x = nn.Parameter(torch.ones(3).double())
    optimizer = SSBFGS([x])
    optimizer.step(evaluated([x], lambda x: 0.5 * x @ x))
    x.data.fill_(1.0)
    optimizer.step(evaluated([x], lambda x: (x - 2 * x.detach()).sum()))
    assert torch.equal(x.detach(), torch.ones(3).double())


@pytest.mark.parametrize("method", METHODS)
def test_from_a_loss_that_is_not_finite_nothing_moves(method):
    theta = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = method([theta])
    closure = evaluated([theta], lambda theta: theta.sum() * math.nan)
    assert optimizer.step(closure).isnan()
    assert theta.tolist() == [1.0, 2.0]
    assert closure.count == 1


def test_everything_frozen():
    theta = nn.Parameter(torch.tensor([1.0, 2.0]), requires_grad=False)
    assert SSBroyden([theta]).step(lambda: 3.0) == 3.0


def test_what_is_too_large_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 4 * 10**9)
    with pytest.raises(NotEnoughMemoryError, match=r"SSBroyden, of 30,000 .* 7\.2 GB.*LBFGS"):
        SSBroyden([nn.Parameter(torch.zeros(30_000).double())])
    SSBroyden([nn.Parameter(torch.zeros(30_000).double(), requires_grad=False)])


@pytest.mark.parametrize(
    ("options", "match"),
    [({"lr": 0.0}, "lr, .* must be positive, got 0.0"), ({"max_iter": 0}, "1 or more, got 0")],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        SSBFGS([nn.Parameter(torch.zeros(1))], **options)
