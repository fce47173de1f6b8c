"""The exact Gauss-Newton step by conjugate gradients with any other curvature in front."""

import warnings

import pytest
import torch

from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    Deflated,
    DiagonalGaussNewton,
    GaussNewton,
    GaussNewtonLinearOperator,
    MatrixFreeGaussNewton,
    SubspaceGaussNewton,
    pivoted_points,
)
from pinncurv.curvature.ekfac import EKFAC
from pinncurv.curvature.iterative import PreconditionedCG
from pinncurv.linops import Damped, DenseLinearOperator, FactorDamping, trace_norm
from pinncurv.presets import gauss_newton_cg
from tests import oracles
from tests.conformance import check_operator
from tests.optim.cases import flat, network, poisson

EXACT = {"tolerance": 1e-12, "max_iterations": None, "stop": None}
PRECONDITIONERS = {
    "none": (None, Damped(1e-6)),
    "diagonal": (DiagonalGaussNewton(), Damped(1e-6)),
    "blocks": (BlockDiagonalGaussNewton(), Damped(1e-6)),
    "kfac": (KFAC(), Damped(1e-6)),
    "kfac, damped factors": (KFAC(), FactorDamping(1e-4, trace_norm)),
    "ekfac": (EKFAC(), Damped(1e-6)),
    "subspace": (SubspaceGaussNewton(4), Damped(1e-6)),
    "coarse points": (SubspaceGaussNewton(4, choice=pivoted_points), Deflated(1e-6)),
}


def linearized(*widths, chunk_size=None, dtype=torch.float64):
    model = network(*(widths or (2, 5, 4, 1)), dtype=dtype)
    return poisson(model, chunk_size=chunk_size).linearize()


def operator(of) -> GaussNewtonLinearOperator:
    return MatrixFreeGaussNewton()(of.linearizations)


@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_solution_against_a_dense_solve(name):
    """Whatever the preconditioner, with the matrix of an oracle that shares no code."""
    model = network(2, 5, 4, 1)
    objective = poisson(model)
    C = oracles.gauss_newton(objective.terms, model, objective.points)
    curvature, inverse = PRECONDITIONERS[name]
    solver = PreconditionedCG(1e-3, curvature, inverse, **EXACT)(operator(objective.linearize()))
    damped = C + 1e-3 * torch.eye(len(C), dtype=C.dtype)
    b = flat(objective.linearize().gradient())
    torch.testing.assert_close(solver @ b, torch.linalg.solve(damped, b), rtol=1e-8, atol=1e-10)
    (record,) = solver.last_records
    assert record.converged
    assert record.residual_norm <= 1e-12


@pytest.mark.slow
def test_conformance():
    solver = PreconditionedCG(1e-2, **EXACT)(operator(linearized(2, 3, 1)))
    dense = operator(linearized(2, 3, 1)).to_dense()
    expected = torch.linalg.inv(dense + 1e-2 * torch.eye(len(dense), dtype=dense.dtype))
    check_operator(solver, expected, dampings=(), tolerance=1e-8)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
def test_the_exact_inverse_needs_one_iteration(damping):
    recipe = PreconditionedCG(damping, GaussNewton(), Damped(0.0), tolerance=1e-8, stop=None)
    of = linearized()
    solver = recipe(operator(of))
    solver @ flat(of.gradient())
    (record,) = solver.last_records
    assert record.iterations == 1
    assert record.converged


@pytest.mark.parametrize(("damping", "expected"), [(1e-6, 1e-4), (1e-2, 1e-2)])
def test_the_preconditioner_follows_the_damping_upwards(damping, expected):
    of = linearized()
    for curvature, inverse in ((KFAC(), Damped), (KFAC(), FactorDamping), (EKFAC(), Damped)):
        recipe = PreconditionedCG(damping, curvature, inverse(1e-4))
        P = recipe.preconditioner(operator(of))
        b = flat(of.gradient())
        assert torch.equal(P @ b, inverse(expected)(curvature(of.linearizations)) @ b)


@pytest.mark.slow
def test_kronecker_factors_speed_up_the_solve():
    """Half of the iterations of none or of the diagonal to 99 % of the decrease."""
    of = linearized(2, 24, 24, 1)
    iterations = {}
    for name, (curvature, inverse) in PRECONDITIONERS.items():
        solver = PreconditionedCG(1e-6, curvature, inverse, max_iterations=60, stop=None)(
            operator(of)
        )
        solver @ flat(of.gradient())
        values = solver.last_records[0].values
        best = -0.5 * flat(of.gradient()) @ (operator(of).inverse(1e-6) @ flat(of.gradient()))
        done = [k for k, value in enumerate(values) if value <= 0.99 * best.item()]
        iterations[name] = done[0] if done else len(values)
    for name in ("kfac", "ekfac"):
        assert 2 * iterations[name] <= min(iterations["none"], iterations["diagonal"]), iterations


def test_truncation_is_recorded_and_no_warning():
    of = linearized()
    solver = PreconditionedCG(1e-8, max_iterations=3, stop=None, spacing=1.3)(operator(of))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver @ flat(of.gradient())
    (record,) = solver.last_records
    assert (record.iterations, record.converged) == (3, False)
    assert len(record.values) == len(record.residual_norms) == 4
    assert list(record.values) == sorted(record.values, reverse=True)
    assert [iterate.iteration for iterate in solver.last_results[0].iterates] == [1, 2, 3]


@pytest.mark.parametrize("chunk_size", [1, 5])
def test_chunks_change_nothing(chunk_size):
    b = flat(linearized().gradient())
    whole, chunked = (
        PreconditionedCG(1e-3, max_iterations=4, stop=None)(operator(linearized(chunk_size=size)))
        for size in (None, chunk_size)
    )
    torch.testing.assert_close(chunked @ b, whole @ b, rtol=1e-8, atol=1e-12)


def test_float32():
    of = linearized(dtype=torch.float32)
    solver = PreconditionedCG(1e-3, inverse=FactorDamping(1e-4), tolerance=1e-2, stop=None)(
        operator(of)
    )
    b = flat(of.gradient())
    x = solver @ b
    assert x.dtype == torch.float32
    expected = DenseLinearOperator(operator(of).to_dense().double(), of.jacobian.space.shapes)
    residual = b.double() - expected @ x.double() - 1e-3 * x.double()
    assert residual.norm() <= 1.1e-2 * b.norm()
    assert solver.last_records[0].converged


def test_another_operator_has_no_linearizations():
    dense = GaussNewton()(linearized().linearizations)
    with pytest.raises(TypeError, match=r"of a GaussNewtonLinearOperator, got DenseLinearOperator"):
        PreconditionedCG(1e-3)(dense)
    x = PreconditionedCG(1e-3, curvature=None, **EXACT)(dense) @ flat(linearized().gradient())
    assert x.isfinite().all()


def test_damping_must_be_valid():
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        PreconditionedCG(-1.0)


def test_chunks_change_rounding_only():
    """A truncated solve with KFAC's ill-conditioned inverse ends in the same place, to 1e-7."""
    ends = []
    for chunk_size in (None, 3):
        model = network(2, 12, 12, 1)
        objective = poisson(model, chunk_size=chunk_size, n=30)
        record = gauss_newton_cg(model.parameters()).step(objective)
        assert record.solver["last_records"][0].residual_norm > 1e-5  # it is truncated
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-7, atol=1e-7)
