"""Sums of Kronecker products, and their inverses with damping."""

import math

import pytest
import torch
from curvlinops import CGInverseLinearOperator as CurvlinopsCGInverse

from pinncurv.linops import (
    BlockFactorizedInverseLinearOperator,
    CGInverseLinearOperator,
    CGNotConverged,
    Damped,
    FactorizationError,
    KroneckerEigenLinearOperator,
    KroneckerFactors,
    SumKroneckerLinearOperator,
    trace_norm,
)
from pinncurv.linops.kronecker_inverse import cg_inverse
from tests.conformance import check_operator
from tests.linops.cases import STRUCTURES, kronecker, kronecker_oracle, layers, psd


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_conformance(structure, T, generator):
    widths, bias = structure
    operator = kronecker(widths, T, generator, bias)
    check_operator(operator, kronecker_oracle(operator))


@pytest.mark.parametrize("T", [1, 2])
def test_conformance_of_singular_factors(T, generator):
    operator = kronecker(
        [3, 4, 1], T, generator, factor=lambda n, g: psd(n, g, rank=1 if n > 1 else None)
    )
    check_operator(operator, kronecker_oracle(operator))


@pytest.mark.parametrize("T", [1, 2])
def test_conformance_in_float32(T, generator):
    operator = kronecker([2, 3, 1], T, generator, dtype=torch.float32)
    check_operator(operator, kronecker_oracle(operator))


def test_conformance_of_conjugate_gradients(generator):
    operator = kronecker([2, 3, 1], 3, generator)
    dense = kronecker_oracle(operator)
    for damping in (1e-3, 1.0):
        inverse = cg_inverse(operator, damping)
        expected = torch.linalg.inv(dense + damping * torch.eye(len(dense)))
        check_operator(inverse, expected, dampings=(), tolerance=1e-8)
        assert all(record.converged for record in inverse.last_records)


def test_conjugate_gradients_in_float32_iterate_in_float64(generator):
    operator = kronecker([2, 3, 1], 2, generator, dtype=torch.float32)
    inverse = cg_inverse(operator, 1e-3)
    x = inverse @ torch.ones(operator.shape[0])
    assert x.dtype == torch.float32
    assert inverse.last_records[0].residual_norm <= 1e-10
    torch.testing.assert_close(x, operator.inverse(1e-3) @ torch.ones(operator.shape[0]))


def test_missed_tolerance_is_a_warning_with_a_record(generator):
    operator = kronecker([4, 5, 3], 2, generator, factor=lambda n, g: psd(n, g, rank=1))
    inverse = cg_inverse(operator, 1e-12)
    b = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    with pytest.warns(CGNotConverged, match=r"must reach a relative residual of 1.0e-10, reached"):
        x = inverse @ b
    assert x.isfinite().all()
    assert not inverse.last_records[0].converged


def test_preconditioner_saves_iterations(generator):
    def steep(n, g):
        Q, _ = torch.linalg.qr(psd(n, g))
        return Q * torch.logspace(0, -8, n, dtype=torch.float64) @ Q.mT

    operator = kronecker([20, 20], 2, generator, factor=steep)
    b = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    preconditioned = cg_inverse(operator, 1e-4)
    plain = CGInverseLinearOperator(operator, 1e-4)
    assert preconditioned.solve(b).record.iterations < plain.solve(b).record.iterations


def test_kinds_of_inverse(generator, monkeypatch):
    assert isinstance(kronecker([2, 3], 1, generator).inverse(0.1), KroneckerEigenLinearOperator)
    operator = kronecker([2, 3], 2, generator)
    assert isinstance(Damped(0.1)(operator), BlockFactorizedInverseLinearOperator)
    monkeypatch.setattr("pinncurv.linops.policy.LARGEST_BLOCK", 8)
    assert isinstance(Damped(0.1)(operator), CGInverseLinearOperator)


