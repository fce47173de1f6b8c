"""Preconditioned spectra, against the eigenvalues of the unsymmetric product."""

import pytest
import torch

from pinncurv.comparison import generalized_extremes, generalized_spectrum
from pinncurv.linops import DenseLinearOperator
from tests.comparison.cases import MatrixFree, decaying, kronecker, psd, with_eigenvalues


@pytest.mark.parametrize("damping", [1e-6, 1.0])
@pytest.mark.parametrize("rank", [None, 3])
def test_dense(damping, rank, generator):
    C, W = psd(10, generator, rank), psd(10, generator)
    product = W @ (C + damping * torch.eye(10))
    expected = torch.linalg.eigvals(product).real.sort(descending=True).values
    operator, inverse = DenseLinearOperator(C, [(10,)]), DenseLinearOperator(W, [(10,)])
    received = generalized_spectrum(operator, inverse, damping)
    torch.testing.assert_close(received, expected, rtol=1e-9, atol=1e-9 * expected[0])
    ends = generalized_extremes(
        MatrixFree(C), MatrixFree(W), damping, steps=10, generator=generator
    )
    assert ends.largest == pytest.approx(expected[0].item(), rel=1e-9)
    assert ends.smallest == pytest.approx(expected[-1].item(), rel=1e-5)
    condition = (expected[0] / expected[-1]).item()
    assert ends.condition_number == pytest.approx(condition, rel=1e-5)


def test_without_damping_a_singular_operator_stays_singular(generator):
    C, W = psd(10, generator, rank=3), psd(10, generator)
    received = generalized_spectrum(
        DenseLinearOperator(C, [(10,)]), DenseLinearOperator(W, [(10,)]), 0.0
    )
    assert bool((received[:3] > 1e-3).all())
    assert received[3:].abs().max() < 1e-12


def test_layer_by_layer(generator, monkeypatch):
    C, P = kronecker([3, 4, 2], 2, generator), kronecker([3, 4, 2], 1, generator)
    W = P.inverse(0.1)
    expected = torch.linalg.eigvals(W.to_dense() @ (C.to_dense() + 0.1 * torch.eye(26))).real
    for operator in (C, W):
        monkeypatch.setattr(type(operator), "to_dense", MatrixFree.to_dense)
    received = generalized_spectrum(C, W, 0.1)
    torch.testing.assert_close(received, expected.sort(descending=True).values)


def test_the_exact_inverse_gives_ones(generator):
    C = DenseLinearOperator(with_eigenvalues(decaying(20, 12), generator), [(20,)])
    received = generalized_spectrum(C, C.inverse(1e-6), 1e-6)
    torch.testing.assert_close(received, torch.ones(20).double(), rtol=0, atol=1e-7)
    ends = generalized_extremes(C, C.inverse(1e-6), 1e-6, steps=5, generator=generator)
    assert ends.condition_number == pytest.approx(1, abs=1e-6)


def test_the_ends_are_approached_from_inside(generator):
    m = decaying(200, 3)
    C = with_eigenvalues(m, generator)
    W = DenseLinearOperator((m.mean() * torch.ones(200).double()).diag(), [(200,)])
    expected = generalized_spectrum(DenseLinearOperator(C, [(200,)]), W, 1e-2)
    previous = 1.0
    for steps in (5, 15, 40):
        operator = MatrixFree(C, widest=1)
        ends = generalized_extremes(
            operator, W, 1e-2, steps=steps, generator=torch.Generator().manual_seed(0)
        )
        assert previous < ends.condition_number <= (expected[0] / expected[-1]) * (1 + 1e-9)
        assert operator.products == ends.products == steps
        for value, error in (
            (ends.smallest, ends.smallest_error),
            (ends.largest, ends.largest_error),
        ):
            assert (expected - value).abs().min() <= error + 1e-9
        previous = ends.condition_number
    assert ends.largest == pytest.approx(expected[0].item(), rel=1e-9)
    assert ends.smallest == pytest.approx(expected[-1].item(), rel=0.2)


def test_without_a_preconditioner_and_float32(generator):
    m = decaying(30, 2)
    operator = MatrixFree(with_eigenvalues(m, generator).float())
    ends = generalized_extremes(operator, None, 1.0, steps=30, generator=generator)
    assert ends.largest == pytest.approx(11, rel=1e-5)
    assert ends.smallest == pytest.approx(1.1, rel=1e-5)


def test_errors(generator):
    C = DenseLinearOperator(psd(5, generator), [(5,)])
    with pytest.raises(ValueError, match="inverse must be positive definite, but DenseLinear"):
        generalized_spectrum(C, DenseLinearOperator(-C.matrix, [(5,)]), 1.0)
    with pytest.raises(ValueError, match="must act on the same space"):
        generalized_spectrum(C, DenseLinearOperator(psd(4, generator), [(4,)]), 1.0)
    for damping in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
            generalized_spectrum(C, C, damping)
        with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
            generalized_extremes(C, C, damping, steps=2, generator=generator)
