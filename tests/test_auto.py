"""The preset that needs no settings: on the forms of problems that a user brings."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from pinncurv import presets
from pinncurv.curvature import CheaperSide, MatrixFreeGaussNewton, Objective
from pinncurv.diffops import Gradient, Partial, Value
from pinncurv.optim import ConstantDamping, GeodesicFlow, GrowingBatch
from pinncurv.problems import L2, Box, Fixed, LossTerm, poisson2d
from tests.optim.cases import flat, network, poisson, same, values

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # which take longer than the steps


def train(objective: Objective, steps: int, optimizer=None):
    """Take steps, none of which may raise the loss, and return the last record."""
    optimizer = presets.auto(objective.parameters()) if optimizer is None else optimizer
    for _ in range(steps):
        record = optimizer.step(objective)
        assert math.isfinite(record.loss)
        assert record.new_loss <= record.loss
    return record


def rmse(model: nn.Module) -> float:
    problem = poisson2d(10, 4)
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(12345)
    fresh = problem.evaluation.sample(generator, parameter.dtype, "cpu")
    return problem.errors(model, fresh).rmse


def test_composition():
    """All that it is made of is a setting, and none is needed."""
    optimizer = presets.auto(network().parameters())
    part = optimizer.preconditioner
    assert part.curvature == MatrixFreeGaussNewton()
    assert part.inverse == CheaperSide(1e-2)
    assert part.average is None
    assert optimizer.step_size == GeodesicFlow()
    assert optimizer.batch == GrowingBatch()
    assert optimizer.momentum is None
    assert optimizer.damping_rule == ConstantDamping()
    assert optimizer.max_halvings == 0
    optimizer = presets.auto(
        network().parameters(),
        damping=1e-3,
        rows=500,
        shortest=0.125,
        longest=0.5,
        calm=0.1,
        floor=10.0,
        largest=300,
        accelerate=False,
        seed=3,
        jacobi=True,
    )
    assert optimizer.preconditioner.inverse == CheaperSide(1e-3, 10.0, 300, jacobi=True)
    assert optimizer.step_size == GeodesicFlow(0.125, 0.5, 0.1, accelerate=False)
    assert optimizer.batch == GrowingBatch(300, largest=300, seed=3)


def test_trains_with_parameters_damped_by_how_much_they_matter():
    """Each retry with more damping goes through the scaled inverse, too."""
    model = network(2, 16, 1)
    objective = Objective.sample(model, poisson2d(60, 20), torch.Generator().manual_seed(0))
    optimizer = presets.auto(model.parameters(), rows=30, jacobi=True)
    losses = [optimizer.step(objective).loss for _ in range(25)]
    assert losses[-1] < 1e-3 * losses[0]


def test_trains_the_published_setting():
    """poisson2d with 900 + 120 points and 257 parameters, in 40 steps from few points to all."""
    model = network(2, 64, 1)
    objective = Objective.sample(model, poisson2d(900, 120), torch.Generator().manual_seed(0))
    optimizer = presets.auto(model.parameters())
    train(objective, 40, optimizer)
    assert rmse(model) < 2e-4
    assert optimizer.preconditioner.state["rows"] >= 400


@pytest.mark.slow
def test_reaches_the_accuracy_of_the_best():
    model = network(2, 64, 1)
    objective = Objective.sample(model, poisson2d(900, 120), torch.Generator().manual_seed(0))
    train(objective, 120)
    assert rmse(model) < 1e-6


def test_single_precision():
    """The same settings: what float32 resolves is found out."""
    model = network(2, 12, 12, 1, dtype=torch.float32)
    objective = poisson(model, n=60)
    before = objective.loss().item()
    optimizer = presets.auto(model.parameters())
    record = train(objective, 30, optimizer)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert record.new_loss < 1e-5 * before
    trace = MatrixFreeGaussNewton()(objective.linearize()).trace().item()
    assert record.damping >= 0.5 * torch.finfo(torch.float32).eps * trace


def test_groups():
    """Another rate for a group, and named parameters."""
    model = network(2, 8, 1)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    objective = poisson(model)
    before = objective.loss().item()
    record = train(objective, 25, presets.auto(groups))
    assert record.new_loss < 0.2 * before
    named = network(2, 8, 1)
    twin = network(2, 8, 1)
    left = presets.auto(named.named_parameters()).step(poisson(named))
    assert repr(left) == repr(presets.auto(twin.parameters()).step(poisson(twin)))


def test_frozen_parameters():
    """Also when they are frozen in the middle of a run."""
    model = network(2, 8, 1)
    model[0].bias.requires_grad_(False)
    frozen = model[0].bias.clone()
    objective = poisson(model)
    before = objective.loss().item()
    optimizer = presets.auto(model.parameters())
    train(objective, 5, optimizer)
    model[0].weight.requires_grad_(False)
    weight = model[0].weight.clone()
    record = train(objective, 5, optimizer)
    assert torch.equal(model[0].bias, frozen)
    assert torch.equal(model[0].weight, weight)
    assert record.new_loss < 0.5 * before


class Diffusion(nn.Module):
    """u_t - ν u_xx with a ν that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.nu = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor, u_t: Tensor, u_xx: Tensor) -> Tensor:
        return u_t - self.nu * u_xx


