"""Objectives of every kind: one term, three terms, chunks, and one of a user's own."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import MatrixFreeGaussNewton, Objective
from pinncurv.linops import CGInverseLinearOperator, Damped
from pinncurv.optim import (
    CurvatureOptimizer,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    LeastSquares,
    LevenbergMarquardt,
    LinearizedLoss,
    QuadraticModel,
    offers,
)
from tests.networks import points
from tests.optim.cases import (
    OPTIMIZERS,
    LeastSquaresFit,
    MatrixOperator,
    flat,
    gram,
    linear_fit,
    network,
    poisson,
    values,
)
from tests.terms import TERMS


@pytest.mark.parametrize("name", ["kfac", "kfac_star", "gauss_newton", "engd_per_layer"])
@pytest.mark.parametrize(
    "terms", [["value"], ["poisson"], ["vector"], ["allen_cahn", "value", "log_fokker_planck"]]
)
def test_any_number_of_terms(terms, name):
    """KFAC merges three terms into two groups."""
    model = network(2, 5, 1)
    batch = [points(7, seed=seed) for seed in range(len(terms))]
    objective = Objective(model, [TERMS[term] for term in terms], batch)
    optimizer = OPTIMIZERS[name](model.parameters())
    losses = []
    for _ in range(2):
        record = optimizer.step(objective)
        assert list(record.term_losses) == terms
        losses.append(record.loss)
    assert losses == sorted(losses, reverse=True)
    assert objective.loss().item() < 0.9 * losses[0]


@pytest.mark.parametrize("name", ["kfac_star", "engd_diagonal", "adaptive_intervals"])
def test_chunks_change_rounding_only(name):
    runs = []
    for chunk_size in (None, 4):
        model = network()
        objective = poisson(model, chunk_size=chunk_size)
        optimizer = OPTIMIZERS[name](model.parameters())
        for _ in range(2):
            record = optimizer.step(objective)
        runs.append((flat(model), record.new_loss))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-6, atol=1e-8)
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1e-6)


def test_a_matrix_free_curvature():
    """Conjugate gradients instead of a factorization, with a report of the iterations."""
    runs = []
    for invert in (Damped(1e-2), ConjugateGradients(1e-2)):
        model = network()
        optimizer = CurvatureOptimizer(model.parameters(), MatrixFreeGaussNewton(), invert)
        records = [optimizer.step(poisson(model, seed=k)) for k in range(3)]
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-8)
    assert "last_records" in records[-1].solver


@dataclass(frozen=True)
class ConjugateGradients:
    """An inverse of one's own."""

    damping: float

    def __call__(self, operator):
        return CGInverseLinearOperator(operator, self.damping)


# --- an objective of a user's own -----------------------------------------------------------------


def curve(parameters):
    """Residuals of a exp(-b t) + c, fitted to data."""
    amplitudes, shift = parameters
    t = torch.linspace(0, 1, 12, dtype=torch.float64)
    return amplitudes[0] * torch.exp(-amplitudes[1] * t) + shift - (2 * torch.exp(-3 * t) + 0.5)


def curve_fit() -> LeastSquaresFit:
    start = torch.tensor([1.0, 1.0], dtype=torch.float64)
    return LeastSquaresFit([nn.Parameter(start), nn.Parameter(0 * start[:1])], curve)


def test_the_protocols_are_all_that_is_asked():
    fit = curve_fit()
    assert isinstance(fit, LeastSquares)
    assert isinstance(fit.linearize(), LinearizedLoss)
    assert not offers(fit, "evaluate")


@pytest.mark.parametrize("step_size", [QuadraticModel(), GridLineSearch(-5)])
@pytest.mark.parametrize("damping", [None, LevenbergMarquardt()])
@pytest.mark.parametrize("momentum", [None, HeavyBall(0.1)])
def test_a_curve_is_fitted(step_size, damping, momentum):
    """A curvlinops operator without an inverse of its own is inverted by conjugate gradients."""
    fit = curve_fit()
    optimizer = CurvatureOptimizer(
        fit.parameters, gram, Damped(1e-6), step_size, momentum=momentum, damping_rule=damping
    )
    for _ in range(15):
        record = optimizer.step(fit)
    assert record.loss < 1e-6
    torch.testing.assert_close(
        flat(fit.parameters), torch.tensor([2, 3, 0.5]).double(), rtol=0.02, atol=0
    )


