"""Trained tensors inside of composed rules: exact rows of the Jacobian, at several points."""

import pytest
import torch
from torch import nn

from pinncurv.curvature import Jacobian, Objective
from tests import oracles
from tests.kinds import TERMS, build
from tests.networks import points


class Convolution(nn.Module):
    """A convolution over features, and a group normalization."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(2, 6), nn.Linear(6, 1)
        self.convolution, self.norm = nn.Conv1d(2, 2, 3, padding="same"), nn.GroupNorm(2, 2)

    def forward(self, x):
        h = torch.tanh(self.lift(x)).unflatten(1, (2, 3))
        return self.head(torch.sin(self.norm(h + self.convolution(h))).flatten(1))


class Vectors(nn.Module):
    """Trained vectors that meet the points in products, similarities and extrema."""

    def __init__(self):
        super().__init__()
        self.lift, self.head = nn.Linear(2, 3), nn.Linear(6, 1)
        self.axis, self.scale = nn.Parameter(torch.randn(3)), nn.Parameter(torch.rand(2))
        self.floor = nn.Parameter(torch.full((3,), -0.2))

    def forward(self, x):
        h = torch.tanh(self.lift(x))
        axis = self.axis[None]
        turned = torch.linalg.cross(axis, h)
        # not cosine_similarity, of which the oracle finds no gradient in torch
        similar = torch.linalg.vecdot(h, axis) * h.square().sum(-1).rsqrt()
        spread = torch.outer(similar, self.scale)
        along = torch.linalg.vecdot(turned, self.axis.flip(0))
        return self.head(torch.cat([torch.maximum(h, self.floor), spread, along[:, None]], 1))


@pytest.mark.parametrize(
    ("network", "term"), [(Convolution, "kdv"), (Vectors, "kdv"), (Vectors, "biharmonic")]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the oracle
def test_jacobian(network, term):
    model, loss_term, x = build(network), TERMS[term](), points()
    wanted = oracles.jacobian(loss_term, model, x)
    linearized = Objective(model, [loss_term], [x]).linearize()
    oracles.assert_close(Jacobian()(linearized).to_dense(), wanted)