def heat(x: Tensor, nu: float = 0.1) -> Tensor:
    return torch.exp(-nu * math.pi**2 * x[:, :1]) * torch.sin(math.pi * x[:, 1:])


def test_finds_a_coefficient():
    """An inverse problem: the coefficient of the heat equation from exact measurements."""
    model, residual, x = network(2, 10, 10, 1), Diffusion(), Box.unit(2).interior(60)
    x = x.sample(torch.Generator().manual_seed(0), torch.float64, torch.device("cpu"))
    operators = {"u_t": Partial(0), "u_xx": Partial(1, 1)}
    terms = [
        LossTerm(operators, residual, Fixed(x), name="heat"),
        LossTerm({"u": Value()}, lambda x, u, y: u - y, Fixed(x), 10.0, "data", {"y": heat(x)}),
    ]
    objective = Objective(model, terms, [x, x])
    assert any(p is residual.nu for p in objective.parameters())
    record = train(objective, 50)
    assert record.new_loss < 1e-6
    assert residual.nu.item() == pytest.approx(0.1, rel=1e-2)


def test_a_system():
    """Three fields and residuals: σ = ∇u, -div σ = f, as first order."""
    model = network(2, 10, 3)
    box = Box.unit(2)

    def first_order(x: Tensor, u: Tensor, gradient: Tensor) -> Tensor:
        sigma = u[:, 1:]
        divergence = gradient[:, 1, 0] + gradient[:, 2, 1]
        f = 2 * math.pi**2 * torch.prod(torch.sin(math.pi * x), 1)
        return torch.cat([gradient[:, 0] - sigma, (divergence + f)[:, None]], 1)

    terms = [
        LossTerm({"u": Value(), "gradient": Gradient()}, first_order, box.interior(50), name="pde"),
        LossTerm({"u": Value()}, lambda x, u: u[:, :1], box.faces(20), name="boundary"),
    ]
    objective = Objective.sample(model, terms)
    before = objective.loss().item()
    assert train(objective, 40).new_loss < 1e-4 * before


def test_a_decay_of_the_parameters():
    """L2 rows are in every linearization, and its minimum is a balance, not zero."""
    model = network(2, 8, 1)
    problem = poisson2d(60, 20)
    objective = Objective.sample(model, [*problem.terms, L2(1e-3)])
    optimizer = presets.auto(objective.parameters(), rows=30)
    train(objective, 60, optimizer)
    gradient = flat(objective.linearize().gradient())
    assert float(gradient.norm()) < 1e-3
    assert objective.term_losses()["l2"].item() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_the_first_damping_hides(dtype: torch.dtype):
    """It is lowered, in single precision by steps that do not move, until it no longer does."""
    problem, model = poisson2d(60, 20), network().to(dtype)
    terms = [dataclasses.replace(term, weight=1e-12) for term in problem.terms]
    objective = Objective.sample(model, terms)
    before, optimizer = objective.loss().item(), presets.auto(objective.parameters())
    first = optimizer.step(objective)
    assert first.stalled == (dtype == torch.float32)
    assert train(objective, 25, optimizer).new_loss < 0.01 * before


def test_points_that_do_not_stand_for_all_raise_the_damping_little():
    """Where a step serves its points and not the others, more damping in the step is no remedy."""
    problem, model = poisson2d(300, 60), network()
    objective = Objective.sample(model, problem)
    optimizer = presets.auto(objective.parameters(), damping=1e-8, rows=8, largest=8)
    before, raised, rejected = 1e-8, 0, 0
    for _ in range(30):
        record = optimizer.step(objective)
        now = optimizer.state_dict()["state"]["curvature"]["damping"]
        assert now <= 1000 * max(before, record.damping)
        raised, rejected, before = raised + (now > before), rejected + (not record.accepted), now
    assert raised
    assert rejected


def test_other_points_in_every_step():
    model = network(2, 10, 1)
    generator = torch.Generator().manual_seed(0)
    objective = Objective.sample(model, poisson2d(60, 20), generator)
    optimizer = presets.auto(model.parameters(), rows=30)
    before = rmse(model)
    for _ in range(40):
        record = optimizer.step(objective.resampled(generator))
        assert record.new_loss <= record.loss
    assert rmse(model) < 0.1 * before


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_more_residuals_than_may_be_linearized(chunk_size):
    """Beyond ``largest``, random ones in every step, and no larger matrix."""
    model = network(2, 8, 1)
    objective = poisson(model, chunk_size=chunk_size, n=60)
    before = objective.loss().item()
    optimizer = presets.auto(model.parameters(), largest=20)
    record = train(objective, 25, optimizer)
    assert optimizer.preconditioner.state["rows"] == 20
    assert record.new_loss < 0.2 * before


def test_a_copy_goes_on_alike():
    model = network(2, 8, 1)
    optimizer = presets.auto(model.parameters(), rows=5)
    train(poisson(model), 4, optimizer)
    twin, copied = copy.deepcopy((model, optimizer))
    train(poisson(model), 3, optimizer)
    train(poisson(twin), 3, copied)
    assert same(values(model), values(twin))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1.0}, "damping must be a finite number >= 0, got"),
        ({"floor": 0.0}, "The floor must be positive, got"),
        ({"rows": 0}, "1 <= rows <= largest"),
        ({"shortest": 0.0}, "0 < shortest <= 1"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        presets.auto(network().parameters(), **settings)
