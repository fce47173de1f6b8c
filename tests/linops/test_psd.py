"""The one path for factorizations, and its escalation."""

import pytest
import torch

from pinncurv.linops import FactorizationError, eigh, factorize, factorize_from, symmetrize
from pinncurv.linops.simultaneous import diagonalize
from tests.linops.cases import psd


def test_cholesky_first(generator):
    M = psd(5, generator)
    factorization = factorize(M, "M")
    X = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    assert factorization.report.method == "cholesky"
    assert factorization.report.eigenvalues is None
    torch.testing.assert_close(M @ factorization.solve(X), X)
    torch.testing.assert_close(factorization.inverse(), torch.linalg.inv(M))


def test_escalates_to_eigh_and_clips(generator):
    M = psd(5, generator, rank=2) - 1e-15 * torch.eye(5, dtype=torch.float64)
    factorization = factorize(M, "M", floor=1e-10)
    assert factorization.report.method == "eigh"
    assert factorization.report.clipped == 3
    assert factorization.report.eigenvalues[0] < 1e-14
    W = factorization.whiten(torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(
        factorization.whiten_adjoint(torch.eye(5, dtype=torch.float64)), W.mT
    )
    largest = torch.linalg.eigvalsh(factorization.inverse())[-1].item()
    assert largest <= 1e10 * (1 + 1e-6)


def test_escalates_to_a_shifted_matrix(generator, monkeypatch):
    M = psd(5, generator)
    original, calls = torch.linalg.eigh, []

    def fail_once(matrix):
        calls.append(matrix)
        if len(calls) == 1:
            raise torch.linalg.LinAlgError("did not converge")
        return original(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fail_once)
    factorization = eigh(M, "M")
    assert factorization.report.method == "shifted eigh"
    V, m = factorization.eigenvectors, factorization.eigenvalues
    torch.testing.assert_close(V * m @ V.mT, M)


def test_failure_names_the_matrix(generator, monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    with pytest.raises(FactorizationError, match=r"of layer net\.0 \(5x5\) failed twice: did not"):
        eigh(psd(5, generator), "layer net.0")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_symmetrize(dtype, generator):
    M = torch.randn(4, 4, generator=generator).to(dtype)
    S = symmetrize(M, "M")
    assert S.dtype == torch.float64
    torch.testing.assert_close(S, (M.double() + M.double().mT) / 2)
    M[2, 1] = float("inf")
    M[1, 2] = -float("inf")
    with pytest.raises(FactorizationError, match="entries of M must be finite, got 2 of 16"):
        symmetrize(M, "M")


def test_large_finite_entries_are_finite():
    M = torch.full((2, 2), 1e308, dtype=torch.float64)
    assert torch.equal(symmetrize(M, "M"), M)


def test_numerically_singular_matrix_needs_a_floor(generator):
    M = psd(5, generator, rank=4)
    with pytest.raises(FactorizationError, match="M must be nonsingular to be inverted without"):
        factorize(M, "M")
    assert factorize(M, "M", floor=1e-12).solve(torch.eye(5, dtype=torch.float64)).isfinite().all()


def test_simultaneous_diagonalization(generator):
    P1, P2 = psd(5, generator), psd(5, generator, scale=1e-6)
    result = diagonalize(P1, P2, 0.0, 0.0, "pair")
    torch.testing.assert_close(result.E.mT @ P1 @ result.E, result.s1 * result.a1.diag())
    torch.testing.assert_close(
        result.E.mT @ P2 @ result.E / result.s2, result.a2.diag(), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(result.a1 + result.a2, torch.ones(5, dtype=torch.float64))


def test_simultaneous_diagonalization_of_a_negative_matrix(generator):
    with pytest.raises(FactorizationError, match="pair must be positive semidefinite, got a"):
        diagonalize(-psd(5, generator), psd(5, generator), 0.0, 0.0, "pair")


# --- the smallest damping that is enough ----------------------------------------------------------


def test_a_definite_matrix_takes_the_damping_that_was_asked_for(generator):
    M = psd(5, generator)
    factorization, damping = factorize_from(M, "M", 1e-3)
    assert damping == factorization.report.floor == 1e-3
    X = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    damped = M + 1e-3 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(factorization.solve(X), torch.linalg.solve(damped, X))


@pytest.mark.parametrize("negative", [1e-9, 3e-5, 0.2])
def test_damping_is_raised_by_tens_until_it_is_enough(generator, negative):
    """The smallest 10^k λ above the most negative eigenvalue, for a matrix that is not damped."""
    Q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    m = torch.tensor([1.0, 0.5, 0.1, 1e-2, 1e-3, -negative], dtype=torch.float64)
    M = symmetrize(Q @ torch.diag(m) @ Q.T, "M")
    before = M.clone()
    factorization, damping = factorize_from(M, "M", 1e-12)
    expected = min(10.0**k for k in range(-12, 3) if 10.0**k > negative)
    assert damping == pytest.approx(expected, rel=1e-12)
    L = factorization.L
    torch.testing.assert_close(L @ L.T, M + damping * torch.eye(6, dtype=torch.float64))
    assert torch.equal(M, before)


def test_no_damping_is_enough():
    M = torch.diag(torch.tensor([1.0, -1e3], dtype=torch.float64))
    assert factorize_from(M, "M", 1e-3)[1] == pytest.approx(1e4)
    M[0, 1] = M[1, 0] = torch.nan  # only symmetrize finds that out
    with pytest.raises(FactorizationError, match="M must be positive semidefinite, got one that"):
        factorize_from(M, "M", 1e-3)


def test_no_damping_of_zero():
    with pytest.raises(FactorizationError, match=r"with a damping of 0.0e\+00"):
        factorize_from(torch.zeros(3, 3, dtype=torch.float64), "M", 0.0)
