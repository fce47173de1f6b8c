"""Conjugate gradients on any linear operator."""

import math
import warnings

import pytest
import torch

from pinncurv.linops import (
    CGInverseLinearOperator,
    CGNotConverged,
    Damped,
    DenseLinearOperator,
    DiagonalLinearOperator,
    PyTorchLinearOperator,
    SymmetricLinearOperator,
    conjugate_gradients,
)
from pinncurv.linops.cg import RelativeProgress
from tests.conformance import check_operator
from tests.linops.cases import psd

SHAPES = [(2, 3), (2,)]


def test_solves_in_as_many_iterations_as_distinct_eigenvalues(generator):
    Q, _ = torch.linalg.qr(psd(8, generator))
    m = torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    operator = DenseLinearOperator(Q * m @ Q.mT, SHAPES)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    result = conjugate_gradients(operator, b)
    assert result.record.converged
    assert result.record.iterations == 3
    assert len(result.record.residual_norms) == 4
    torch.testing.assert_close(operator @ result.solution, b)


def test_exact_preconditioner_needs_one_iteration(generator):
    operator = DenseLinearOperator(psd(8, generator), SHAPES)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    result = conjugate_gradients(operator, b, damping=0.1, preconditioner=operator.inverse(0.1))
    assert result.record.iterations == 1
    torch.testing.assert_close(result.solution, operator.inverse(0.1) @ b)


def test_operators_of_curvlinops(generator):
    dense, diagonal = psd(8, generator), torch.rand(8, generator=generator, dtype=torch.float64)
    shaped = [diagonal[:6].reshape(2, 3), diagonal[6:]]
    parts = DenseLinearOperator(dense, SHAPES), 2.0 * DiagonalLinearOperator(shaped)
    operator = PyTorchLinearOperator.__add__(*parts)  # a sum of curvlinops' own
    assert not isinstance(operator, SymmetricLinearOperator)
    expected = torch.linalg.inv(dense + 2 * diagonal.diag() + 0.1 * torch.eye(8))
    inverse = CGInverseLinearOperator(operator, 0.1)
    check_operator(inverse, expected, dampings=(), tolerance=1e-8)
    assert isinstance(Damped(0.1)(operator), CGInverseLinearOperator)


def test_zero_right_hand_side(generator):
    operator = DenseLinearOperator(psd(8, generator), SHAPES)
    result = conjugate_gradients(operator, torch.zeros(8, dtype=torch.float64))
    assert result.record.converged
    assert result.record.iterations == 0
    assert not result.solution.any()


def test_iteration_limit_is_reported(generator):
    operator = DenseLinearOperator(psd(8, generator), SHAPES)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    record = conjugate_gradients(operator, b, max_iterations=2).record
    assert record.iterations == 2
    assert not record.converged
    assert record.residual_norm > 1e-10


def test_indefinite_operator_stops_and_is_reported(generator):
    operator = DenseLinearOperator(-psd(8, generator), SHAPES)
    record = conjugate_gradients(operator, torch.ones(8, dtype=torch.float64)).record
    assert not record.converged
    assert record.residual_norm == pytest.approx(1.0)


def test_the_reported_residual_is_the_true_one(generator):
    Q, _ = torch.linalg.qr(psd(8, generator))
    C = Q * torch.logspace(0, -9, 8, dtype=torch.float64) @ Q.mT
    operator = DenseLinearOperator((C + C.mT) / 2, SHAPES)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    result = conjugate_gradients(operator, b, tolerance=1e-12)
    true = (torch.linalg.vector_norm(b - operator @ result.solution) / b.norm()).item()
    assert result.record.residual_norm == pytest.approx(true, rel=0.2)


# --- iterates, starts, stops ----------------------------------------------------------------------


def krylov_minimizers(A, b, P, x0, count):
    """Minimize φ over x0 + span{Pr, PAPr, …, (PA)^(k-1) Pr} with r = b - A x0, for k < count."""
    minimizers, K = [x0], (P @ (b - A @ x0))[:, None]
    for _ in range(1, count):
        K, _ = torch.linalg.qr(K)
        minimizers.append(x0 + K @ torch.linalg.solve(K.mT @ A @ K, K.mT @ (b - A @ x0)))
        K = torch.cat([K, P @ (A @ K[:, -1:])], 1)
    return minimizers


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("warm", [False, True])
def test_iterates_minimize_over_krylov_spaces(generator, preconditioned, warm):
    eye = torch.eye(8, dtype=torch.float64)
    C, M = psd(8, generator), psd(8, generator) + eye
    A, P = C + 0.1 * eye, M if preconditioned else eye
    b, x0 = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    result = conjugate_gradients(
        DenseLinearOperator(C, SHAPES),
        b,
        damping=0.1,
        preconditioner=DenseLinearOperator(M, SHAPES) if preconditioned else None,
        max_iterations=6,
        start=x0 if warm else None,
        spacing=1.3,
    )
    start = x0 if warm else torch.zeros_like(b)
    expected = krylov_minimizers(A, b, P, start, 7)
    assert [iterate.iteration for iterate in result.iterates] == [1, 2, 3, 4, 5, 6]
    for iterate in result.iterates:
        x = expected[iterate.iteration]
        torch.testing.assert_close(iterate.solution, x, rtol=1e-8, atol=1e-9)
        assert iterate.value == pytest.approx((0.5 * x @ A @ x - b @ x).item(), rel=1e-9)
        assert result.record.values[iterate.iteration] == iterate.value
    assert torch.equal(result.iterates[-1].solution, result.solution)
    phi0 = (0.5 * start @ A @ start - b @ start).item()
    assert result.record.values[0] == pytest.approx(phi0, rel=1e-12)
    residual = (b - A @ result.solution).norm() / b.norm()
    assert result.record.residual_norm == pytest.approx(residual.item(), rel=1e-9)


