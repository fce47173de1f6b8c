"""BackPACK and curvlinops as independent oracles for the boundary term, a plain regression."""

import curvlinops
import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, DiagGGNExact
from curvlinops.examples import IdentityLinearOperator
from torch import nn

from pinncurv.curvature import (
    KFAC,
    MatrixFreeGaussNewton,
    Objective,
    ParameterSpace,
    gauss_newton_diagonal,
)
from pinncurv.diffops import Value
from pinncurv.linearization import linearize
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer
from pinncurv.problems import Fixed, LossTerm, poisson2d
from tests import oracles
from tests.networks import build, points

# torch's mean squared error is 1/N Σ (u - g)², twice our loss 1/(2N) Σ (u - g)²
FACTOR = 2.0

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def regression():
    """The boundary term of the Poisson problem, and the same as inputs and targets."""
    problem = poisson2d()
    term = problem.terms[1]
    assert term.name == "boundary"
    model, x = build("tanh"), points(5)
    assert problem.solution is not None
    return model, x, problem.solution(x), linearize(term, model, x)


def test_backpack(regression):
    model, x, target, linearization = regression
    kfac = KFAC()([linearization])
    space = ParameterSpace.of([linearization])
    diagonal = gauss_newton_diagonal([linearization], space).diagonal()
    sequential = extend(nn.Sequential(*model))
    loss = extend(nn.MSELoss())(sequential(x), target)
    with backpack(KFLR(), DiagGGNExact()):
        loss.backward()
    layers = [module for module in sequential if isinstance(module, nn.Linear)]
    for layer, (pair,) in zip(layers, kfac.factors, strict=True):
        B, A = layer.weight.kflr
        (bias_B,) = layer.bias.kflr
        d = layer.in_features
        oracles.assert_close(pair.A[:d, :d], A)
        oracles.assert_close(FACTOR * pair.B, B)
        oracles.assert_close(FACTOR * pair.B, bias_B)
        assert pair.A[d, d].item() == 1
    wanted = torch.cat([p.diag_ggn_exact.flatten() for p in sequential.parameters()])
    oracles.assert_close(FACTOR * diagonal, wanted)


def test_curvlinops(regression):
    model, x, target, linearization = regression
    ours = MatrixFreeGaussNewton()([linearization])
    theirs = curvlinops.GGNLinearOperator(
        model, nn.MSELoss(), list(model.parameters()), [(x, target)]
    )
    identity = torch.eye(ours.shape[0], dtype=torch.float64)
    oracles.assert_close(FACTOR * (ours @ identity), theirs @ identity)
    oracles.assert_close(FACTOR * ours.to_dense(), theirs @ identity)


def test_cg_inverse_of_curvlinops(regression):
    _, _, _, linearization = regression
    ours = MatrixFreeGaussNewton()([linearization])
    b = torch.ones(ours.shape[0], dtype=torch.float64)
    damping = 1e-2
    shift = damping * IdentityLinearOperator(
        [tuple(s) for s in ours.shapes], ours.device, ours.dtype
    )
    theirs = curvlinops.CGInverseLinearOperator(ours + shift, eps=0, tolerance=1e-12, max_iter=500)
    oracles.assert_close(ours.inverse(damping) @ b, theirs @ b, rtol=1e-8)


@pytest.mark.parametrize("kind", ["GGN", "Hessian", "KFAC", "EF"])
def test_curvlinops_operators_as_curvature_of_a_step(kind):
    model, x, y = build("tanh"), points(20), points(20, seed=1)[:, :1]
    loss, batches = nn.MSELoss(), [(x, y)]
    operator = getattr(curvlinops, f"{kind}LinearOperator")

    def curvature(linearizations):
        return operator(model, loss, list(model.parameters()), batches)

    term = LossTerm({"u": Value()}, lambda x, u, y: u - y, Fixed(x), data={"y": y})
    optimizer = CurvatureOptimizer(model.parameters(), curvature, Damped(1.0))
    record = optimizer.step(Objective(model, [term], [x]))
    assert record.accepted
    assert record.new_loss < record.loss


def test_curvlinops_matrix_leads_to_the_same_step():
    x, y, losses = points(20), points(20, seed=1)[:, :1], []
    term = LossTerm({"u": Value()}, lambda x, u, y: u - y, Fixed(x), data={"y": y})
    for theirs in (True, False):
        model = build("tanh")
        operator = curvlinops.GGNLinearOperator(
            model, nn.MSELoss(), list(model.parameters()), [(x, y)]
        )

        def curvature(linearizations, ggn=operator if theirs else None):
            return ggn or FACTOR * MatrixFreeGaussNewton()(linearizations)

        optimizer = CurvatureOptimizer(model.parameters(), curvature, Damped(1e-2))
        losses.append(optimizer.step(Objective(model, [term], [x])).new_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
