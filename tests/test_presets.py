"""Presets are compositions that a user could write, with every setting where it belongs."""

import math

import pytest
import torch

from pinncurv import presets
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    CheaperSide,
    DiagonalGaussNewton,
    GaussNewton,
    MatrixFreeGaussNewton,
    expand,
    reduce,
)
from pinncurv.curvature.iterative import PreconditionedCG
from pinncurv.curvature.woodbury import Woodbury
from pinncurv.linops import Damped, FactorDamping, PseudoInverse, same, trace_norm
from pinncurv.linops.cg import RelativeProgress
from pinncurv.optim import (
    ArmijoLineSearch,
    ConstantDamping,
    CurvatureOptimizer,
    ExponentialAverage,
    FixedStep,
    GridLineSearch,
    HeavyBall,
    Intervals,
    LevenbergMarquardt,
    QuadraticModel,
    ShortStepDamping,
    Spring,
    from_first,
    from_identity,
    from_zero,
)
from pinncurv.optim.momentum import WarmStart
from pinncurv.optim.step_sizes import CGBacktracking, NormConstrained
from tests.optim.cases import network, poisson, values

RULE = LevenbergMarquardt(grow=3.0)


def composition(optimizer: CurvatureOptimizer) -> tuple:
    """Return all that an optimizer is composed of."""
    part = optimizer.preconditioner
    assert part.intervals == Intervals()
    assert optimizer.max_halvings == 30
    assert optimizer.monotone
    assert optimizer.defaults == {"lr": 1.0}
    return (
        part.curvature,
        part.inverse,
        optimizer.step_size,
        part.average,
        optimizer.momentum,
        optimizer.damping_rule,
    )


CONSTANT = ConstantDamping()


def adapts(minimum: float) -> ShortStepDamping:
    return ShortStepDamping(short=2.0**-4, long=2.0**-2, minimum=minimum)


MATRIX_FREE = MatrixFreeGaussNewton()
GRID = GridLineSearch(-30, 0)


