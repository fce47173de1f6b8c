"""Residuals along random directions: one residual for loss, curvature and search, and trainings."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import (
    EKFAC,
    KFAC,
    GaussNewton,
    Kernel,
    MatrixFreeGaussNewton,
    Objective,
    expand,
    reduce,
)
from pinncurv.diffops import (
    Gradient,
    Laplacian,
    Partial,
    Plan,
    RandomCoordinates,
    RandomSigns,
    SecondOrder,
    Value,
)
from pinncurv.linearization import linearize
from pinncurv.optim import FirstOrder, HeldOut
from pinncurv.problems import (
    Box,
    Energy,
    Fixed,
    LossTerm,
    ResidualBased,
    SpaceTimeBox,
    heat,
    poisson100d,
)
from pinncurv.verification import verify_curvature, verify_term
from tests import oracles
from tests.conformance import check_operator
from tests.networks import build, points

D = 5
KINDS = (RandomCoordinates, RandomSigns)


def field(x):
    """A full matrix that varies from point to point."""
    return torch.einsum("ni,nj->nij", 1 + x, torch.cos(x)) + torch.eye(D).double()


def terms(kind, samples=2) -> dict[str, LossTerm]:
    sampling = kind(samples, seed=3)
    x = points(4, D)
    return {
        "poisson": LossTerm(
            {"lap": Laplacian(sampling=sampling)},
            lambda x, lap: -lap - torch.sin(3 * x).sum(1, keepdim=True),
            Fixed(x),
            2.5,
        ),
        "nonlinear": LossTerm(
            {"u": Value(), "u_t": Partial(0), "lap": Laplacian(dims=(1, 2, 4), sampling=sampling)},
            lambda x, u, u_t, lap: u_t - 0.1 * lap + 5 * (u**3 - u),
            Fixed(x),
            weight=lambda x: 0.5 + x[:, 0] ** 2,
        ),
        "field": LossTerm(
            {"u": Value(), "second": SecondOrder(field, sampling=sampling)},
            lambda x, u, second: second * u,
            Fixed(x),
        ),
        "point_tensors": LossTerm(
            {
                "second": SecondOrder(field(x), sampling=sampling),
                "factored": SecondOrder.from_factors(field(x)[..., :3], sampling=sampling),
            },
            lambda x, second, factored: second + factored**2,
            Fixed(x),
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", terms(RandomSigns))
@pytest.mark.parametrize("network", ["tanh", "gated", "repeated"])
def test_gradient_and_gauss_newton_are_those_of_the_frozen_residual(kind, name, network):
    model, term, x = build(network, D), terms(kind)[name], points(4, D)
    objective = Objective(model, [term], [x])
    linearized = objective.linearize()
    parameters = oracles.trainable(model)
    oracles.assert_close(objective.loss(), oracles.loss([term], model, [x], parameters))
    for received, wanted in zip(
        linearized.gradient(), oracles.gradient([term], model, [x]), strict=True
    ):
        oracles.assert_close(received, wanted)
    wanted = oracles.gauss_newton([term], model, [x])
    oracles.assert_close(MatrixFreeGaussNewton()(linearized).to_dense(), wanted)
    J = oracles.jacobian(term, model, x)
    oracles.assert_close(Kernel()(linearized).to_dense(), J @ J.T)


@pytest.mark.parametrize("rule", [(expand, oracles.kfac_expand), (reduce, oracles.kfac_reduce)])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(RandomCoordinates, "poisson"), (RandomSigns, "nonlinear"), (RandomSigns, "field")],
)
def test_kronecker_factors_are_those_of_the_definition(kind, name, rule):
    """With unit directions as channels: then those of all coordinates are the exact operator's."""
    sharing, oracle = rule
    model, term, x = build("tanh", D), terms(kind)[name], points(4, D)
    operator = KFAC(sharing)([linearize(term, model, x)])
    expected = oracles.layers(term, model, x)
    for (pair,), layer in zip(operator.factors, expected.values(), strict=True):
        A, B = oracle(layer)
        oracles.assert_close(pair.A, A)
        oracles.assert_close(pair.B, B)


