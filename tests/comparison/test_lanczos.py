"""The Lanczos process, and the spectral density that it gives."""

import pytest
import torch
from curvlinops import SubmatrixLinearOperator

from pinncurv.comparison import lanczos, spectral_density
from pinncurv.linops import DenseLinearOperator
from tests.comparison.cases import MatrixFree, decaying, psd, randn, with_eigenvalues


def tridiagonal(decomposition):
    off = decomposition.off_diagonal
    return decomposition.diagonal.diag() + off.diag(1) + off.diag(-1)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_decomposition(preconditioned, generator):
    n, m, damping = 30, 12, 0.3
    C, W = psd(n, generator), psd(n, generator) if preconditioned else torch.eye(n).double()
    preconditioner = MatrixFree(W) if preconditioned else None
    start = randn(n, generator=generator)
    received = lanczos(MatrixFree(C), start, m, damping=damping, preconditioner=preconditioner)
    U, T = received.basis, tridiagonal(received)
    torch.testing.assert_close(U.mT @ torch.linalg.solve(W, U), torch.eye(m).double())
    remainder = W @ (C @ U + damping * U) - U @ T
    torch.testing.assert_close(remainder[:, :-1], torch.zeros(n, m - 1).double())
    size = torch.dot(remainder[:, -1], torch.linalg.solve(W, remainder[:, -1])).sqrt()
    assert received.remainder == pytest.approx(size.item())
    torch.testing.assert_close(U[:, 0], W @ start / torch.dot(start, W @ start).sqrt())


def test_all_steps_give_all_eigenvalues_without_ghosts(generator):
    # Without reorthogonalization the large isolated eigenvalues would return as copies.
    cluster = 1 + 1e-3 * torch.arange(40, dtype=torch.float64)
    m = torch.cat([torch.tensor([1e4, 1e3, 1e3 - 1e-4]).double(), cluster.flip(0)])
    start = randn(len(m), generator=generator)
    operator = MatrixFree(with_eigenvalues(m, generator))
    ritz = lanczos(operator, start, len(m)).ritz()
    torch.testing.assert_close(ritz.values, m, rtol=1e-9, atol=1e-8)
    ritz = lanczos(operator, start, 30).ritz()
    assert (ritz.values > 2).sum() == 3
    distance = (ritz.values.unsqueeze(1) - m).abs().min(1).values
    assert bool((distance <= ritz.errors + 1e-9).all())


def test_stops_where_the_krylov_space_is_invariant(generator):
    m = torch.tensor([5.0, 5.0, 2.0, 2.0, 2.0, 0.0, 0.0]).double()
    operator = MatrixFree(with_eigenvalues(m, generator))
    received = lanczos(operator, randn(7, generator=generator), 7)
    assert received.remainder == 0
    ritz = received.ritz()
    torch.testing.assert_close(ritz.values, torch.tensor([5.0, 2.0, 0.0]).double())
    zero = lanczos(MatrixFree(torch.zeros(3, 3).double()), torch.ones(3).double(), 3)
    assert zero.ritz().values.tolist() == [0]


def test_errors_of_lanczos(generator):
    operator, start = MatrixFree(psd(5, generator)), torch.ones(5).double()
    with pytest.raises(ValueError, match="preconditioner must be positive definite, but MatrixFr"):
        lanczos(operator, start, 3, preconditioner=MatrixFree(-psd(5, generator)))
    indefinite = MatrixFree(with_eigenvalues(torch.tensor([9.0, 1, 1, 1, -9]).double(), generator))
    with pytest.raises(ValueError, match="Raise the damping of the inverse"):
        lanczos(operator, start, 5, preconditioner=indefinite)
    with pytest.raises(ValueError, match="start must not be zero"):
        lanczos(operator, 0 * start, 3)
    with pytest.raises(ValueError, match="steps must be an integer >= 1, got 0"):
        lanczos(operator, start, 0)
    with pytest.raises(ValueError, match=r"product with MatrixFree \(5, 5\) must be finite"):
        lanczos(MatrixFree(operator.matrix * float("inf")), start, 3)


