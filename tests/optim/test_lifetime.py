"""How long linearizations and operators live: through retries where they may, else not for long."""

import gc
import weakref

import pytest
import torch

from pinncurv.curvature import (
    EKFAC,
    KFAC,
    GaussNewton,
    Hessian,
    JacobianLinearOperator,
    MatrixFreeGaussNewton,
    PreconditionedCG,
    Woodbury,
)
from pinncurv.linops import Damped
from pinncurv.optim import (
    CGBacktracking,
    ConstantDamping,
    CurvatureOptimizer,
    ExponentialAverage,
    GridLineSearch,
    LevenbergMarquardt,
    QuadraticModel,
    ShortStepDamping,
)
from tests.optim.cases import OPTIMIZERS, Obstacle, flat, gram, linear_fit, network, poisson

matrix_free = MatrixFreeGaussNewton()


class Counted:
    """A curvature that counts how often it is built."""

    def __init__(self, curvature):
        self.curvature, self.builds = curvature, 0

    def __call__(self, linearizations):
        self.builds += 1
        return self.curvature(linearizations)


class Walled(Obstacle):
    """An objective whose first trials fail, and which counts linearizations."""

    def __init__(self, objective, failures):
        super().__init__(
            objective, lambda loss, distance: 1e9 if len(self.evaluated) <= failures else loss
        )
        self.linearized = 0

    def linearize(self):
        self.linearized += 1
        return super().linearize()


def retry(curvature, inverse, chunk_size=None, failures=3):
    """Take one step that succeeds at the last of some trials."""
    model, counted = network(), Counted(curvature)
    optimizer = CurvatureOptimizer(
        model.parameters(), counted, inverse, damping_rule=LevenbergMarquardt()
    )
    objective = Walled(poisson(model, chunk_size=chunk_size), failures)
    record = optimizer.step(objective)
    assert record.accepted
    assert record.damping == pytest.approx(inverse.damping * 8.0**failures)
    return counted.builds, objective.linearized, flat(model)


@pytest.mark.parametrize(
    ("curvature", "chunk_size", "builds", "linearizations"),
    [
        (matrix_free, None, 1, 1),
        (matrix_free, 5, 4, 4),  # recomputed chunks are no longer those of the parameters
        (GaussNewton(), None, 1, 1),
        (GaussNewton(), 5, 1, 4),
        (KFAC(), 5, 1, 4),
        (Hessian(), None, 4, 4),  # it recomputes whatever the chunks
        (EKFAC(), 5, None, 4),
    ],
)
def test_retries_rebuild_what_is_recomputed(curvature, chunk_size, builds, linearizations):
    received = retry(curvature, Damped(1e-2), chunk_size)
    assert received[:2] == (builds or received[0], linearizations)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_retries_of_the_kernel(chunk_size):
    """Kept or made anew, it gives the step of the dense matrix with the last damping."""
    received = retry(matrix_free, Woodbury(1e-2), chunk_size)[2]
    expected = retry(GaussNewton(), Damped(1e-2))[2]
    torch.testing.assert_close(received, expected, rtol=1e-7, atol=1e-10)


def test_retries_of_an_objective_of_ones_own():
    """Nothing is known of its linearizations, so they are made anew."""
    fit = linear_fit(1.0, -2.0)
    counted = Counted(gram)
    optimizer = CurvatureOptimizer(
        fit.parameters, counted, Damped(1.0), damping_rule=LevenbergMarquardt()
    )
    objective = Walled(fit, 2)
    assert optimizer.step(objective).accepted
    assert (counted.builds, objective.linearized) == (3, 3)


# --- memory ---------------------------------------------------------------------------------------


class Watched:
    """An objective that says what is left of a linearization when the loss is evaluated."""

    def __init__(self, objective):
        self.objective, self.made, self.left = objective, [], []

    def linearize(self):
        linearized = self.objective.linearize()
        chunk = next(iter(linearized.linearizations[0]))
        self.made += [weakref.ref(layer.Z) for layer in chunk.blocks.values()]
        return linearized

    def loss(self):
        self.left.append(sum(Z() is not None for Z in self.made))
        return self.objective.loss()


@pytest.mark.parametrize(
    "parts",
    [
        (matrix_free, Woodbury(1e-2)),
        (matrix_free, Damped(1e-2), QuadraticModel(), None),
        (matrix_free, PreconditionedCG(1e-2), CGBacktracking()),
        (EKFAC(), Damped(1e-2)),
        (GaussNewton(), Damped(1e-2), QuadraticModel(), ExponentialAverage(0.5)),
    ],
    ids=["woodbury", "kernel", "cg", "ekfac", "dense"],
)
def test_nothing_is_held_while_an_update_is_tried(parts):
    """Z and G of the point that is left would double the memory of those at the next."""
    model = network()
    optimizer = CurvatureOptimizer(model.parameters(), *parts)
    objective = Watched(poisson(model))
    gc.disable()  # what is only freed with a cycle is not freed in time
    try:
        assert optimizer.step(objective).accepted
    finally:
        gc.enable()
    assert objective.made
    assert objective.left[-1] == 0


@pytest.mark.parametrize("retries", [0, 2])
def test_the_last_retry_holds_nothing(retries):
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(),
        matrix_free,
        Woodbury(1e-2),
        damping_rule=LevenbergMarquardt(max_retries=retries),
    )
    objective = Watched(Obstacle(poisson(model), lambda loss, distance: 1e9))
    optimizer.max_halvings = 0
    assert not optimizer.step(objective).accepted
    assert [bool(left) for left in objective.left] == [True] * retries + [False]


def test_nothing_is_held_between_steps():
    """Of a matrix of D x D numbers and its factorization."""
    model, made = network(), []

    def watched(linearizations):
        operator = GaussNewton()(linearizations)
        made.append(weakref.ref(operator))
        return operator

    optimizer = CurvatureOptimizer(
        model.parameters(), watched, Damped(1e-2), damping_rule=LevenbergMarquardt()
    )
    optimizer.step(poisson(model))
    assert made[0]() is None


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "products"),
    [(ConstantDamping(), 0), (ShortStepDamping(), 0), (LevenbergMarquardt(), 1)],
)
def test_the_model_is_evaluated_only_for_rules_that_look_at_it(rule, products, monkeypatch):
    calls = []
    product = JacobianLinearOperator._matmat
    monkeypatch.setattr(
        JacobianLinearOperator, "_matmat", lambda J, X: calls.append(1) or product(J, X)
    )
    model = network()
    optimizer = CurvatureOptimizer(
        model.parameters(), GaussNewton(), Damped(1e-2), GridLineSearch(-4), damping_rule=rule
    )
    assert optimizer.step(poisson(model)).accepted
    assert len(calls) == products


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_operators_can_be_dropped_after_any_step(name):
    """They are rebuilt from the state, also between two refreshments."""
    ends = []
    for forget in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        for seed in range(4):
            optimizer.step(poisson(model, seed))
            if forget:
                optimizer.preconditioner.forget()
        ends.append(flat(model))
    assert torch.equal(*ends)
