"""The Hessian and its two parts against nested torch.func."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.func import hessian

from pinncurv.curvature import MatrixFreeGaussNewton, Objective
from pinncurv.curvature.hessian import (
    Hessian,
    HessianLinearOperator,
    ResidualHessian,
    ResidualHessianLinearOperator,
)
from pinncurv.linearization import ForwardOnly, linearize
from pinncurv.linops import Damped, FactorizationError
from pinncurv.linops.restriction import block_diagonal, restrict
from pinncurv.optim import CurvatureOptimizer, QuadraticModel
from pinncurv.problems import Fixed
from tests import oracles
from tests.conformance import check_operator
from tests.networks import build, points
from tests.terms import TERMS

TRIPLE = [TERMS["anisotropic"], TERMS["vector"], TERMS["data"]]
BATCH = [points(3, seed=4), points(4), points(3, seed=5)]


def oracle(terms, model, batch) -> torch.Tensor:
    blocks = hessian(lambda p: oracles.loss(terms, model, batch, p))(oracles.trainable(model))
    sizes = {name: p.numel() for name, p in oracles.trainable(model).items()}
    return torch.cat(
        [
            torch.cat([row[name].reshape(sizes[other], sizes[name]) for name in sizes], 1)
            for other, row in blocks.items()
        ]
    )


def linearized(terms, model, batch, **options):
    return [linearize(t, model, x, **options) for t, x in zip(terms, batch, strict=True)]


@pytest.fixture(scope="module")
def triple():
    """Three terms (weights per point, two components, data) on a gated network."""
    model = build("gated")
    return model, linearized(TRIPLE, model, BATCH), oracle(TRIPLE, model, BATCH)


def test_conformance(triple):
    _, linearizations, expected = triple
    operator = HessianLinearOperator(linearizations)
    assert torch.linalg.eigvalsh(expected)[0] < -0.1, "the test is about an indefinite matrix"
    oracles.assert_close(operator.to_dense(), expected)
    one = operator.term("vector")
    check_operator(one, one.to_dense(), dampings=(), tolerance=1e-10)


@pytest.mark.parametrize("kind", ["no_bias", "repeated", "tokens", "gelu", "softplus"])
def test_network_kinds(kind):
    model, terms = build(kind), [TERMS["allen_cahn"], TERMS["value"]]
    batch = [points(3), points(2, seed=3)]
    operator = Hessian()(linearized(terms, model, batch))
    oracles.assert_close(operator.to_dense(), oracle(terms, model, batch))


def test_two_parts(triple):
    _, linearizations, expected = triple
    first = MatrixFreeGaussNewton()(linearizations)
    second = ResidualHessian()(linearizations)
    oracles.assert_close((first + second) @ torch.eye(len(expected)).double(), expected)
    oracles.assert_close(second.to_dense(), expected - first.to_dense())


def test_terms_add_up(triple):
    model, linearizations, expected = triple
    operator = HessianLinearOperator(linearizations)
    parts = [operator.term(term.name) for term in TRIPLE]
    oracles.assert_close(sum(part.to_dense() for part in parts), expected)
    oracles.assert_close(operator.term(1).to_dense(), oracle([TRIPLE[1]], model, [BATCH[1]]))
    with pytest.raises(KeyError, match=r"one of \('anisotropic', 'vector', 'data'\).*'other'"):
        operator.term("other")


def test_residual_part_is_zero_for_a_linear_problem():
    """One linear layer and the value; with the Laplacian nothing even requires a gradient."""
    model = nn.Linear(2, 1).double()
    for name in ("value", "poisson"):
        linearization = linearize(TERMS[name], model, points())
        for part, factor in ((ResidualHessian(), 0.0), (Hessian(), 1.0)):
            exact = oracle([TERMS[name]], model, [points()])
            oracles.assert_close(part([linearization]).to_dense(), factor * exact)


def test_residual_part_keeps_its_digits():
    """A residual of 1e-12 at a nonlinear network: a difference of matrices would be noise."""
    model, x = build("tanh"), points()
    with torch.no_grad():
        target = model(x)
    term = dataclasses.replace(TERMS["value"], residual=lambda x, u, y: u - y, data={"y": target})

    def part(shift: float) -> torch.Tensor:
        shifted = dataclasses.replace(term, data={"y": target + shift})
        linearization = linearize(shifted, model, x)
        return ResidualHessianLinearOperator([linearization]).to_dense()

    small, large = part(2.0**-40), part(1.0)  # powers of two: the residual is exact to 2^-12
    assert small.norm() > 0
    torch.testing.assert_close(small * 2.0**40, large, rtol=1e-3, atol=1e-3)
    assert part(0.0).count_nonzero() == 0


def test_inverse_of_an_indefinite_matrix(triple):
    _, linearizations, expected = triple
    operator = Hessian()(linearizations)
    b = torch.ones(len(expected), dtype=torch.float64)
    for damping in (1e-6, 1e-3, 1.0):
        wanted = torch.linalg.solve(expected + damping * torch.eye(len(expected)).double(), b)
        inverse = operator.inverse(damping)
        oracles.assert_close(inverse @ b, wanted, rtol=1e-7)
        check_operator(inverse, dampings=(), tolerance=1e-8)
    with pytest.raises(FactorizationError, match=r"HessianLinearOperator plus damping must be non"):
        operator.inverse(-operator.eigh.eigenvalues[0].item())
    with pytest.raises(NotImplementedError, match=r"at most 3 parameters.*minres.*shift=-0.5"):
        operator.inverse(0.5, dense_limit=3)
    with pytest.raises(ValueError, match="damping must be"):
        operator.inverse(-1.0)


def test_restriction_and_mixture(triple):
    _, linearizations, expected = triple
    operator = Hessian()(linearizations)
    blocks, layer = operator.space.blocks, operator.space.blocks[1]
    restricted = restrict(operator, [layer])
    start = sum(shape.numel() for shape in operator.shapes[: layer.weight])
    inside = slice(start, start + layer.numel)
    oracles.assert_close(restricted.to_dense(), expected[inside, inside])
    mixed = block_diagonal([operator] * len(blocks), blocks)
    oracles.assert_close(mixed.to_dense()[inside, inside], expected[inside, inside])
    b = torch.ones(layer.numel, dtype=torch.float64)
    padded = torch.zeros(len(expected), dtype=torch.float64)
    padded[inside] = b
    exact = torch.linalg.solve(expected[inside, inside] + torch.eye(len(b)).double(), b)
    oracles.assert_close((mixed.inverse(1.0) @ padded)[inside], exact)


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_change_nothing(triple, chunk_size):
    model, _, expected = triple
    operator = Hessian()(linearized(TRIPLE, model, BATCH, chunk_size=chunk_size))
    oracles.assert_close(operator.to_dense(), expected)


def test_scale_laws():
    model, x, term = build("residual"), points(), TERMS["log_fokker_planck"]
    for recipe in (Hessian(), ResidualHessian()):
        once = recipe([linearize(term, model, x)]).to_dense()
        twin = dataclasses.replace(term, name="twin")
        both = recipe(linearized([term, twin], model, [x, x])).to_dense()
        torch.testing.assert_close(both, 2 * once)
        duplicated = recipe([linearize(term, model, torch.cat([x, x]))]).to_dense()
        torch.testing.assert_close(duplicated, once)


def test_float32_and_the_choice_of_gradients():
    """The choice of G is none of the Hessian's business."""
    model, x, term = build("gelu"), points(), TERMS["vector"]
    expected = oracle([term], model, [x])
    linearization = linearize(term, model.float(), x.float(), fisher=ForwardOnly())
    operator = Hessian()([linearization])
    assert operator.dtype == torch.float32
    dense = operator.to_dense().double()
    torch.testing.assert_close(dense, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert (operator.inverse(1e-1) @ torch.ones(len(expected))).dtype == torch.float32


def test_changed_parameters_and_inference_mode():
    model = build("tanh")
    operator = Hessian()([linearize(TERMS["poisson"], model, points())])
    b = torch.ones(operator.shape[0], dtype=torch.float64)
    with torch.no_grad():
        assert (operator @ b).isfinite().all()
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"term 'poisson'.*inference_mode"),
    ):
        operator @ b
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match=r"term 'poisson'.*Linearize again"):
        operator @ b


def test_recipe_trains():
    """With damping above its most negative eigenvalue the Hessian descends."""
    model, x = build("tanh"), points(20)
    objective = Objective(model, [dataclasses.replace(TERMS["poisson"], points=Fixed(x))], [x])
    optimizer = CurvatureOptimizer(
        model.parameters(), curvature=Hessian(), inverse=Damped(10.0), step_size=QuadraticModel()
    )
    losses = [optimizer.step(objective).loss for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.5 * losses[0]
