"""A finite loss whose gradient is not: an error that says where, before anything has moved."""

import math

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.diffops import Laplacian, Value
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer, FirstOrder
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points
from tests.optim.cases import (
    OPTIMIZERS,
    LeastSquaresFit,
    fixed,
    gram,
    network,
    poisson,
    same,
    values,
)

TORCH = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=4, line_search_fn="strong_wolfe"),
}
ALL = {
    **OPTIMIZERS,
    **{name: lambda p, make=make: FirstOrder(make(p)) for name, make in TORCH.items()},
    "spring": presets.spring,
    "subspace": lambda p: presets.subspace_gauss_newton(p, points=5),
    "cg": lambda p: presets.gauss_newton_cg(p, curvature=None),
}
WHERE = (
    r"gradient of the loss must be finite, as the loss is, but that of term 'guarded' is not at 2 "
    r"of 9 points, the first of them x\[3\] = \[0\.0, 0\."
)

# A linearization at some points knows these alone.
WHERE_OF_SOME = r"of term 'guarded' is not at 1 of 5 points, the first of them x\[2\] = \[0"


def guarded(model, chunk_size=None):
    """Return a loss whose term has an infinite slope behind a torch.where at two points."""
    x = points(9)
    x[[3, 7], 0] = 0.0
    smooth = LossTerm({"lap": Laplacian()}, lambda x, lap: lap - 1, Fixed(x), name="smooth")
    guarded = LossTerm(
        {"u": Value()},
        lambda x, u: torch.where(x[:, :1] > 0, torch.sqrt((x[:, :1] > 0) * u.square()), 0 * u),
        Fixed(x),
        name="guarded",
    )
    return Objective(model, [smooth, guarded], [x, x], chunk_size)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", ALL)
def test_the_term_and_the_points_are_named(name, chunk_size):
    """Neither the parameters nor what the optimizer remembers is spoilt, and it goes on."""
    model, twin = network(), network()
    optimizer, reference = (ALL[name](m.parameters()) for m in (model, twin))
    assert math.isfinite(guarded(model).loss().item())
    before = values(model)
    where = WHERE_OF_SOME if name == "auto" else WHERE
    with pytest.raises(FloatingPointError, match=where):
        optimizer.step(guarded(model, chunk_size))
    assert same(before, values(model))
    optimizer.step(poisson(model))
    reference.step(poisson(twin))
    assert same(values(model), values(twin))


def test_backward_raises_before_torch_steps():
    model = network()
    with pytest.raises(FloatingPointError, match=WHERE):
        guarded(model).backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_step_may_end_there():
    """The loss was asked for, not the gradient: that is the next step's error."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    x = torch.ones(1, 1, dtype=torch.float64)
    term = LossTerm({"u": Value()}, lambda x, u: u + 0 * torch.sqrt(u), Fixed(x))
    objective, optimizer = (
        Objective(model, [term], [x]),
        fixed(model.parameters(), inverse=Damped(0.0)),
    )
    record = optimizer.step(objective)
    assert record.accepted
    assert (record.new_loss, model.weight.item()) == (0, 0)
    with pytest.raises(FloatingPointError, match=r"term 'term' is not at 1 of 1 points"):
        optimizer.step(objective)


def test_a_later_evaluation_of_a_line_search():
    """L-BFGS has moved by then: the parameters come back."""
    model, calls = network(), []
    objective = poisson(model)
    backward = objective.backward

    def fails_later():
        calls.append(1)
        if len(calls) == 3:
            return guarded(model).backward()
        return backward()

    objective.backward = fails_later
    before = values(model)
    with pytest.raises(FloatingPointError, match=WHERE):
        FirstOrder(TORCH["lbfgs"](model.parameters())).step(objective)
    assert len(calls) == 3
    assert same(before, values(model))


def test_an_objective_of_ones_own():
    parameter = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.float64))
    fit = LeastSquaresFit([parameter], lambda p: torch.sqrt(p[0]))
    optimizer = CurvatureOptimizer([parameter], gram, Damped(1e-2))
    with pytest.raises((FloatingPointError, ValueError), match="finite"):
        optimizer.step(fit)
    assert parameter.tolist() == [1.0, 0.0]
