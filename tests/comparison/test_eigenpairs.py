"""Eigenpairs at both ends, against torch.linalg."""

import pytest
import torch

from pinncurv.comparison import (
    EigenpairsNotConverged,
    largest_eigenpairs,
    smallest_eigenpairs,
    subspace_overlap,
)
from pinncurv.linops import DenseLinearOperator
from tests.comparison.cases import MatrixFree, decaying, psd, with_eigenvalues

FLAT = torch.linspace(1, 0, 80, dtype=torch.float64)
MULTIPLE = torch.tensor([3.0, 3.0, 3.0, 3.0, 1.0] + 25 * [0.5]).double()
SPECTRA = {
    "decaying": decaying(80, 12),
    "flat": FLAT,
    "multiple": MULTIPLE,
    "low_rank": torch.cat([torch.tensor([2.0, 1.0]), torch.zeros(20)]).double(),
    "indefinite": torch.linspace(5, -20, 40, dtype=torch.float64),
    "one": torch.ones(1).double(),
    "zero": torch.zeros(4).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_largest(name, generator):
    m = SPECTRA[name]
    k = min(4, len(m))
    C = with_eigenvalues(m, generator)
    pairs = largest_eigenpairs(MatrixFree(C, widest=9), k, generator=generator)
    torch.testing.assert_close(pairs.values, m[:k], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(pairs.vectors.mT @ pairs.vectors, torch.eye(k).double())
    residuals = (C @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    torch.testing.assert_close(pairs.residual_norms, residuals, rtol=0, atol=1e-12)
    assert pairs.residual_norms.max() <= 1e-10 * m.abs().max()


def test_a_decaying_spectrum_needs_few_products(generator):
    operator = MatrixFree(with_eigenvalues(decaying(400, 60), generator))
    pairs = largest_eigenpairs(operator, 5, generator=generator)
    assert pairs.products == operator.products <= 120


@pytest.mark.parametrize("k", [1, 3, 8])
def test_smallest(k, generator):
    m = torch.cat([torch.linspace(5, 1, 30), torch.tensor([1e-2, 1e-3, 1e-3, 2e-5, 0])]).double()
    C = with_eigenvalues(m, generator)
    expected, V = torch.linalg.eigh(C)
    inverse = DenseLinearOperator(C, [(35,)]).inverse(1e-4)
    pairs = smallest_eigenpairs(MatrixFree(C), k, 1e-4, generator=generator, inverse=inverse)
    torch.testing.assert_close(pairs.values, expected[:k], rtol=1e-7, atol=1e-10)
    assert pairs.residual_norms.max() < 1e-8
    torch.testing.assert_close(
        subspace_overlap(pairs.vectors[:, :1], V[:, :1]), torch.ones(1).double()
    )


def test_the_inverse_is_found_by_itself(generator):
    C = psd(10, generator)
    expected = torch.linalg.eigvalsh(C)[:2]
    dense = smallest_eigenpairs(DenseLinearOperator(C, [(10,)]), 2, 0.1, generator=generator)
    free = smallest_eigenpairs(MatrixFree(C), 2, 0.1, generator=generator, tolerance=1e-8)
    torch.testing.assert_close(dense.values, expected)
    torch.testing.assert_close(free.values, expected, rtol=1e-6, atol=1e-8)


def test_float32(generator):
    m = decaying(40, 3)
    C = with_eigenvalues(m, generator).float()
    pairs = largest_eigenpairs(MatrixFree(C), 3, generator=generator)
    torch.testing.assert_close(pairs.values, m[:3], rtol=1e-5, atol=0)
    smallest = smallest_eigenpairs(
        MatrixFree(C),
        2,
        1e-2,
        generator=generator,
        inverse=DenseLinearOperator(C, [(40,)]).inverse(1e-2),
    )
    torch.testing.assert_close(smallest.values, m.flip(0)[:2], rtol=0, atol=1e-5)


def test_what_does_not_converge_warns(generator):
    operator = MatrixFree(with_eigenvalues(FLAT, generator))
    with pytest.warns(EigenpairsNotConverged, match=r"dimension 10\. Raise max_basis"):
        pairs = largest_eigenpairs(operator, 3, generator=generator, max_basis=10)
    assert pairs.products == 10
    error = (pairs.values.unsqueeze(1) - FLAT).abs().min(1).values
    assert bool((error <= pairs.residual_norms).all())


def test_errors(generator):
    operator = DenseLinearOperator(psd(6, generator), [(6,)])
    for k in (0, 7):
        with pytest.raises(ValueError, match=rf"k must be an integer in \[1, 6\], got {k}"):
            largest_eigenpairs(operator, k, generator=generator)
    with pytest.raises(ValueError, match="max_basis must be an integer >= 6, got 3"):
        largest_eigenpairs(operator, 1, generator=generator, max_basis=3)
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        smallest_eigenpairs(operator, 1, -1.0, generator=generator)
    negative = DenseLinearOperator(-psd(6, generator), [(6,)])
    with pytest.raises(ValueError, match="inverse must be positive definite, got DenseLin"):
        smallest_eigenpairs(operator, 1, 1.0, generator=generator, inverse=negative)