@pytest.mark.parametrize("curvature", [GaussNewton(), KFAC(), KFAC(reduce), EKFAC()])
def test_all_coordinates_make_the_operators_of_the_exact_residual(curvature):
    model, x = build("gated", D), points(4, D)
    exact, sampled = (
        LossTerm({"lap": Laplacian(sampling=s)}, lambda x, lap: lap - 1, Fixed(x))
        for s in (None, RandomCoordinates(D))
    )
    wanted, received = (curvature([linearize(t, model, x)]).to_dense() for t in (exact, sampled))
    oracles.assert_close(received, wanted, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("curvature", [KFAC(), EKFAC(), Kernel(), GaussNewton()])
def test_operators_obey_the_laws(kind, curvature):
    model, chosen = build("tanh", D), list(terms(kind).values())[:1]
    linearized = Objective(model, chosen, [points(4, D)]).linearize()
    check_operator(curvature(linearized), dampings=(1e-3, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_duplicates_change_nothing(kind):
    """Directions belong to the points: not to their number, their order, or their place."""
    model, x = build("tanh", D), points(7, D)
    term = LossTerm({"lap": Laplacian(sampling=kind(2))}, lambda x, lap: lap - 1, Fixed(x))
    wanted = Objective(model, [term], [x])
    matrix = MatrixFreeGaussNewton()(wanted.linearize()).to_dense()
    for other, size in ((x, 2), (torch.cat([x, x]), None), (x.flip(0), 3)):
        received = Objective(model, [term], [other], chunk_size=size)
        oracles.assert_close(received.loss().detach(), wanted.loss().detach(), 1e-12)
        dense = MatrixFreeGaussNewton()(received.linearize()).to_dense()
        oracles.assert_close(dense, matrix, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_verification_passes(kind, dtype):
    model, x = build("tanh", D).to(dtype), points(4, D).to(dtype)
    for term in terms(kind).values():
        report = verify_term(term, model, x)
        assert report.passed, str(report)
    report = verify_curvature(GaussNewton(), model.double(), [terms(kind)["field"]], [x.double()])
    assert report.passed, str(report)


def test_verification_finds_a_wrong_estimate():
    class Forgets(RandomCoordinates):
        def estimate(self, x, k, embed, matrix=None):
            made = super().estimate(x, k, embed, matrix)
            return replace(made, terms={**made.terms, (0, 0): 0.0})

    model, x = build("tanh", D), points(4, D)
    exact = {"lap": lambda u, p: torch.func.hessian(u)(p).diagonal(dim1=-2, dim2=-1).sum(-1)}
    for sampling, passes in ((RandomCoordinates(D), True), (Forgets(D), False)):
        operators = {"lap": Laplacian(sampling=sampling)}
        term = terms(RandomSigns)["poisson"].with_fields(operators=operators)
        assert verify_term(term, model, x, references=exact).passed is passes


# --- new directions -------------------------------------------------------------------------------


def directions(objective: Objective, term: int = 0) -> torch.Tensor:
    operators = objective.terms[term].operators
    (lap,) = [o for o in operators.values() if isinstance(o, Laplacian)]
    return lap.sampling.draw(objective.points[term], D)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_resampled_objectives_have_new_directions(kind, fixed):
    model, x = build("tanh", D), points(30, D)
    sampler = Fixed(x) if fixed else Box.unit(D).interior(30)
    term = LossTerm({"lap": Laplacian(sampling=kind(2))}, lambda x, lap: lap - 1, sampler)
    first = Objective.sample(model, [term], torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    one, same, other = (first.resampled(generator) for generator in generators)
    assert torch.equal(directions(one), directions(same))
    assert one.loss() == same.loss()
    for objective in (first, other, one.resampled(generators[0])):
        different = directions(objective).ne(directions(one)).any(-1).any(0)
        assert different.double().mean() > 0.7
        assert objective.loss() != one.loss()


def test_losses_over_draws_have_the_stated_bias():
    """Mean over the draws of ½ mean r̂² = ½ mean (r² + Var), at points that stay."""
    model, x = build("tanh", D), points(200, D)

    def term(sampling):
        return LossTerm({"lap": Laplacian(sampling=sampling)}, lambda x, lap: lap - 1, Fixed(x))

    generator = torch.Generator().manual_seed(0)
    objective = Objective(model, [term(RandomCoordinates(2))], [x], check=False)
    losses = []
    for _ in range(60):
        objective = objective.resampled(generator)
        losses.append(float(objective.loss().detach()))
    losses = torch.tensor(losses).double()
    u = oracles.at_point(model, oracles.trainable(model))
    H = torch.stack([oracles.all_derivatives(u, point, 2)[0].diagonal() for point in x])
    variance = D**2 / 2 * (1 - 2 / D) * H.var(1)
    exact = Objective(model, [term(None)], [x]).loss().detach()
    wanted = exact + 0.5 * variance.mean()
    error = losses.std() / len(losses) ** 0.5
    assert abs(losses.mean() - wanted) < 4 * error
    assert wanted - exact > 10 * error  # the bias is seen


def test_the_product_of_two_estimates_is_unbiased():
    """Though its square is not: for first-order methods, since it is not convex."""
    model, box = build("tanh", D), Box.unit(D).interior(400)
    two = {name: Laplacian(sampling=RandomSigns(1, seed)) for name, seed in (("a", 0), ("b", 1))}
    product = Energy(two, box, density=lambda x, a, b: 0.5 * (a - 1) * (b - 1))
    square = LossTerm({"a": two["a"]}, lambda x, a: a - 1, box)
    exact = LossTerm({"a": Laplacian()}, lambda x, a: a - 1, box)
    generator, errors = torch.Generator().manual_seed(0), []
    for _ in range(50):
        (x,) = Objective.sample(model, [exact], generator).points
        losses = [Objective(model, [t], [x]).loss().detach() for t in (exact, product, square)]
        errors.append(torch.stack(losses[1:]) - losses[0])
    errors = torch.stack(errors)
    mean, spread = errors.mean(0), errors.std(0) / len(errors) ** 0.5
    assert abs(mean[0]) < 4 * spread[0]
    assert mean[1] > 10 * spread[1]
    objective = Objective.sample(model, [product])
    FirstOrder(torch.optim.Adam(objective.parameters())).step(objective)
    with pytest.raises(ValueError, match="must be convex"):
        presets.kfac_star(objective.parameters()).step(objective)


def test_operators_that_share_directions_go_on_to_do_so():
    x, sampling = points(6, D), RandomSigns(2, seed=4)
    operators = {
        "a": Laplacian(sampling=sampling),
        "b": SecondOrder.from_factors(torch.eye(D).double(), sampling=sampling),
        "c": Laplacian(sampling=RandomSigns(2, seed=5)),
    }
    term = LossTerm(operators, lambda x, a, b, c: a * b - c, Fixed(x))
    objective = Objective(build("tanh", D), [term], [x])
    (redrawn,) = objective.resampled(torch.Generator().manual_seed(0)).terms
    seeds = [operator.sampling.seed for operator in redrawn.operators.values()]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[0] != 4
    assert Plan.of(redrawn.operators, x).layout.R == Plan.of(operators, x).layout.R == 4


def test_exact_terms_take_no_random_number():
    term = LossTerm({"lap": Laplacian()}, lambda x, lap: lap, Fixed(points(2, D)))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert term.redrawn(generator) is term
    assert torch.equal(generator.get_state(), before)


def test_a_new_seed_is_followed():
    """An objective finds out that its operator was written to, as for any number."""
    model, x = build("tanh", D), points(10, D)
    term = terms(RandomSigns)["poisson"]
    objective = Objective(model, [term], [x])
    before, mark = objective.loss(), objective.fingerprint()
    object.__setattr__(term.operators["lap"], "sampling", RandomSigns(2, seed=77))
    assert objective.fingerprint() != mark
    assert objective.loss() != before
    changed = term.with_fields(operators={"lap": Laplacian(sampling=RandomSigns(2, seed=77))})
    assert objective.loss() == Objective(model, [changed], [x]).loss()


def test_points_with_large_residuals_are_judged_by_other_directions():
    """Chosen by its own estimates a batch would have errors that are larger than they are."""
    model = build("tanh", D)
    term = LossTerm(
        {"lap": Laplacian(sampling=RandomSigns(1))}, lambda x, lap: lap, Box.unit(D).interior(2000)
    )
    chosen = ResidualBased(term, model, 500, power=4.0, floor=1e-3)
    x = chosen.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    exact = term.with_fields(operators={"lap": Laplacian()})
    with torch.no_grad():
        noise = term.evaluate(model, x) - exact.evaluate(model, x)
        mine = [
            term.redrawn(torch.Generator().manual_seed(s)).evaluate(model, x) for s in range(20)
        ]
    usual = torch.stack([(m - exact.evaluate(model, x)).square().mean() for m in mine]).detach()
    assert abs(noise.square().mean() - usual.mean()) < 5 * usual.std()
    candidates = term.points.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    with torch.no_grad():
        size = term.evaluate(model, candidates)[:, 0].abs() ** 4
        picked = candidates[size.topk(500).indices]
        biased = (term.evaluate(model, picked) - exact.evaluate(model, picked)).square().mean()
    assert biased > usual.mean() + 10 * usual.std()  # which a choice by the same ones has


def test_held_out_losses_have_their_own_directions():
    model = build("tanh", D)
    term = LossTerm(
        {"lap": Laplacian(sampling=RandomSigns(2))}, lambda x, lap: lap - 1, Box.unit(D).interior(9)
    )
    objective = Objective.sample(model, [term])
    held_out = HeldOut(objective.resampled(torch.Generator().manual_seed(5)), every=1)
    optimizer = presets.kfac_star(objective.parameters())
    record = held_out(optimizer.step(objective))
    assert record.held_out != record.new_loss
    assert record.held_out == float(held_out.objective.loss().detach())


# --- trainings ------------------------------------------------------------------------------------


def network(d: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, width), nn.Tanh(), nn.Linear(width, 1)).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [presets.kfac_star, presets.spring])
def test_a_hundred_dimensions_are_trained(make, kind):
    """New points and directions in every step; the error falls, by the exact solution."""
    problem, model = poisson100d(sampling=kind(8)), network(100)
    generator = torch.Generator().manual_seed(0)
    x = problem.evaluation.sample(generator, torch.float64, "cpu")
    before = problem.errors(model, x).relative
    objective = Objective.sample(model, problem, generator)
    optimizer = make(objective.parameters())
    for _ in range(20):
        objective = objective.resampled(generator)
        optimizer.step(objective)
    assert problem.errors(model, x).relative < 0.5 * before


def test_the_line_search_sees_the_residual_of_the_step():
    """What a step says of its losses are those of the frozen objective, before and after."""
    problem, model = poisson100d(20, 10, RandomSigns(4)), network(100)
    objective = Objective.sample(model, problem)
    optimizer = presets.kfac_star(objective.parameters())
    for _ in range(3):
        before = float(objective.loss().detach())
        record = optimizer.step(objective)
        oracles.assert_close(torch.tensor(record.loss), torch.tensor(before), 1e-12)
        assert record.new_loss < record.loss
        oracles.assert_close(torch.tensor(record.new_loss), objective.loss().detach().float(), 1e-6)


def test_heat_in_a_hundred_dimensions_against_nested_autodiff():
    d = 100
    problem = heat(
        SpaceTimeBox.unit(d), 0.25, lambda x: x[:, :1], 3, 2, sampling=RandomCoordinates(4)
    )
    model = network(1 + d, 4)
    objective = Objective.sample(model, problem, torch.Generator().manual_seed(0))
    wanted = oracles.gradient(problem.terms, model, objective.points)
    for received, expected in zip(objective.linearize().gradient(), wanted, strict=True):
        oracles.assert_close(received, expected)
    first = FirstOrder(torch.optim.Adam(objective.parameters()))
    before = objective.loss()
    first.step(objective)
    assert objective.loss() < before


def test_channels_of_the_problem_are_few():
    """S = samples + 2, whatever d is: not d + 2."""
    sampling = RandomCoordinates(4)
    interior = poisson100d(sampling=sampling).terms[0]
    x = interior.points.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    linearized = linearize(interior, network(100), x[:3])
    shapes = {block.Z.shape[0] for chunk in linearized for block in chunk.blocks.values()}
    assert shapes == {6}


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_go_on_with_the_same_directions(kind):
    """Everything is a function of points and seed, so that a copy of a training is the same."""
    problem, model = poisson100d(10, 5, kind(3)), network(100, 4)
    objective = Objective.sample(model, problem, torch.Generator().manual_seed(0))
    optimizer = presets.kfac_star(objective.parameters())
    optimizer.step(objective)
    again = Objective(model, copy.deepcopy(problem.terms), [x.clone() for x in objective.points])
    assert again.loss() == objective.loss()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_the_same_on_the_gpu(kind):
    x = points(50, D)
    received = kind(3, seed=2).draw(x.cuda(), 40)
    assert torch.equal(received.cpu(), kind(3, seed=2).draw(x, 40))


def test_gradients_and_directions_may_be_combined():
    """Channels that another operator needs are no part of the estimate."""
    model, x = build("tanh", D), points(3, D)
    term = LossTerm(
        {"grad": Gradient(), "lap": Laplacian(sampling=RandomCoordinates(2))},
        lambda x, grad, lap: lap + grad.square().sum(-1),
        Fixed(x),
    )
    wanted = oracles.gauss_newton([term], model, [x])
    received = MatrixFreeGaussNewton()([linearize(term, model, x)]).to_dense()
    oracles.assert_close(received, wanted)
