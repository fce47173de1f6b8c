"""The same loss on other channels has the same Gauss-Newton matrix and other factors."""

import pytest
import torch
from torch.nn import Linear, Sequential, Tanh

from paper.channels import OnChannels, uncollapsed, unmerged
from pinncurv import problems
from pinncurv.curvature import KFAC, GaussNewton, Objective
from pinncurv.linearization import Linearization
from pinncurv.problems import Problem

_CPU = torch.device("cpu")

# Channels of the interior term: as they are, one per second derivative, one set per operator.
_CASES = {
    "poisson2d": (problems.poisson2d(n_interior=7, n_boundary=4), 4, 5, 4),
    "log-fokker-planck": (problems.log_fokker_planck(dim=2, n_interior=7, n_initial=4), 5, 6, 7),
    "anisotropic": (
        problems.anisotropic_log_fokker_planck(dim=2, n_interior=7, n_initial=4),
        *(5, 7, 7),
    ),
}


def linearize(problem: Problem, chunk_size: int | None = None) -> list[Linearization]:
    torch.manual_seed(0)
    model = Sequential(Linear(problem.d_in, 5), Tanh(), Linear(5, problem.d_out)).double()
    points = problem.sample(torch.Generator().manual_seed(0), torch.float64, _CPU)
    return list(Objective(model, problem.terms, points, chunk_size).linearize().linearizations)


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_other_channels_change_the_factors_only(case: str, chunk_size: int | None) -> None:
    problem, plain, split, separate = _CASES[case]
    linearizations = linearize(problem, chunk_size)
    G, K = (recipe(linearizations) for recipe in (GaussNewton(), KFAC()))
    for change, channels in ((uncollapsed, split), (unmerged, separate)):
        seen: list[Linearization] = []
        exact = OnChannels(lambda new, seen=seen: seen.extend(new) or GaussNewton()(new), change)
        torch.testing.assert_close(exact(linearizations).matrix, G.matrix, rtol=1e-9, atol=1e-12)
        layer = next(iter(seen[0].blocks.values()))
        assert layer.Z.shape[0] == channels
        factors = OnChannels(KFAC(), change)(linearizations).to_dense()
        difference = (factors - K.to_dense()).norm() / K.to_dense().norm()
        assert (difference > 1e-3) == (channels != plain)