@pytest.mark.parametrize("T", [1, 2])
def test_inverse_without_damping(T, generator):
    operator = kronecker([2, 3, 1], T, generator)
    x = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(operator @ (operator.inverse(0.0) @ x), x, rtol=1e-8, atol=1e-8)
    singular = kronecker([2, 3, 1], T, generator, factor=lambda n, g: psd(n, g, rank=1))
    with pytest.raises(FactorizationError, match=r"layer net\.0.*nonsingular.*Pass damping > 0"):
        singular.inverse(0.0)


def test_terms(generator):
    operator = kronecker([2, 3, 1], 3, generator)
    total = sum(operator.term(name).to_dense() for name in operator.terms)
    torch.testing.assert_close(total, operator.to_dense())
    assert operator.term(1).terms == ("boundary",)
    assert operator.term("boundary").factors[0][0] is operator.factors[0][1]
    with pytest.raises(KeyError, match="term must be one of"):
        operator.term("interface")
    with pytest.raises(KeyError, match="or a position, got 3"):
        operator.term(3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("T", [1, 2])
def test_nonfinite_factor_is_named(bad, T, generator):
    operator = kronecker([2, 3, 1], T, generator)
    operator.factors[1][T - 1].A[0, 1] = bad
    term = operator.terms[T - 1]
    with pytest.raises(
        FactorizationError, match=rf"layer net\.2, term {term}, factor A must be finite, got 1"
    ):
        operator.inverse(1e-3)


def test_averaging_protocol(generator):
    operator = kronecker([2, 3, 1], 2, generator)
    torch.testing.assert_close(
        operator.with_tensors(operator.tensors()).to_dense(), operator.to_dense(), rtol=0, atol=0
    )
    identity = operator.identity()
    assert all(torch.equal(M, torch.eye(len(M)).to(M)) for M in identity.tensors())
    assert identity.terms == operator.terms
    torch.testing.assert_close(
        identity.to_dense(), 2 * torch.eye(operator.shape[0], dtype=torch.float64)
    )


def test_factors_must_fit(generator):
    blocks, shapes = layers([2, 3])
    good = KroneckerFactors(psd(3, generator), psd(3, generator))
    with pytest.raises(ValueError, match=r"net\.0, term 0 must have shapes \(3, 3\) and \(3, 3\)"):
        SumKroneckerLinearOperator([[KroneckerFactors(psd(2, generator), good.B)]], blocks, shapes)
    with pytest.raises(ValueError, match=r"factors for each of the 1 layers .* got 2 layers"):
        SumKroneckerLinearOperator([[good], [good]], blocks, shapes)
    with pytest.raises(ValueError, match=r"the terms \('a', 'b'\), got 1 layers with \[1\] terms"):
        SumKroneckerLinearOperator([[good]], blocks, shapes, ["a", "b"])


def test_interoperates_with_curvlinops(generator):
    one, two = kronecker([2, 3, 1], 1, generator), kronecker([2, 3, 1], 2, generator)
    C1, C2 = one.to_dense(), two.to_dense()
    x = torch.randn(len(C1), generator=generator, dtype=torch.float64)
    torch.testing.assert_close((one + two) @ x, (C1 + C2) @ x)
    torch.testing.assert_close((one - 2.0 * two) @ x, (C1 - 2 * C2) @ x)
    torch.testing.assert_close((one @ two) @ x, C1 @ (C2 @ x))
    torch.testing.assert_close((one @ two).adjoint() @ x, C2 @ (C1 @ x))
    identity = one.with_tensors(one.identity().tensors())
    inverse = CurvlinopsCGInverse(two + 0.1 * identity, eps=0, tolerance=1e-11)
    torch.testing.assert_close(inverse @ x, two.inverse(0.1) @ x, rtol=1e-7, atol=1e-7)


def test_trace_norm_is_invariant_to_moving_scale_between_factors(generator):
    pair = KroneckerFactors(psd(3, generator), psd(4, generator))
    moved = KroneckerFactors(pair.A * 100, pair.B / 100)
    dampings, scaled = trace_norm(pair, 1e-3), trace_norm(moved, 1e-3)
    assert math.isclose(dampings.A * dampings.B, 1e-3)
    assert math.isclose(scaled.A, 100 * dampings.A)
    assert math.isclose(scaled.B, dampings.B / 100)