def test_spacing_of_the_iterates(generator):
    operator = DenseLinearOperator(psd(40, generator), [(40,)])
    b = torch.randn(40, generator=generator, dtype=torch.float64)
    result = conjugate_gradients(operator, b, max_iterations=30, spacing=1.5)
    expected = sorted({math.ceil(1.5**j) for j in range(9)} | {30})
    assert [iterate.iteration for iterate in result.iterates] == expected
    only_last = conjugate_gradients(operator, b, max_iterations=30).iterates
    assert [iterate.iteration for iterate in only_last] == [30]
    with pytest.raises(ValueError, match="spacing must be greater than 1, got 1"):
        conjugate_gradients(operator, b, spacing=1.0)


def test_a_start_is_a_solve_for_the_difference(generator):
    C = psd(8, generator)
    inverse = CGInverseLinearOperator(
        DenseLinearOperator(C, SHAPES), 0.1, max_iterations=3, truncated=True
    )
    b, x0 = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    split = [(part[:6].reshape(2, 3), part[6:]) for part in (b, x0)]
    received = torch.cat([part.flatten() for part in inverse.solve_from(*split)])
    assert torch.equal(received, inverse.last_results[0].solution)
    difference = inverse @ (b - C @ x0 - 0.1 * x0)
    torch.testing.assert_close(received, x0 + difference, rtol=1e-12, atol=1e-12)


def test_a_solution_as_start_needs_no_iteration(generator):
    operator = DenseLinearOperator(psd(8, generator), SHAPES)
    b = torch.randn(8, generator=generator, dtype=torch.float64)
    x = operator.inverse(0.1) @ b
    result = conjugate_gradients(operator, b, damping=0.1, start=x)
    assert result.record.iterations == 0
    assert result.record.converged
    assert torch.equal(result.solution, x)


def test_truncation_keeps_progress_where_the_residual_has_grown():
    """The first iteration lowers φ but raises ‖r‖ fivefold; the solution must not be dropped."""
    operator = DenseLinearOperator(torch.diag(torch.tensor([1.0, 100.0])).double(), [(2,)])
    b = torch.tensor([1.0, 0.1], dtype=torch.float64)
    result = conjugate_gradients(operator, b, max_iterations=1)
    assert result.record.residual_norm > 4
    torch.testing.assert_close(result.solution, b * (b @ b) / (b @ (operator @ b)))
    assert result.record.values[-1] < 0


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([0.0, -1.0, -2.0, -3.0], False),  # fewer than lag iterations
        ([0.0, -1.0, -2.0, -2.1, -2.15, -2.18], True),  # 0.08 in 2, of 2.18: 0.018 each
        ([0.0, -1.0, -2.0, -2.1, -2.2, -2.3], False),  # 0.043 each
        ([9.0, 8.0, 7.01, 7.005, 7.004, 7.0], False),  # above the value at zero
        ([0.0, math.nan, math.nan, math.nan, math.nan, math.nan], False),
    ],
)
def test_relative_progress(values, stops):
    assert RelativeProgress(epsilon=0.02, lag=2)(values) is stops


def test_relative_progress_looks_back_a_fraction():
    """At iteration 40 with a fraction of a half, over the last 20."""
    values = [-float(min(i, 25)) for i in range(41)]  # no progress in the last 15
    assert RelativeProgress(1e-2, lag=10)(values)
    assert not RelativeProgress(1e-2, lag=10, fraction=0.5)(values)


@pytest.mark.parametrize("bad", [{"epsilon": 0.0}, {"lag": 0}, {"fraction": 1.0}])
def test_bad_progress(bad):
    with pytest.raises(ValueError, match="0 < epsilon < inf, lag >= 1 and 0 <= fraction < 1, got"):
        RelativeProgress(**bad)


def test_a_rule_ends_the_iteration(generator):
    """At the first iteration at which it holds, with a record and without a warning if intended."""
    Q, _ = torch.linalg.qr(psd(40, generator))
    C = Q * torch.logspace(0, -6, 40, dtype=torch.float64) @ Q.mT
    operator, rule = DenseLinearOperator((C + C.mT) / 2, [(40,)]), RelativeProgress(0.01, lag=3)
    b = torch.randn(40, generator=generator, dtype=torch.float64)
    inverse = CGInverseLinearOperator(operator, 1e-6, stop=rule, truncated=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = inverse @ b
    (record,) = inverse.last_records
    stops = [rule(record.values[: k + 1]) for k in range(len(record.values))]
    assert stops == [False] * record.iterations + [True]
    assert not record.converged
    plain = conjugate_gradients(operator, b, damping=1e-6, max_iterations=record.iterations)
    assert torch.equal(plain.solution, solution)
    with pytest.warns(CGNotConverged, match="must reach a relative residual"):
        CGInverseLinearOperator(operator, 1e-6, stop=rule) @ b


def test_damped_solves_for_an_operator_without_an_inverse():
    """A subclass with nothing but ``_matmat`` is enough."""

    class Twice(SymmetricLinearOperator):
        def _matmat(self, X):
            return [2 * x for x in X]

    operator = Twice([(3,)], torch.device("cpu"), torch.float64)
    x = torch.arange(3, dtype=torch.float64)
    torch.testing.assert_close(Damped(1.0)(operator) @ x, x / 3)