def test_linear_residuals_are_solved_in_one_step():
    fit = linear_fit(3.0, -1.0, 2.0)
    record = CurvatureOptimizer(fit.parameters, gram, Damped(0.0)).step(fit)
    assert record.step_size == pytest.approx(1)
    assert flat(fit.parameters).abs().max() < 1e-9


class Evaluated(LeastSquaresFit):
    """The same with `evaluate`, which keeps a graph for the linearization."""

    reused = 0

    def evaluate(self):
        residual = self.residual(self.parameters)
        fit = self

        class Evaluation:
            loss = 0.5 * float(residual.detach().square().sum())

            def linearize(self):
                fit.reused += 1
                twin = LeastSquaresFit(fit.parameters, lambda parameters: residual)
                return twin.linearize()

            def is_current(self):
                return True

        return Evaluation()


def test_an_evaluation_may_keep_its_graph():
    fit, plain = Evaluated(curve_fit().parameters, curve), curve_fit()
    assert offers(fit, "evaluate")
    optimizers = [CurvatureOptimizer(f.parameters, gram, Damped(1e-3)) for f in (fit, plain)]
    for _ in range(4):
        record, expected = optimizers[0].step(fit), optimizers[1].step(plain)
        assert record.loss == expected.loss
    assert fit.reused == 3
    torch.testing.assert_close(flat(fit.parameters), flat(plain.parameters), rtol=0, atol=0)


def test_an_inverse_of_ones_own():
    """Neither a dataclass nor from this package."""

    class Scaled:
        damping = 0.5

        def __call__(self, operator):
            eye = torch.eye(len(operator.matrix), dtype=torch.float64)
            return MatrixOperator(eye / self.damping, operator._in_shape, operator._out_shape)

    fit = linear_fit(1.0, -2.0)
    record = CurvatureOptimizer(fit.parameters, gram, Scaled(), FixedStep(0.25)).step(fit)
    assert record.accepted
    assert record.damping == 0.5
    torch.testing.assert_close(flat(fit.parameters), torch.tensor([0.5, -1.0], dtype=torch.float64))


def test_an_inverse_whose_damping_cannot_be_set():
    """Adaptive damping needs one that can, which is said before it matters."""

    class Fixed:
        damping = 0.5

        def __call__(self, operator):
            return operator

    fit = linear_fit(1.0, -2.0)
    with pytest.raises(TypeError, match="dataclass"):
        CurvatureOptimizer(fit.parameters, gram, Fixed(), damping_rule=LevenbergMarquardt())


@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf])
def test_damping_must_be_valid(damping):
    for build in (presets.kfac, presets.kfac_star, presets.engd, presets.gauss_newton):
        with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
            build(network().parameters(), damping=damping)


@pytest.mark.parametrize("momentum", [1.0, -0.1, math.nan, math.inf])
def test_momentum_must_be_below_one(momentum):
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got"):
        HeavyBall(momentum)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got"):
        presets.kfac(network().parameters(), momentum=momentum)


def test_grid_must_not_be_empty():
    with pytest.raises(ValueError, match="first must be at most last, got 1 and 0"):
        GridLineSearch(first=1)


def test_parameters_come_back_after_an_error_in_the_search():
    """The loss may raise at a trial point."""
    fit = curve_fit()
    before = values(fit.parameters)
    original = fit.residual

    def raising(parameters):
        if not torch.equal(parameters[0], before[0]):
            raise RuntimeError("out of the domain")
        return original(parameters)

    fit.residual = raising
    for step_size in (GridLineSearch(), QuadraticModel()):
        optimizer = CurvatureOptimizer(fit.parameters, gram, Damped(1e-3), step_size)
        with pytest.raises(RuntimeError, match="out of the domain"):
            optimizer.step(fit)
        assert all(map(torch.equal, before, values(fit.parameters)))
