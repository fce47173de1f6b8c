"""Random networks, residuals and operators agree with nested torch.func; see tests/fuzz.py."""

import functools

import pytest
import torch
from torch import nn

from pinncurv import Laplacian, LossTerm, Objective
from pinncurv.problems import Fixed
from tests.fuzz import NAMES, check, make
from tests.networks import points

pytestmark = [
    pytest.mark.usefixtures("shapes_unchecked"),  # which takes longer than what is tested
    pytest.mark.filterwarnings("ignore:The second derivative of"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
SEEDS = range(200)
drawn = functools.cache(make)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_case(seed):
    check(drawn(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 5000))
def test_another_random_case(seed):
    check(make(seed))


def test_every_covered_function_is_drawn():
    assert set().union(*(drawn(seed).names for seed in SEEDS)) == set(NAMES)


def test_a_case_says_how_to_see_it_again():
    case = make(3)
    case.points[0] = case.points[0][:0]
    with pytest.raises(RuntimeError, match="non-empty") as caught:
        check(case)
    (note,) = caught.value.__notes__
    assert "python -m tests.fuzz 3" in note
    assert str(make(3).model) in note


def test_torch_layer_norm_is_accepted():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift, self.head = nn.Linear(2, 4), nn.Linear(4, 1)

        def forward(self, x):
            return self.head(torch.layer_norm(torch.tanh(self.lift(x)), (4,)))

    term = LossTerm({"lap": Laplacian()}, lambda x, lap: lap, Fixed(points()))
    Objective(Normed().double(), [term], [points()])
