"""Linearizing at some of the points: what an objective at these points alone would be."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pinncurv import linearization
from pinncurv.curvature import Kernel, MatrixFreeGaussNewton, Objective
from pinncurv.diffops import Directional, SecondOrder
from pinncurv.problems import L2, LossTerm
from tests import oracles
from tests.networks import build, points
from tests.optim.cases import flat
from tests.terms import TERMS, diffusivity

N = 7
X = points(N, seed=5)


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) + 0.5


# What belongs to points: weights, coefficients, data. The residual has one component, or three.
CASES: dict[str, LossTerm] = {
    "a function as weight": TERMS["log_fokker_planck"],
    "a number": TERMS["vector"],
    "numbers per component": replace(TERMS["vector"], weight=(0.5, 2.0, 1.0)),
    "a weight per point": replace(TERMS["anisotropic"], weight=numbers(N)),
    "one per point and component": replace(TERMS["vector"], weight=numbers(N, 3)),
    "data": replace(
        TERMS["data"],
        data={"observed": points(N, 1, seed=6), "sign": torch.tensor([1, -1, 1, 1, -1, -1, 1])},
    ),
    "coefficients": replace(
        TERMS["point_tensors"],
        operators={
            "flow": Directional(points(N, 2, seed=2)),
            "second": SecondOrder(diffusivity(X)),
        },
    ),
}


def chosen_points(linearized, t: int, x: Tensor) -> list[int]:
    """Return which points of all were taken, each once."""
    taken = [int((x == row).all(1).nonzero()) for row in linearized[t].x]
    assert len(set(taken)) == len(taken)
    return taken


def alone(term: LossTerm, taken: list[int]) -> LossTerm:
    """Return the term of these points."""
    of_points = isinstance(term.weight, Tensor) and term.weight.ndim
    part = torch.tensor(taken)
    return replace(term.at(part), weight=term.weight[part] if of_points else term.weight)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_as_if_there_were_no_other_points(name, chunk_size):
    model, term = build("gated"), CASES[name]
    objective = Objective(model, [term], [X], chunk_size)
    V = objective.linearize()[0].num_components
    assert objective.rows == N * V
    linearized = objective.linearize_some(3 * V, torch.Generator().manual_seed(1))
    taken = chosen_points(linearized, 0, X)
    assert len(taken) == 3
    mine = alone(term, taken)
    parameters = oracles.trainable(model)
    residual = oracles.scaled_residual(mine, model, X[taken], parameters)
    J = oracles.jacobian(mine, model, X[taken])
    oracles.assert_close(linearized.residual[0], residual)
    oracles.assert_close(linearized.jacobian.to_dense(), J)
    oracles.assert_close(flat(linearized.gradient()), J.T @ residual.flatten())
    oracles.assert_close(Kernel()(linearized).to_dense(), J @ J.T)
    oracles.assert_close(MatrixFreeGaussNewton()(linearized).to_dense(), J.T @ J)
    expected = oracles.loss([term], model, [X], parameters)
    assert linearized.term_losses == {term.name: pytest.approx(float(expected), rel=1e-12)}
    assert not any(r.requires_grad for r in linearized.residual)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_several_terms_and_a_decay(chunk_size):
    """Each term by its share of the points, at least one; an L2 term as a whole."""
    model = build("fourier")
    terms = [TERMS["poisson"], TERMS["vector"], TERMS["value"], L2(0.3)]
    batch = [points(40, seed=1), points(20, seed=2), points(2, seed=3)]
    sampled = Objective.sample(model, terms)
    objective = Objective(model, terms, [*batch, sampled.points[3]], chunk_size)
    assert objective.rows == 40 + 3 * 20 + 2
    linearized = objective.linearize_some(25, torch.Generator().manual_seed(1))
    counts = [len(part.x) for part in linearized]
    D = linearized.space.dimension
    assert counts == [9, 4, 1, D]
    jacobians, residuals = [], []
    for t, (term, x) in enumerate(zip(terms[:3], batch, strict=True)):
        mine = x[chosen_points(linearized, t, x)]
        jacobians.append(oracles.jacobian(term, model, mine))
        residuals.append(oracles.scaled_residual(term, model, mine, oracles.trainable(model)))
    theta = flat(model)
    jacobians.append(0.3**0.5 * torch.eye(D, dtype=theta.dtype))
    residuals.append(0.3**0.5 * theta)
    u = torch.cat([r.flatten() for r in residuals])
    J = torch.cat(jacobians)
    oracles.assert_close(linearized.jacobian.to_dense(), J)
    oracles.assert_close(torch.cat([r.flatten() for r in linearized.residual]), u)
    oracles.assert_close(flat(linearized.gradient()), J.T @ u)
    losses = {name: float(loss.detach()) for name, loss in objective.term_losses().items()}
    assert linearized.term_losses == pytest.approx(losses, rel=1e-12)
    assert linearized.term_losses["l2"] == pytest.approx(0.15 * float(theta @ theta), rel=1e-12)


@pytest.mark.parametrize("rows", [1, 5, 6, 20, 31, 41, 60, 61])
def test_never_more_than_asked_for(rows):
    """Beyond the largest side of a factorization, a row more would mean conjugate gradients."""
    terms = [TERMS["poisson"], TERMS["vector"], TERMS["value"]]
    batch = [points(9, seed=1), points(17, seed=2), points(1, seed=3)]
    objective = Objective(build("fourier"), terms, batch)
    linearized = objective.linearize_some(rows, torch.Generator().manual_seed(1))
    taken = linearized.jacobian.shape[0]
    assert taken <= max(rows, 5)  # a point of each
    assert taken > min(rows, objective.rows) - 5  # as many as whole points allow


@pytest.mark.parametrize("rows", [N, 100])
def test_all_points_in_their_order(rows):
    objective = Objective(build("gated"), [CASES["a weight per point"]], [X], chunk_size=3)
    linearized = objective.linearize_some(rows, torch.Generator())
    whole = objective.linearize()
    torch.testing.assert_close(linearized.residual, whole.residual)
    torch.testing.assert_close(linearized.gradient(), whole.gradient())
    assert linearized.of_some
    assert not whole.of_some


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_the_residual_of_now(some, chunk_size):
    """At the same points, after the parameters were moved, and without a graph."""
    model = build("gated")
    terms = [CASES["one per point and component"], TERMS["value"], L2(0.2)]
    batch = [X, points(4, seed=4), Objective.sample(model, [TERMS["value"], L2(0.2)]).points[1]]
    objective = Objective(model, terms, batch, chunk_size)
    generator = torch.Generator().manual_seed(1)
    linearized = objective.linearize_some(9, generator) if some else objective.linearize()
    torch.testing.assert_close(linearized.residual_now(), linearized.residual)
    taken = [chosen_points(linearized, t, batch[t]) for t in (0, 1)]
    before = [r.clone() for r in linearized.residual]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    now = linearized.residual_now()
    parameters = oracles.trainable(model)
    for t in (0, 1):
        mine, x = alone(terms[t], taken[t]), batch[t][taken[t]]
        oracles.assert_close(now[t], oracles.scaled_residual(mine, model, x, parameters))
        assert not now[t].requires_grad
    oracles.assert_close(now[2][:, 0], 0.2**0.5 * flat(model))
    if chunk_size is None:
        torch.testing.assert_close(linearized.residual, before, rtol=0, atol=0)


def test_the_generator_draws_the_points():
    objective = Objective(build("gated"), [TERMS["vector"]], [points(30)])
    draws = [
        objective.linearize_some(30, torch.Generator().manual_seed(seed))[0].x for seed in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(30)
    for _ in range(100):
        counts[chosen_points(objective.linearize_some(30, generator), 0, objective.points[0])] += 1
    # each of 30 points is in a third of the draws: 33 with a standard deviation of 4.7
    assert counts.sum() == 1000
    assert float((counts - 100 / 3).abs().max()) < 5 * 4.7


def test_no_more_is_linearized(monkeypatch):
    """A forward pass of all points for the losses, and a backward pass of the chosen ones."""
    objective = Objective(build("gated"), [TERMS["vector"]], [points(30)], chunk_size=4)
    linearized, evaluated = [], []
    bound = linearization.BoundTerm.linearize
    residual = linearization.TermPart.residual
    monkeypatch.setattr(
        linearization.BoundTerm,
        "linearize",
        lambda self, part: (linearized.append(len(part.x)), bound(self, part))[1],
    )
    monkeypatch.setattr(
        linearization.TermPart,
        "residual",
        lambda self, model: (evaluated.append(len(self.x)), residual(self, model))[1],
    )
    some = objective.linearize_some(18, torch.Generator())
    some.gradient()
    MatrixFreeGaussNewton()(some).to_dense()
    assert linearized == [6]
    assert sum(evaluated) == 30
    assert max(evaluated) == 4


def test_follows_what_has_changed():
    """A parameter that is frozen, and a weight that is written to."""
    weight = torch.tensor(1.0, dtype=torch.float64)
    model, term = build("gated"), replace(TERMS["vector"], weight=weight)
    objective = Objective(model, [term], [points(6)])
    before = objective.linearize_some(6, torch.Generator().manual_seed(0))
    weight.fill_(4.0)
    model.u.weight.requires_grad_(False)
    after = objective.linearize_some(6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(after.residual[0], 2 * before.residual[0])
    assert "u.weight" in before.names
    assert "u.weight" not in after.names
