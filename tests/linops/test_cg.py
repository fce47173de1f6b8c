"""Conjugate gradients on any linear operator."""

import pytest
import torch
from curvlinops._torch_base import PyTorchLinearOperator

from pinncurv.linops import (
    CGInverseLinearOperator,
    Damped,
    DenseLinearOperator,
    DiagonalLinearOperator,
    conjugate_gradients,
)
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
    operator = DenseLinearOperator(dense, SHAPES) + 2.0 * DiagonalLinearOperator(shaped)
    assert isinstance(operator, PyTorchLinearOperator)
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
