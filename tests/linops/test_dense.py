"""Operators that are given by their entries."""

import math
from itertools import pairwise

import pytest
import torch

from pinncurv.linops import (
    Damped,
    DampingBelowResolution,
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    FactorizationError,
    KroneckerBasis,
    KroneckerEigenLinearOperator,
    PseudoInverse,
    flat_positions,
)
from tests.conformance import check_operator
from tests.linops.cases import STRUCTURES, layers, psd


def dense(widths, bias, generator, rank=None):
    _, shapes = layers(widths, bias)
    D = sum(torch.Size(shape).numel() for shape in shapes)
    return DenseLinearOperator(psd(D, generator, rank), shapes)


def block_diagonal(widths, bias, generator, rank=None):
    blocks, shapes = layers(widths, bias)
    matrices = [psd(block.numel, generator, rank) for block in blocks]
    return DenseBlockDiagonalLinearOperator(matrices, blocks, shapes)


def diagonal(widths, bias, generator, rank=None):
    _, shapes = layers(widths, bias)
    entries = [torch.rand(s, generator=generator, dtype=torch.float64) for s in shapes]
    return DiagonalLinearOperator(entries if rank is None else [0 * entry for entry in entries])


def eigenform(widths, bias, generator, rank=None):
    blocks, shapes = layers(widths, bias)
    bases, scales = [], []
    for block in blocks:
        (QA, _), (QB, _) = (torch.linalg.qr(psd(n, generator)) for n in reversed(block.shape))
        bases.append(KroneckerBasis(QA, QB))
        scale = torch.rand(block.shape, generator=generator, dtype=torch.float64)
        scales.append(scale if rank is None else 0 * scale)
    return KroneckerEigenLinearOperator(bases, scales, blocks, shapes)


EVERY = [dense, block_diagonal, diagonal, eigenform]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("build", EVERY)
def test_conformance(build, structure, generator):
    check_operator(build(*structure, generator))


@pytest.mark.parametrize("build", EVERY)
def test_conformance_of_singular_operators(build, generator):
    check_operator(build([2, 3, 1], True, generator, rank=1))


@pytest.mark.parametrize("build", [dense, block_diagonal, diagonal])
def test_conformance_in_float32(build, generator):
    operator = build([2, 3, 1], True, generator)
    check_operator(operator.with_tensors([tensor.float() for tensor in operator.tensors()]))


@pytest.mark.parametrize("build", EVERY)
def test_inverse_without_damping(build, generator):
    operator = build([2, 3, 1], True, generator)
    x = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(Damped(0.0)(operator) @ (operator @ x), x, rtol=1e-6, atol=1e-6)
    with pytest.raises(FactorizationError, match="Pass damping > 0"):
        build([2, 3, 1], True, generator, rank=1).inverse(0.0)


@pytest.mark.parametrize("build", [dense, block_diagonal, diagonal])
def test_averaging_protocol(build, generator):
    operator = build([2, 3, 1], True, generator)
    identity = torch.eye(operator.shape[0], dtype=torch.float64)
    assert torch.equal(operator.identity().to_dense(), identity)
    same = operator.with_tensors(operator.tensors())
    assert torch.equal(same.to_dense(), operator.to_dense())
    doubled = operator.with_tensors([2 * tensor for tensor in operator.tensors()])
    torch.testing.assert_close(doubled.to_dense(), 2 * operator.to_dense())


