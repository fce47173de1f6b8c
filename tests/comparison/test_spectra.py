"""All eigenvalues and the effective dimension, against torch.linalg."""

import pytest
import torch

from pinncurv.comparison import (
    effective_dimension,
    estimate_effective_dimension,
    spectral_density,
    spectrum,
)
from pinncurv.linops import DenseLinearOperator
from tests.comparison.cases import MatrixFree, decaying, kronecker, psd, randn, with_eigenvalues
from tests.linops.cases import STRUCTURES, kronecker_oracle


@pytest.mark.parametrize(("widths", "bias"), STRUCTURES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_spectrum_of_kronecker_sums(widths, bias, dtype, generator):
    operator = kronecker(widths, 2, generator, bias, dtype=dtype)
    expected = torch.linalg.eigvalsh(kronecker_oracle(operator)).flip(0)
    received = spectrum(operator)
    assert received.dtype == torch.float64
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(received, expected, rtol=tolerance, atol=tolerance * expected[0])


def test_a_layerwise_spectrum_needs_no_dense_matrix(generator, monkeypatch):
    operator = kronecker([3, 4, 2], 2, generator)
    expected = torch.linalg.eigvalsh(kronecker_oracle(operator)).flip(0)
    monkeypatch.setattr(type(operator), "to_dense", MatrixFree.to_dense)
    torch.testing.assert_close(spectrum(operator), expected)


def test_spectrum_of_sums_of_operators(generator):
    first, second = psd(8, generator), psd(8, generator, rank=3)
    shapes = [(2, 3), (2,)]
    operator = DenseLinearOperator(first, shapes) + 2.0 * DenseLinearOperator(second, shapes)
    expected = torch.linalg.eigvalsh(first + 2 * second).flip(0)
    torch.testing.assert_close(spectrum(operator), expected)


def test_effective_dimension(generator):
    C = psd(12, generator, rank=5)
    m = spectrum(DenseLinearOperator(C, [(12,)]))
    dampings = [1e-3, 1.0, 1e3]
    expected = [torch.trace(C @ torch.linalg.inv(C + d * torch.eye(12))) for d in dampings]
    torch.testing.assert_close(effective_dimension(m, dampings), torch.stack(expected))
    torch.testing.assert_close(
        effective_dimension(m, torch.tensor(dampings, dtype=torch.float64)), torch.stack(expected)
    )
    exact = torch.tensor([2.0, 1.0, 0.0, -1e-17])
    assert effective_dimension(exact, [0.0]).tolist() == [2.0]


def test_estimates_of_the_effective_dimension_agree_with_the_exact_one(generator):
    m = decaying(60)
    operator = MatrixFree(with_eigenvalues(m, generator))
    damping = 1e-2
    inverse = DenseLinearOperator(operator.matrix, [(60,)]).inverse(damping)
    expected = (m / (m + damping)).sum()
    errors, scores = [], []
    for seed in range(10):
        draws = torch.Generator().manual_seed(seed)
        estimate = estimate_effective_dimension(
            operator, damping, vectors=16, generator=draws, inverse=inverse
        )
        density = spectral_density(operator, steps=25, vectors=16, generator=draws)
        other = density.trace(lambda m: m / (m + damping))
        errors.append(estimate.standard_error)
        scores += [(e.value - expected) / e.standard_error for e in (estimate, other)]
    assert max(abs(score) for score in scores) < 4
    assert torch.stack(scores).square().mean() < 3
    many = estimate_effective_dimension(
        operator, damping, vectors=256, generator=generator, inverse=inverse
    )
    ratio = many.standard_error / torch.stack(errors).mean()
    assert 0.25 / 1.5 < ratio < 0.25 * 1.5  # 1 / sqrt(256 / 16)


def test_the_inverse_of_an_estimate_is_found_by_itself(generator):
    operator = MatrixFree(psd(20, generator, rank=5))
    received = [
        estimate_effective_dimension(
            operator, 0.1, vectors=2, generator=torch.Generator().manual_seed(0), inverse=inverse
        )
        for inverse in (None, DenseLinearOperator(operator.matrix, [(20,)]).inverse(0.1))
    ]
    torch.testing.assert_close(received[0].value, received[1].value)
    torch.testing.assert_close(received[0].standard_error, received[1].standard_error)


def test_errors(generator):
    asymmetric = randn(6, 6, generator=generator)
    with pytest.raises(ValueError, match=r"must be symmetric.*use generalized_spectrum\(C, P⁻¹\)"):
        spectrum(DenseLinearOperator(asymmetric, [(6,)]))
    with pytest.raises(ValueError, match=r"entries of DenseLinearOperator .* must be finite"):
        spectrum(DenseLinearOperator(torch.full((2, 2), float("nan")), [(2,)]))
    with pytest.raises(ValueError, match="damping must be a finite number >= 0, got -1"):
        effective_dimension(torch.ones(3), [-1.0])
    operator = DenseLinearOperator(psd(4, generator), [(4,)])
    with pytest.raises(ValueError, match="vectors must be an integer >= 2, got 1"):
        estimate_effective_dimension(operator, 1.0, vectors=1, generator=generator)
    other = DenseLinearOperator(psd(5, generator), [(5,)])
    with pytest.raises(ValueError, match="must act on the same space"):
        estimate_effective_dimension(operator, 1.0, vectors=2, generator=generator, inverse=other)
