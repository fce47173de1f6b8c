"""Likely first mistakes are refused where they are made, with what to write instead."""

import numpy as np
import pytest
import torch
from torch import nn

from pinncurv.curvature import KFAC, Objective, coverage
from pinncurv.diffops import Directional, Laplacian, SecondOrder, Value
from pinncurv.linearization import linearize
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer
from pinncurv.presets import kfac_star
from pinncurv.problems import Box, Fixed, LossTerm, SpaceTimeBox
from pinncurv.verification import verify

BOX = Box.unit(2)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def term(operator=None, points=None, **arguments):
    points = BOX.interior(5) if points is None else points
    operators = {"lap": Laplacian() if operator is None else operator}
    return LossTerm(operators, lambda x, lap: lap - 1, points, **arguments)


def objective(model=None, terms=None, *args):
    model = mlp() if model is None else model
    return Objective.sample(model, [term()] if terms is None else terms, *args)


def optimizer(**parts):
    parts = {"curvature": KFAC(), "inverse": Damped(1e-3), **parts}
    return CurvatureOptimizer(mlp().parameters(), **parts)


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(2, 6, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(torch.complex128) @ self.W).real.tanh()


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(2, 4).double()]
        self.last = nn.Linear(4, 1).double()

    def forward(self, x):
        return self.last(torch.tanh(self.layers[0](x)))


class CompiledInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.compile(mlp())

    def forward(self, x):
        return self.net(x)


def batch_norm():
    layer = nn.BatchNorm1d(4, track_running_stats=False)
    return nn.Sequential(nn.Linear(2, 4), layer, nn.Linear(4, 1)).double().eval()


MISTAKES = {
    "points": (lambda: term(points=torch.rand(5, 2)), r"got Tensor\. Use Fixed\(x\)"),
    "function as points": (lambda: term(points=lambda: 0), r"must be a sampler.*got function"),
    "sampler class": (lambda: term(points=Fixed), "must be a sampler"),
    "numpy": (lambda: Fixed(np.zeros((5, 2))), r"got ndarray\. Use torch\.as_tensor"),
    "operators": (
        lambda: LossTerm([Value()], lambda x, u: u, BOX.interior(5)),
        r"must be a dictionary, got list.*\{'u': Value\(\)",
    ),
    "class as curvature": (lambda: optimizer(curvature=KFAC), r"class KFAC\. Write KFAC\("),
    "class as inverse": (lambda: optimizer(inverse=Damped), r"class Damped\. Write Damped\("),
    "number as inverse": (lambda: optimizer(inverse=1e-3), r"Damped\(1e-3\), got float"),
    "model as parameters": (
        lambda: CurvatureOptimizer(mlp(), KFAC(), Damped(1e-3)),
        r"got Sequential\. Pass objective\.parameters\(\)",
    ),
    "order of arguments": (
        lambda: linearize(mlp(), term(), torch.rand(3, 2)),
        r"got Sequential\. Write linearize\(term, model, x\)",
    ),
    "step size": (lambda: optimizer(step_size=0.1), r"optim\.FixedStep\(0\.1\), got float"),
    "momentum": (lambda: optimizer(momentum=0.9), r"optim\.HeavyBall\(0\.9\), got float"),
    "damping rule": (lambda: optimizer(damping_rule=2), r"optim\.LevenbergMarquardt\(\), got int"),
    "function as model": (lambda: objective(lambda x: x), r"a torch\.nn\.Module.*got <lambda>"),
    "class as model": (lambda: objective(nn.Linear), r"a torch\.nn\.Module.*got Linear"),
    "objective": (lambda: KFAC()(objective()), r"got Objective\. Pass objective\.linearize\(\)"),
    "linearization": (lambda: KFAC()(objective().linearize()[0]), r"or \[linearization\]"),
    "recipe": (lambda: KFAC(objective().linearize()), r"Write KFAC\(\)\(linearizations\)"),
    "one term": (lambda: objective(terms=term()), r"got LossTerm\. Write \[term\]"),
    "terms by name": (lambda: objective(terms={"a": term()}), "must be a list.*got dict"),
    "seed": (lambda: objective(None, None, 0), r"got int\. Write torch\.Generator\(\)"),
    "matrix": (lambda: objective(terms=[term(SecondOrder([[1, 0], [0, 1]]))]), r"got list\. Use"),
    "direction": (lambda: objective(terms=[term(Directional([1.0, 0.0]))]), r"got list\. Use"),
    "space": (lambda: SpaceTimeBox(1), r"got int\. Write SpaceTimeBox\.unit\(1\)"),
    "complex": (lambda: objective(Complex()), r"must be real, but W is torch\.complex128"),
    "compiled": (lambda: objective(CompiledInside()), r"these modules are: net\. Use the modules"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile to torch.jit
def test_type_errors(mistake, shapes_unchecked):
    make, words = MISTAKES[mistake]
    with pytest.raises(TypeError, match=words):
        make()


def test_a_network_of_another_dimension():
    """Torch's own error, with a note on what the network was called with."""
    net = nn.Linear(3, 1).double()
    with pytest.raises(RuntimeError, match="cannot be multiplied") as caught:
        objective(net)
    assert any("points [N, d], of shape [5, 2]" in note for note in caught.value.__notes__)


def test_layers_in_a_list():
    with pytest.raises(ValueError, match=r"are layers in a list, not an nn\.ModuleList"):
        objective(Listed())


def test_batch_norm_without_running_statistics():
    with pytest.raises(NotImplementedError, match="track_running_stats=True"):
        objective(batch_norm())


# --- torch.compile --------------------------------------------------------------------------------

COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch to itself


@COMPILES
def test_a_compiled_network_is_the_one_that_it_was_made_from():
    model = mlp()
    compiled = torch.compile(model)
    own = objective(compiled)
    assert own.model is model
    assert kfac_star(compiled.parameters(), damping=1e-3).step(own).accepted
    assert set(dict(own.named_parameters())) == set(dict(model.named_parameters()))
    assert "0.weight" in str(coverage(compiled, own.linearize()))
    assert verify(compiled, [term()], own.points, KFAC()).passed


@COMPILES
def test_compiled_in_place():
    model = mlp()
    model[0].compile()
    with pytest.raises(TypeError, match="these modules are: 0"):
        objective(model)


# --- a weight that changes ------------------------------------------------------------------------


def test_a_tensor_without_axes_is_a_weight_that_is_followed():
    weight = torch.tensor(2.0, dtype=torch.float64)
    model, points = mlp(), BOX.interior(5)
    followed = objective(model, [term(points=points, weight=weight)])
    for value in (2.0, 0.5, 0.0):
        weight.fill_(value)
        fixed = objective(model, [term(points=points, weight=value)])
        assert torch.equal(followed.loss(), fixed.loss())
        pairs = zip(followed.linearize().gradient(), fixed.linearize().gradient(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    weight.fill_(-1)
    with pytest.raises(ValueError, match="finite and >= 0"):
        followed.loss()


def test_a_tensor_without_axes_is_verified():
    made = term(weight=torch.tensor(2.0))
    x = made.points.sample(torch.Generator(), torch.float64, "cpu")
    assert verify(mlp(), [made], [x], KFAC()).passed