def test_one_eigendecomposition_serves_all_dampings(generator, monkeypatch):
    calls = []
    original = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: calls.append(1) or original(*a))
    operator = dense([2, 3, 1], True, generator)
    for damping in (1e-3, 1e-2):
        operator.inverse(damping)
    assert len(calls) == 1
    m, V = operator.eigh.eigenvalues, operator.eigh.eigenvectors
    torch.testing.assert_close(V * m @ V.mT, operator.matrix)


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("build", [dense, block_diagonal])
def test_large_matrices_are_factorized_by_cholesky(build, rank, generator, monkeypatch):
    operator = build([2, 3, 1], True, generator, rank)
    expected = {damping: operator.inverse(damping).to_dense() for damping in (1e-8, 1e-2)}
    monkeypatch.setattr("pinncurv.linops.policy.LARGEST_EIGH", 0)
    fresh = operator.with_tensors(operator.tensors())
    with monkeypatch.context() as patch:
        patch.setattr("torch.linalg.eigh", lambda *_: pytest.fail("a slow eigendecomposition"))
        for damping, inverse in expected.items():
            received = fresh.inverse(damping)
            assert {report.method for report in received.reports} == {"cholesky"}
            torch.testing.assert_close(received.to_dense(), inverse, rtol=1e-7, atol=1e-7 / damping)
    if rank is None:
        check_operator(operator.with_tensors(operator.tensors()))
    else:
        with pytest.raises(FactorizationError, match="Pass damping > 0"):
            fresh.inverse(0.0)


def test_where_cholesky_fails_one_eigendecomposition_serves_all_dampings(generator, monkeypatch):
    """The smallest eigenvalue is below zero by rounding, and the damping is smaller than that."""
    C = psd(12, generator, rank=3)
    C -= 1e-10 * torch.eye(12, dtype=C.dtype)
    calls = []
    original = torch.linalg.eigh
    monkeypatch.setattr("pinncurv.linops.policy.LARGEST_EIGH", 0)
    monkeypatch.setattr(torch.linalg, "eigh", lambda *a: calls.append(1) or original(*a))
    operator = DenseLinearOperator(C, [(12,)])
    for damping in (1e-14, 1e-12):
        m = torch.linalg.eigvalsh(operator.inverse(damping).to_dense())
        assert m.min() > 0
        assert m.max() == pytest.approx(1 / damping, rel=1e-6)
    assert len(calls) == 1


def test_blocks_of_dense_in_joint_order(generator):
    operator = block_diagonal([2, 3, 1], True, generator)
    full = operator.to_dense()
    for position, matrix in zip(
        flat_positions(operator.blocks, operator.shapes), operator.matrices, strict=True
    ):
        assert torch.equal(full[position][:, position], matrix)
    kept = sum(int(matrix.numel()) for matrix in operator.matrices)
    assert int((full != 0).sum()) <= kept


def test_shapes_must_fit(generator):
    with pytest.raises(ValueError, match=r"matrix must have shape \(6, 6\).*got \(5, 5\)"):
        DenseLinearOperator(psd(5, generator), [(2, 3)])
    blocks, shapes = layers([2, 3])
    with pytest.raises(ValueError, match=r"shapes \[\(9, 9\)\], got \[\(6, 6\)\]"):
        DenseBlockDiagonalLinearOperator([psd(6, generator)], blocks, shapes)


@pytest.mark.parametrize("build", [dense, block_diagonal, diagonal])
def test_nonfinite_entries(build, generator):
    operator = build([2, 3, 1], True, generator)
    operator.tensors()[-1].view(-1)[0] = float("nan")
    with pytest.raises(FactorizationError, match="must be finite"):
        operator.inverse(1e-3)


def test_inverse_decreases_with_damping(generator):
    operator = dense([2, 3, 1], True, generator, rank=3)
    traces = [operator.inverse(damping).trace() for damping in (1e-12, 1e-6, 1.0)]
    assert all(first > second for first, second in pairwise(traces))


def test_which_matrices_are_large(generator):
    """Without damping there is no Cholesky factorization, whatever the size."""
    for n, damping, method in ((1024, 1.0, "eigh"), (1025, 1.0, "cholesky"), (1025, 0.0, "eigh")):
        operator = DenseLinearOperator(torch.eye(n, dtype=torch.float64), [(n,)])
        assert operator.inverse(damping).reports[0].method == method