@pytest.mark.parametrize(
    ("build", "settings", "expected"),
    [
        (
            presets.kfac,
            {},
            (
                KFAC(),
                FactorDamping(1e-8),
                GRID,
                ExponentialAverage(0.95, from_identity),
                HeavyBall(0.75),
            ),
        ),
        (
            presets.kfac,
            {
                "damping": 1e-3,
                "decay": 0.5,
                "momentum": 0.25,
                "start": from_zero,
                "sharing": reduce,
                "heuristic": trace_norm,
            },
            (
                KFAC(reduce),
                FactorDamping(1e-3, trace_norm),
                GRID,
                ExponentialAverage(0.5, from_zero),
                HeavyBall(0.25),
            ),
        ),
        (
            presets.kfac_star,
            {},
            (
                KFAC(expand),
                FactorDamping(1e-8, same),
                QuadraticModel(),
                ExponentialAverage(0.95, from_identity),
                None,
            ),
        ),
        (
            presets.kfac_star,
            {
                "damping": 1e-3,
                "decay": 0.5,
                "start": from_first,
                "sharing": reduce,
                "heuristic": trace_norm,
            },
            (
                KFAC(reduce),
                FactorDamping(1e-3, trace_norm),
                QuadraticModel(),
                ExponentialAverage(0.5, from_first),
                None,
            ),
        ),
        (presets.engd, {}, (GaussNewton(), Damped(1e-10), GRID, None, None, adapts(1e-10))),
        (
            presets.engd_per_layer,
            {},
            (BlockDiagonalGaussNewton(), Damped(1e-10), GRID, None, None, adapts(1e-10)),
        ),
        (presets.engd_diagonal, {}, (DiagonalGaussNewton(), Damped(1e-6), GRID, None, None)),
        (presets.engd, {"damping": 0.0}, (GaussNewton(), PseudoInverse(), GRID, None, None)),
        *[
            (
                build,
                {"damping": 1e-3, "decay": 0.5, "start": from_first, "step_size": FixedStep(0.1)},
                (
                    curvature,
                    Damped(1e-3),
                    FixedStep(0.1),
                    ExponentialAverage(0.5, from_first),
                    None,
                ),
            )
            for build, curvature in [
                (presets.engd, GaussNewton()),
                (presets.engd_per_layer, BlockDiagonalGaussNewton()),
                (presets.engd_diagonal, DiagonalGaussNewton()),
            ]
        ],
        (
            presets.gauss_newton,
            {},
            (MATRIX_FREE, CheaperSide(1e-12), QuadraticModel(), None, None, adapts(1e-12)),
        ),
        (
            presets.gauss_newton,
            {"damping": 1e-3},
            (MATRIX_FREE, CheaperSide(1e-3), QuadraticModel(), None, None),
        ),
        (
            presets.gauss_newton,
            {"use_momentum": False, "damping_rule": RULE, "curvature": GaussNewton()},
            (GaussNewton(), Damped(1e-12), QuadraticModel(use_momentum=False), None, None, RULE),
        ),
        (presets.engd_w, {}, (MATRIX_FREE, Woodbury(1e-10), GRID, None, None, adapts(1e-10))),
        (
            presets.engd_w,
            {"damping": 1e-3, "step_size": FixedStep(0.1)},
            (MATRIX_FREE, Woodbury(1e-3), FixedStep(0.1), None, None),
        ),
        (
            presets.spring,
            {},
            (
                MATRIX_FREE,
                Woodbury(1e-8),
                NormConstrained(1.0, 1.0),
                None,
                Spring(0.9),
                adapts(1e-8),
            ),
        ),
        (
            presets.spring,
            {"damping": 1e-3, "momentum": 0.5, "step_size": FixedStep(0.1)},
            (MATRIX_FREE, Woodbury(1e-3), FixedStep(0.1), None, Spring(0.5)),
        ),
        (
            presets.levenberg_marquardt,
            {"damping": 1e-2, "use_momentum": False},
            (
                MATRIX_FREE,
                CheaperSide(1e-2),
                QuadraticModel(False),
                None,
                None,
                LevenbergMarquardt(),
            ),
        ),
        (
            presets.gauss_newton_cg,
            {},
            (MATRIX_FREE, PreconditionedCG(1e-8), QuadraticModel(), None, None),
        ),
        (
            presets.gauss_newton_cg,
            {
                "damping": 1e-3,
                "curvature": KFAC(reduce),
                "inverse": Damped(1e-2),
                "max_iterations": 7,
                "damping_rule": RULE,
            },
            (
                MATRIX_FREE,
                PreconditionedCG(1e-3, KFAC(reduce), Damped(1e-2), max_iterations=7),
                QuadraticModel(),
                None,
                None,
                RULE,
            ),
        ),
        (
            presets.hessian_free,
            {
                "damping": 1e-2,
                "decay": 0.5,
                "max_iterations": 9,
                "curvature": KFAC(),
                "step_size": ArmijoLineSearch(0.5),
            },
            (
                MATRIX_FREE,
                PreconditionedCG(
                    1e-2,
                    tolerance=1e-10,
                    max_iterations=9,
                    stop=RelativeProgress(5e-4),
                ),
                ArmijoLineSearch(0.5),
                None,
                WarmStart(0.5),
                LevenbergMarquardt(shrink=1.5, grow=1.5, reject=1.5, minimum=1e-12),
            ),
        ),
        *[
            (build, {"curvature": None}, (MATRIX_FREE, inverse, *rest))
            for build, inverse, rest in [
                (
                    presets.gauss_newton_cg,
                    PreconditionedCG(1e-8, None),
                    (QuadraticModel(), None, None),
                ),
                (
                    presets.hessian_free,
                    PreconditionedCG(
                        1e-3,
                        None,
                        tolerance=1e-10,
                        max_iterations=250,
                        stop=RelativeProgress(5e-4),
                        spacing=1.3,
                    ),
                    (
                        CGBacktracking(),
                        None,
                        WarmStart(0.95),
                        LevenbergMarquardt(shrink=1.5, grow=1.5, reject=1.5, minimum=1e-12),
                    ),
                ),
            ]
        ],
    ],
)
def test_composition(build, settings, expected):
    received = composition(build(network().parameters(), **settings))
    assert received == (*expected, CONSTANT)[:6]


# Below about 6e-8 ‖JᵀJ‖, float32 does not resolve the exact matrix.
@pytest.mark.parametrize(
    ("name", "double"),
    [
        ("engd", 1e-10),
        ("engd_per_layer", 1e-10),
        ("engd_w", 1e-10),
        ("gauss_newton", 1e-12),
        ("gauss_newton_cg", 1e-8),
        ("spring", 1e-8),
        ("subspace_gauss_newton", 1e-8),
    ],
)
def test_the_default_damping_of_a_precision(name, double):
    for dtype, expected in ((torch.float64, double), (torch.float32, 1e-4)):
        model = network(dtype=dtype)
        groups = [{"params": model[0].parameters()}, {"params": model[2].weight}]
        for params in (model.parameters(), model.named_parameters(), groups):
            optimizer = getattr(presets, name)(params)
            assert optimizer.preconditioner.damping == expected
        assert (
            getattr(presets, name)(model.parameters(), damping=1e-3).preconditioner.damping == 1e-3
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["engd", "engd_per_layer", "gauss_newton"])
def test_exact_methods_train_in_single_precision(name):
    model = network(2, 12, 12, 1, dtype=torch.float32)
    objective, optimizer = poisson(model, n=60), getattr(presets, name)(model.parameters())
    start = objective.loss().item()
    for _ in range(25):
        record = optimizer.step(objective)
    assert record.new_loss < 1e-6 * start


