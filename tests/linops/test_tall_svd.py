"""The decomposition by blocks of rows against that of the whole matrix."""

import pytest
import torch

from pinncurv.linops.tall_svd import tall_svd_
from pinncurv.machine import Sizes


@pytest.mark.parametrize("R", [1, 5, 11, 12, 13, 64, 101])
@pytest.mark.parametrize("rank", [1, 5])
def test_it_is_the_decomposition(R, rank, monkeypatch, generator):
    """Of ill-conditioned matrices, and in place in a part of a larger one."""
    monkeypatch.setattr("pinncurv.machine.sizes._CPU", Sizes(1, 1, 1, 1))
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (R, 5))
    X = (left * 10.0 ** -torch.arange(0, 2 * rank, 2)) @ right.mT
    whole = torch.zeros(R, 6).double()
    whole[:, :5] = X
    P, sigma, Wt = tall_svd_(whole[:, :5])
    torch.testing.assert_close(sigma, torch.linalg.svdvals(X), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(P * sigma @ Wt, X, rtol=0, atol=1e-13)
    torch.testing.assert_close(P.mT @ P, torch.eye(min(R, 5)).double(), rtol=0, atol=1e-13)
    assert not whole[:, 5].any()
