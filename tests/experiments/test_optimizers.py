"""Names stand for the optimizers that they say."""

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
from pinncurv import presets
from pinncurv.curvature import KFAC, GaussNewtonLinearOperator, Objective, reduce
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


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("kfac", presets.kfac),
        ("kfac-star", lambda p: presets.kfac_star(p, damping=1.2e-10, decay=0.926)),
        ("gauss-newton", presets.gauss_newton),
        ("engd", presets.engd),
        ("engd-per-layer", presets.engd_per_layer),
        ("engd-diagonal", presets.engd_diagonal),
        (
            "levenberg-marquardt",
            lambda p: presets.levenberg_marquardt(
                p, curvature=GaussNewtonLinearOperator.from_linearizations
            ),
        ),
        ("engd-w", presets.engd_w),
        ("spring", presets.spring),
        ("gauss-newton-cg", presets.gauss_newton_cg),
        ("hessian-free", presets.hessian_free),
        ("ekfac", presets.ekfac),
        ("subspace", presets.subspace_gauss_newton),
    ],
)
def test_the_names_stand_for_the_presets_of_the_library(name: str, preset: Build) -> None:
    mine = parameters_after_three_steps(Presets().preset(name).build)
    assert torch.equal(mine, parameters_after_three_steps(preset))


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
                damping=LevenbergMarquardt(shrink=9.0),
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