BUILDS = {
    "kfac": presets.kfac,
    "kfac_star": presets.kfac_star,
    "engd": presets.engd,
    "engd_per_layer": presets.engd_per_layer,
    "engd_diagonal": presets.engd_diagonal,
    "gauss_newton": presets.gauss_newton,
    "engd_w": presets.engd_w,
    "spring": presets.spring,
    "levenberg_marquardt": presets.levenberg_marquardt,
    "gauss_newton_cg": presets.gauss_newton_cg,
    "hessian_free": presets.hessian_free,
    "ekfac": presets.ekfac,
    "subspace_gauss_newton": presets.subspace_gauss_newton,
    "auto": presets.auto,
}
WITH_AVERAGE = ["kfac", "kfac_star", "engd", "engd_per_layer", "engd_diagonal"]


@pytest.mark.parametrize("name", BUILDS)
def test_defaults_train(name):
    model = network()
    objective, optimizer = poisson(model), BUILDS[name](model.parameters())
    losses = [optimizer.step(objective).loss for _ in range(2)]
    losses.append(objective.loss().item())
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in values(model))


@pytest.mark.parametrize("name", ["engd", "engd_per_layer", "engd_diagonal"])
def test_a_singular_matrix_needs_no_damping(name):
    """More parameters than residuals, and some that change none of them."""
    model = network()
    with torch.no_grad():
        model[2].weight[:, 0] = 0
        model[0].weight[0] = 0
    objective = poisson(model, n=2)
    optimizer = getattr(presets, name)(model.parameters(), damping=0.0)
    before = objective.loss().item()
    assert all(optimizer.step(objective).accepted for _ in range(3))
    assert objective.loss().item() < before


def test_a_constant_damping_of_zero_takes_the_pseudo_inverse():
    params = list(network().parameters())
    kinds = [
        type(presets.engd(params, damping=0.0, damping_rule=rule).preconditioner.inverse)
        for rule in (None, ConstantDamping(), ShortStepDamping())
    ]
    assert kinds == [PseudoInverse, PseudoInverse, Damped]


@pytest.mark.parametrize("name", BUILDS)
def test_groups(name):
    model = network()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    optimizer = BUILDS[name](groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 1.0]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("damping", [-1.0, math.nan, math.inf])
def test_damping_must_be_valid(name, damping):
    with pytest.raises(ValueError, match="damping must be a finite number >= 0"):
        BUILDS[name](network().parameters(), damping=damping)


@pytest.mark.parametrize("name", WITH_AVERAGE)
@pytest.mark.parametrize("decay", [1.0, -0.5, math.nan])
def test_decay_must_be_valid(name, decay):
    with pytest.raises(ValueError, match=r"decay of an average must be in \[0, 1\)"):
        BUILDS[name](network().parameters(), decay=decay)


def test_momentum_must_be_valid():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        presets.kfac(network().parameters(), momentum=1.0)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        presets.spring(network().parameters(), momentum=1.0)


def test_engd_w_takes_the_steps_of_engd():
    model, twin = network(2, 12, 1), network(2, 12, 1)
    kernel, dense = (
        build(m.parameters(), damping=1e-6)
        for build, m in ((presets.engd_w, model), (presets.engd, twin))
    )
    for _ in range(2):
        record, other = kernel.step(poisson(model)), dense.step(poisson(twin))
        assert record.new_loss == pytest.approx(other.new_loss, rel=1e-6)


def test_gauss_newton_solves_a_small_problem():
    """Quadratic convergence near the end: the loss of an overparametrized fit vanishes."""
    model = network(2, 12, 1)
    objective, optimizer = poisson(model, n=6), presets.gauss_newton(model.parameters())
    for _ in range(40):
        record = optimizer.step(objective)
        if record.new_loss < 1e-20:
            break
    assert record.new_loss < 1e-20
    assert torch.tensor(record.loss).isfinite()