def test_the_quadrature_is_exact_for_polynomials(generator):
    C = psd(20, generator)
    density = spectral_density(
        MatrixFree(C), steps=3, vectors=4, generator=torch.Generator().manual_seed(3)
    )
    bits = torch.randint(0, 2, (20, 4), generator=torch.Generator().manual_seed(3))
    Z = (2 * bits - 1).double()
    for degree in range(6):
        power = torch.linalg.matrix_power(C, degree)
        expected = (Z * (power @ Z)).sum(0).mean()
        received = density.trace(lambda m, p=degree: m**p)
        torch.testing.assert_close(received.value, expected)
    torch.testing.assert_close(density.weights.sum(1), torch.ones(4).double())


def test_the_density_is_that_of_the_eigenvalues(generator):
    m = torch.cat([decaying(150, 2), torch.zeros(50)])
    C = with_eigenvalues(m, generator)
    density = spectral_density(MatrixFree(C), steps=60, vectors=20, generator=generator)
    assert density.dimension == 200
    assert density.share_below(1e-3) == pytest.approx(0.25, abs=0.03)
    assert density.share_below(1e9) == pytest.approx(1)
    grid = torch.linspace(-5, 15, 2001).double()
    assert torch.trapezoid(density.smoothed(grid, 0.5), grid).item() == pytest.approx(1)
    decades = torch.linspace(-2.5, 2.5, 501).double()
    normal = torch.distributions.Normal(m[:150].log10().unsqueeze(1), 0.2)
    expected = normal.log_prob(decades).exp().sum(0) / 200
    smooth = density.smoothed_log(10**decades, 0.2)
    share = torch.trapezoid(smooth, decades).item()
    assert share == pytest.approx(1 - density.share_below(1e-3), abs=1e-2)
    assert (smooth - expected).abs().max() < 0.15 * expected.max()


def test_the_density_of_the_inverse_resolves_the_small_end(generator):
    m = torch.cat([torch.linspace(10, 1, 50), torch.full((50,), 1e-6)]).double()
    operator = DenseLinearOperator(with_eigenvalues(m, generator), [(100,)])
    options = {"steps": 12, "vectors": 20, "generator": generator}
    inverse = spectral_density(operator.inverse(1e-6), **options)
    density = inverse.map(lambda mu: 1 / mu - 1e-6)
    grid = torch.linspace(-7, -5, 201).double()
    smooth = density.smoothed_log(10**grid, 0.1)
    assert grid[smooth.argmax()].item() == pytest.approx(-6, abs=0.02)
    assert torch.trapezoid(smooth, grid).item() == pytest.approx(0.5, abs=0.05)
    assert bool(density.nodes.isfinite().all())


def test_density_of_an_operator_of_curvlinops_in_float32(generator):
    m = torch.tensor([4.0, 3.0, 2.0, 1.0])
    operator = SubmatrixLinearOperator(DenseLinearOperator(m.diag(), [(4,)]), [0, 1], [0, 1])
    density = spectral_density(operator, steps=9, vectors=2, generator=generator)
    expected = torch.tensor([[4.0, 3.0], [4.0, 3.0]]).double()
    torch.testing.assert_close(density.nodes, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(density.weights, torch.full((2, 2), 0.5).double())


def test_errors_of_the_density(generator):
    operator = MatrixFree(psd(5, generator))
    with pytest.raises(ValueError, match="vectors must be an integer >= 2, got 1"):
        spectral_density(operator, steps=3, vectors=1, generator=generator)
    density = spectral_density(operator, steps=3, vectors=2, generator=generator)
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        density.smoothed(torch.ones(1), 0.0)
    with pytest.raises(ValueError, match=r"logarithmic axis must be positive.*torch.logspace"):
        density.smoothed_log(torch.zeros(1), 0.1)