@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_a_damping_below_the_resolution_warns(factor, generator):
    """Rounding of C is some ε tr C, in the data type that C comes in; the number would do."""
    C = dense([2, 3, 1], True, generator)
    C = DenseLinearOperator(factor * C.matrix.float(), C.shapes)
    enough = 10.0 ** math.ceil(math.log10(torch.finfo(torch.float32).eps * float(C.trace())))
    with pytest.warns(DampingBelowResolution, match=f"Pass {enough:.0e}, or parameters"):
        Damped(enough / 1e3)(C)
    Damped(enough)(C)  # warnings are errors here
    Damped(enough / 1e3)(DenseLinearOperator(C.matrix.double(), C.shapes))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("build", [dense, block_diagonal, diagonal])
def test_the_pseudo_inverse_solves_least_squares_of_least_norm(build, rank, generator):
    operator = build((2, 3, 1), True, generator, rank)
    inverse = PseudoInverse()(operator)
    C, got = operator.to_dense(), inverse.to_dense()
    # an independent route: the singular values of the whole matrix
    torch.testing.assert_close(got, torch.linalg.pinv(C, rtol=1e-12), rtol=1e-6, atol=1e-9)
    if rank is None:
        torch.testing.assert_close(got, Damped(0.0)(operator).to_dense(), rtol=1e-8, atol=1e-10)


def test_the_tolerance_of_a_pseudo_inverse_drops_small_eigenvalues(generator):
    operator = DiagonalLinearOperator([torch.tensor([4.0, 2.0, 1e-3, 0.0], dtype=torch.float64)])
    expected = torch.tensor([0.25, 0.5, 0, 0], dtype=torch.float64)
    assert torch.equal(PseudoInverse(1e-2)(operator).diagonal(), expected)
    matrix = DenseLinearOperator(operator.to_dense(), [(4,)])
    inverse = PseudoInverse(1e-2)(matrix)
    torch.testing.assert_close(inverse.diagonal(), expected)
    (report,) = inverse.reports
    assert (report.method, report.clipped) == ("pseudo-inverse by eigh", 2)
    for exactly in (operator, matrix):  # 2 = 0.5 · 4 is kept
        torch.testing.assert_close(PseudoInverse(0.5)(exactly).diagonal(), expected)


@pytest.mark.parametrize("tolerance", [None, 0.0, 0.5])
def test_the_pseudo_inverse_of_zero_is_zero(tolerance):
    zero = torch.zeros(3, 3, dtype=torch.float64)
    inverse = PseudoInverse(tolerance)(DenseLinearOperator(zero, [(3,)]))
    assert torch.equal(inverse.to_dense(), zero)
    assert inverse.reports[0].clipped == 3
    of_diagonal = PseudoInverse(tolerance)(DiagonalLinearOperator([zero]))
    assert not of_diagonal.diagonal().any()


def test_small_entries_of_a_diagonal_are_no_rounding():
    entries = torch.logspace(0, -30, 10_000, dtype=torch.float32)
    inverse = PseudoInverse()(DiagonalLinearOperator([entries]))
    torch.testing.assert_close(inverse.diagonal(), entries.reciprocal())


def test_a_pseudo_inverse_refuses_what_it_cannot_invert(generator):
    with pytest.raises(TypeError, match=r"operator of dense matrices, .* got KroneckerEigen"):
        PseudoInverse()(eigenform((2, 3, 1), True, generator))
    for bad in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=r"tolerance must be in \[0, 1\), got"):
            PseudoInverse(bad)
    huge = torch.full((2, 2), 1e308, dtype=torch.float64)  # the larger eigenvalue is 2e308
    with pytest.raises(FactorizationError, match="must have finite eigenvalues"):
        PseudoInverse()(DenseLinearOperator(huge, [(2,)]))
    tiny = 1e-40 * torch.eye(2)  # whose reciprocal is no float32
    assert not PseudoInverse()(DenseLinearOperator(tiny, [(2,)])).to_dense().any()
    nan = torch.full((4,), math.nan, dtype=torch.float64)
    for operator in (DiagonalLinearOperator([nan]), DenseLinearOperator(nan.diag(), [(4,)])):
        with pytest.raises(FactorizationError, match="must be finite"):
            PseudoInverse()(operator)
