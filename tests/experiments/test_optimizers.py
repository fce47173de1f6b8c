"""Names stand for the optimizers that they say."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Module

from experiments.training import memory
from experiments.training.errors import UserError
from experiments.training.network import build_network
from experiments.training.optimizers import KFACSettings, OptimizerSettings, Presets
from experiments.training.second_order import CurvatureSettings
from pinncurv import presets
from pinncurv.curvature import KFAC, MatrixFreeGaussNewton, Objective, reduce
from pinncurv.linearization import Empirical
from pinncurv.linops import Damped, FactorDamping, trace_norm
from pinncurv.optim import (
    CurvatureOptimizer,
    ExponentialAverage,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    Intervals,
    LevenbergMarquardt,
    QuadraticModel,
    from_first,
    from_zero,
)
from pinncurv.problems import poisson2d
from tests.test_presets import composition

Build = Callable[[Iterable[Any]], Any]


def tiny_network() -> Module:
    return build_network((2, 4, 1), "tanh", 1, torch.float64, torch.device("cpu"))


def parameters_after_three_steps(build: Build) -> torch.Tensor:
    """Train a tiny network, and return its parameters."""
    problem, model = poisson2d(10, 6), tiny_network()
    points = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    objective, optimizer = Objective(model, problem.terms, points), build(model.parameters())
    for _ in range(3):
        optimizer.step(objective)
    return nn.utils.parameters_to_vector(model.parameters())


SECOND_ORDER = [
    field.name
    for field in dataclasses.fields(Presets)
    if isinstance(getattr(Presets(), field.name), CurvatureSettings)
]
OTHER_NAMES = {"subspace": "subspace_gauss_newton"}
# what differs on purpose
SETTINGS: dict[str, dict[str, Any]] = {
    "kfac_star": {"damping": 1.2e-10, "decay": 0.926},
    "levenberg_marquardt": {"curvature": MatrixFreeGaussNewton()},
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_the_names_stand_for_the_presets_of_the_library(name: str) -> None:
    """Part by part, with every default."""
    mine = getattr(Presets(), name).build(tiny_network().parameters())
    preset = getattr(presets, OTHER_NAMES.get(name, name))
    theirs = preset(tiny_network().parameters(), **SETTINGS.get(name, {}))
    assert composition(mine) == composition(theirs)


@pytest.mark.parametrize(
    ("settings", "composed"),
    [
        (
            KFACSettings(
                damping=0.25,
                decay=0.5,
                start="zero",
                step_size="fixed",
                momentum=0.75,
                curvature_every=2,
                inverse_every=3,
                lr=0.125,
                sharing="reduce",
                inverse="exact",
            ),
            lambda p: CurvatureOptimizer(
                p,
                curvature=KFAC(reduce),
                inverse=Damped(0.25),
                step_size=FixedStep(),
                average=ExponentialAverage(0.5, from_zero),
                momentum=HeavyBall(0.75),
                intervals=Intervals(2, 3),
                lr=0.125,
            ),
        ),
        (
            KFACSettings(
                damping=1e-3,
                start="first",
                step_size="line-search",
                line_search_exponents=(-3, 1),
                fisher="empirical",
                heuristic="trace-norm",
                max_halvings=1,
            ),
            lambda p: CurvatureOptimizer(
                p,
                curvature=KFAC(fisher=Empirical()),
                inverse=FactorDamping(1e-3, trace_norm),
                step_size=GridLineSearch(-3, 1),
                average=ExponentialAverage(0.95, from_first),
                max_halvings=1,
            ),
        ),
        (
            KFACSettings(
                decay=0.0,
                damping_rule="levenberg-marquardt",
                levenberg_marquardt=LevenbergMarquardt(shrink=9.0),
                quadratic_momentum=False,
            ),
            lambda p: CurvatureOptimizer(
                p,
                curvature=KFAC(),
                inverse=FactorDamping(1e-8),
                step_size=QuadraticModel(use_momentum=False),
                damping_rule=LevenbergMarquardt(shrink=9.0),
            ),
        ),
    ],
    ids=["fixed", "line-search", "quadratic-model"],
)
def test_every_setting_reaches_the_optimizer(settings: OptimizerSettings, composed: Build) -> None:
    mine = parameters_after_three_steps(settings.build)
    assert torch.equal(mine, parameters_after_three_steps(composed))
    assert not torch.equal(mine, parameters_after_three_steps(KFACSettings().build))


def test_a_matrix_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_memory", lambda device: 100)
    parameters = list(tiny_network().parameters())
    with pytest.raises(UserError, match="full Gauss-Newton matrix of 17 parameters"):
        Presets().gauss_newton.build(parameters)
    Presets().engd_per_layer.build(parameters)


@pytest.mark.parametrize("name", ["engd-w", "gauss-newton-cg", "levenberg-marquardt", "subspace"])
@pytest.mark.parametrize("setting", [{"decay": 0.5}, {"curvature_every": 2}, {"inverse_every": 3}])
def test_an_operator_that_cannot_last_is_refused(name: str, setting: dict[str, Any]) -> None:
    settings = dataclasses.replace(Presets().preset(name), **setting)
    with pytest.raises(UserError, match=r"must be 0, 1 and 1 for an operator without tensors"):
        settings.build(tiny_network().parameters())


def test_ekfac_can_be_kept_but_not_averaged() -> None:
    kept = dataclasses.replace(Presets().ekfac, curvature_every=2, inverse_every=2)
    assert parameters_after_three_steps(kept.build).isfinite().all()
    with pytest.raises(UserError, match="decay must be 0 for EKFAC"):
        dataclasses.replace(kept, decay=0.5).build(tiny_network().parameters())
