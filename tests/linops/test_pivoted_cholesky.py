"""Randomly pivoted Cholesky against dense factors, exact probabilities, and uniform columns."""

import torch

from pinncurv.linops import pivoted_cholesky


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clustered(R: int = 120) -> torch.Tensor:
    """A smooth kernel of points of which nine tenths are close together."""
    x = torch.rand(R, 2, generator=generator(0), dtype=torch.float64)
    x[R // 10 :] *= 0.05
    return torch.exp(-torch.cdist(x, x).square() / 0.1)


def left_by(K, chosen):
    """The trace of what the columns leave, by a dense solve."""
    C = K[:, chosen]
    return float(K.trace() - torch.linalg.lstsq(C[chosen], C.T).solution.mul(C.T).sum())


def test_the_factor_is_the_dense_one_of_its_pivots():
    X = torch.randn(12, 30, generator=generator(1), dtype=torch.float64)
    K = X @ X.T
    partial = pivoted_cholesky(K, 7, generator(0))
    P = partial.pivots
    assert len(P) == len(P.unique()) == 7
    L = torch.linalg.cholesky(K[P][:, P])
    expected = torch.linalg.solve_triangular(L, K[P], upper=False).T
    torch.testing.assert_close(partial.factor, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((partial.factor @ partial.factor.T)[P], K[P])


def test_pivots_are_drawn_by_what_is_left():
    """The chances of each ordered pair."""
    X = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.3, 0.0], [0.0, 0.0, 1.5], [0.5, 0.5, 0.5]])
    K = (X @ X.T).double()
    draws = 1000
    counts = torch.zeros(4, 4, dtype=torch.float64)
    shared = generator(3)
    for _ in range(draws):
        partial = pivoted_cholesky(K, 2, shared)
        counts[tuple(partial.pivots.tolist())] += 1
    for i in range(4):
        left = (K.diagonal() - K[i].square() / K[i, i]).clamp(min=0)
        chances = K[i, i] / K.trace() * left / left.sum()
        error = (chances * (1 - chances) / draws).sqrt()
        assert ((counts[i] / draws - chances).abs() <= 4 * error).all()


def test_fewer_columns_are_left_out_than_by_uniform_choice():
    """On a kernel with a falling spectrum and clustered points, in the median of seeds."""
    K, rank = clustered(), 12
    pivoted = [left_by(K, pivoted_cholesky(K, rank, generator(seed)).pivots) for seed in range(9)]
    uniform = [left_by(K, torch.randperm(len(K), generator=generator(s))[:rank]) for s in range(9)]
    best = float(torch.linalg.eigvalsh(K)[:-rank].sum())
    median = sorted(pivoted)[4]
    assert best <= median < 10 * best
    assert median < 0.1 * sorted(uniform)[4]


def test_nothing_is_drawn_from_rounding():
    """A matrix of rank three has three pivots, a zero none."""
    X = torch.randn(40, 3, generator=generator(2), dtype=torch.float64)
    partial = pivoted_cholesky(X @ X.T, 10, generator(0))
    assert len(partial.pivots) == 3
    torch.testing.assert_close(partial.factor @ partial.factor.T, X @ X.T)
    assert pivoted_cholesky(torch.zeros(5, 5), 3, generator(0)).factor.shape == (5, 0)


def test_the_seed_decides():
    K = clustered()
    first, again, other = (pivoted_cholesky(K, 10, generator(s)).pivots for s in (1, 1, 2))
    assert first.equal(again)
    assert not first.equal(other)
