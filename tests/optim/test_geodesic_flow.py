"""Steps along the curve of Newton's flow: its second derivative, its length, and its damping."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pinncurv.curvature import (
    EKFAC,
    KFAC,
    BlockDiagonalGaussNewton,
    CheaperSide,
    DiagonalGaussNewton,
    GaussNewton,
    InSubspace,
    MatrixFreeGaussNewton,
    Objective,
    PreconditionedCG,
    SubspaceGaussNewton,
)
from pinncurv.diffops import Value
from pinncurv.linops import Damped, DenseLinearOperator, FactorDamping
from pinncurv.optim import (
    CurvatureOptimizer,
    GeodesicFlow,
    HeavyBall,
    Proposal,
    ShortStepDamping,
    Situation,
)
from pinncurv.optim.trial import Trial
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.networks import build, points
from tests.optim.cases import (
    LeastSquaresFit,
    Obstacle,
    PlainLinearized,
    flat,
    linear_fit,
    network,
    poisson,
    same,
    values,
)
from tests.terms import TERMS

pytestmark = pytest.mark.usefixtures("shapes_unchecked")  # which take longer than the steps


def situation(objective: Objective, damping: float) -> Situation:
    """Return where a step starts, with the exact inverse."""
    linearized = objective.linearize()
    operator = MatrixFreeGaussNewton()(linearized)
    trial = Trial(objective, linearized.parameters)
    return Situation(
        linearized,
        linearized.gradient(),
        CheaperSide(damping)(operator),
        damping,
        try_update=trial.loss_at,
        residual_at=torch.no_grad()(partial(trial.residual_at, linearized)),
        invert=lambda value: CheaperSide(value)(operator),
    )


def optimizer(parameters, curvature=None, inverse=None, **settings) -> CurvatureOptimizer:
    return CurvatureOptimizer(
        parameters,
        MatrixFreeGaussNewton() if curvature is None else curvature,
        CheaperSide(1e-2) if inverse is None else inverse,
        step_size=GeodesicFlow(**settings),
        max_halvings=0,
    )


# --- an objective of one's own that keeps its linearization, so that damping may change in a step -


@dataclass(frozen=True, eq=False)
class Kept(PlainLinearized):
    fit: Any = None
    chunk_size: None = field(default=None)

    def residual_now(self) -> list[Tensor]:
        return [self.fit.residual(self.parameters).detach().clone()]


class KeptFit(LeastSquaresFit):
    def linearize(self) -> Kept:
        made = super().linearize()
        return Kept(made.parameters, made.vector, made.rows, self)


def dense(linearizations) -> DenseLinearOperator:
    (made,) = linearizations
    return DenseLinearOperator(made.rows.T @ made.rows, [p.shape for p in made.parameters])


def fit(residual: Callable[[Tensor], Tensor], *start: float, kept: bool = True) -> LeastSquaresFit:
    theta = nn.Parameter(torch.tensor(start, dtype=torch.float64))
    kind = KeptFit if kept else LeastSquaresFit
    return kind([theta], lambda parameters: residual(parameters[0]))


def rosenbrock(theta: Tensor) -> Tensor:
    return torch.stack([10 * (theta[1] - theta[0] ** 2), 1 - theta[0]])


# --- the curve ------------------------------------------------------------------------------------


def second_derivative(objective: Objective, v: list[Tensor]) -> list[Tensor]:
    """Return r̃_vv of each term by nested forward mode."""
    parameters = oracles.trainable(objective.model)
    tangent = dict(zip(parameters, v, strict=True))

    def slope(p, term, x):
        residual = partial(oracles.scaled_residual, term, objective.model, x)
        return torch.func.jvp(residual, (p,), (tangent,))[1]

    return [
        torch.func.jvp(lambda p, t=term, x=x: slope(p, t, x), (parameters,), (tangent,))[1]
        for term, x in zip(objective.terms, objective.points, strict=True)
    ]


def expected_acceleration(objective: Objective, v: list[Tensor], damping: float) -> Tensor:
    J = torch.cat([oracles.jacobian(t, objective.model, x) for t, x in pairs(objective)])
    curve = torch.cat([part.flatten() for part in second_derivative(objective, v)])
    return -torch.linalg.solve(J.T @ J + damping * torch.eye(J.shape[1]).to(J), J.T @ curve)


def pairs(objective: Objective):
    return zip(objective.terms, objective.points, strict=True)


def random_velocity(objective: Objective, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = [p.shape for p in objective.parameters()]
    return [size * torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("N", [2, 6])
def test_acceleration_of_a_quadratic_residual(N):
    """Differences are exact there: u² of an affine u, with fewer residuals than parameters or more.

    One step of 0.1 loses ε / 0.01 of the second derivative.
    """
    model = nn.Linear(2, 1).double()
    square = LossTerm({"u": Value()}, lambda x, u: u**2 - 1, Fixed(points(N)), 1.5, "square")
    cross = LossTerm({"u": Value()}, lambda x, u: u * (u - x[:, :1]), Fixed(points(1)), name="x")
    terms = [square] if N == 2 else [square, cross]
    objective = Objective(model, terms, [points(N), points(1, seed=5)][: len(terms)])
    at, v = situation(objective, 1e-2), random_velocity(objective)
    received = at.acceleration(v, at.linearized.jacobian @ v)
    oracles.assert_close(flat(received), expected_acceleration(objective, v, 1e-2), rtol=1e-11)


def test_acceleration_of_a_network():
    """The error of the one-sided difference falls with the length of the velocity."""
    objective = Objective(build("tanh"), [TERMS["allen_cahn"]], [points(5)])
    at, errors = situation(objective, 1e-1), []
    for size in (1e-1, 1e-2, 1e-3):
        v = random_velocity(objective, size)
        expected = expected_acceleration(objective, v, 1e-1)
        received = flat(at.acceleration(v, at.linearized.jacobian @ v))
        errors.append(float((received - expected).norm() / expected.norm()))
    assert errors[1] < 0.2 * errors[0]
    assert errors[2] < 0.2 * errors[1]
    assert errors[2] < 1e-3


def test_acceleration_leaves_no_trace():
    objective = Objective(build("tanh"), [TERMS["allen_cahn"]], [points(5)])
    before = values(objective.parameters())
    at = situation(objective, 1e-1)
    v = at.step()
    assert at.acceleration(v, at.linearized.jacobian @ v) is not None
    assert same(values(objective.parameters()), before)


def test_no_acceleration_where_the_residual_cannot_be_had():
    objective = Objective(build("tanh"), [TERMS["allen_cahn"]], [points(5)])
    at = situation(objective, 1e-1)
    v = random_velocity(objective, 1e200)  # beyond what the residual bears
    assert at.acceleration(v, at.linearized.jacobian @ v) is None
    without = Situation(at.linearized, at.gradient, at.inverse, 1e-1)
    assert without.acceleration(v, at.linearized.jacobian @ v) is None


def test_the_residual_falls_alike_in_all_points_along_the_curve():
    """r̃(θ(τ)) = (1 - τ) r̃ to the third order in τ; along the tangent to the second."""
    objective = Objective(build("tanh"), [TERMS["allen_cahn"]], [points(4)])
    at = situation(objective, 1e-9)
    v = at.step()
    a = at.acceleration([0.01 * p for p in v], [0.01 * r for r in at.linearized.jacobian @ v])
    (residual,) = at.linearized.residual
    errors = {}
    for tau in (0.02, 0.01):
        for bend in (0.0, 1e4):  # of a velocity of a hundredth
            update = [tau * p + 0.5 * tau**2 * bend * q for p, q in zip(v, a, strict=True)]
            (there,) = at.residual_at(update, 1.0)
            errors[tau, bend] = float((there - (1 - tau) * residual).norm())
    assert 3.5 < errors[0.02, 0.0] / errors[0.01, 0.0] < 4.5
    assert 6 < errors[0.02, 1e4] / errors[0.01, 1e4] < 10
    assert errors[0.01, 1e4] < 0.2 * errors[0.01, 0.0]


def steps_to(goal: float, objective: LeastSquaresFit, accelerate: bool) -> int:
    stepper = optimizer(objective.parameters, dense, Damped(1e-8), accelerate=accelerate)
    for step in range(100):
        if stepper.step(objective).new_loss < goal:
            return step + 1
    raise AssertionError("not reached")


def test_a_bent_valley_takes_fewer_steps_along_the_curve():
    curve, tangent = (
        steps_to(1e-20, fit(rosenbrock, -1.2, 1.0), accelerate) for accelerate in (True, False)
    )
    assert curve <= 4
    assert tangent >= 3 * curve


# --- how far --------------------------------------------------------------------------------------


METHODS = {
    "cheaper side": (MatrixFreeGaussNewton(), CheaperSide(1e-2)),
    "dense": (GaussNewton(), Damped(1e-2)),
    "blocks": (BlockDiagonalGaussNewton(), Damped(1e-2)),
    "diagonal": (DiagonalGaussNewton(), Damped(1e-2)),
    "kfac": (KFAC(), FactorDamping(1e-2)),
    "kfac, exact inverse": (KFAC(), Damped(1e-2)),
    "ekfac": (EKFAC(), Damped(1e-2)),
    "subspace": (SubspaceGaussNewton(points=6), InSubspace(1e-2)),
    "cg": (MatrixFreeGaussNewton(), PreconditionedCG(1e-2)),
}


@pytest.mark.parametrize("accelerate", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_never_rises(name, accelerate):
    """With any curvature and inverse; what a record says of the loss is the loss."""
    model = network(2, 6, 1)
    objective = poisson(model)
    stepper = optimizer(model.parameters(), *METHODS[name], accelerate=accelerate)
    first = loss = objective.loss().item()
    for _ in range(6):
        record = stepper.step(objective)
        assert record.loss == pytest.approx(loss, rel=1e-12)
        assert record.new_loss <= record.loss
        loss = objective.loss().item()
        assert record.new_loss == pytest.approx(loss, rel=1e-12)
    assert loss < 0.9 * first


def test_chunked_objectives_step_along_the_tangent():
    """What is recomputed cannot be looked at elsewhere: no curve, and one damping a step."""
    model, twin = network(2, 6, 1), network(2, 6, 1)
    chunked, whole = poisson(model, chunk_size=4), poisson(twin)
    left = optimizer(model.parameters())
    right = optimizer(twin.parameters(), accelerate=False, tries=1)
    for _ in range(5):
        record, other = left.step(chunked), right.step(whole)
        assert record.new_loss == pytest.approx(other.new_loss, rel=1e-6)
        assert record.damping == pytest.approx(other.damping, rel=1e-6)
        assert record.new_loss < record.loss


@pytest.mark.parametrize("kept", [False, True])
def test_objectives_of_ones_own(kept):
    objective = fit(rosenbrock, -1.2, 1.0, kept=kept)
    stepper = optimizer(objective.parameters, dense, Damped(1e-8), minimum=1e-10)
    losses = [stepper.step(objective).new_loss for _ in range(20)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-20


def test_a_search_starts_longer_than_the_last_step_was():
    """Downwards from twice that, and from four times that after one that was not shortened more."""
    objective = Obstacle(
        linear_fit(1.0, 2.0), lambda loss, d: math.inf if d > 0.1 * 5**0.5 else loss
    )
    objective.objective = KeptFit(objective.parameters, lambda p: p[0])
    stepper = optimizer(objective.parameters, dense, Damped(1e-9), accelerate=False)
    size = float(objective.start.norm())
    assert stepper.step(objective).scale == 2.0**-4
    tried = [d / size for d in objective.evaluated]
    assert tried[:5] == pytest.approx([1, 0.5, 0.25, 0.125, 0.0625])
    objective.evaluated.clear()
    objective.start = flat(objective.parameters)
    size = float(objective.start.norm())
    record = stepper.step(objective)
    assert objective.evaluated[0] / size == pytest.approx(0.125)
    assert record.scale == 2.0**-4


def test_rates_of_groups():
    """The update that is taken is the proposed one, times lr."""
    objective = fit(lambda theta: theta, 1.0, 2.0)
    stepper = optimizer([{"params": objective.parameters, "lr": 0.25}], dense, Damped(1e-12))
    record = stepper.step(objective)
    torch.testing.assert_close(flat(objective.parameters), torch.tensor([0.75, 1.5]).double())
    assert record.new_loss == pytest.approx(0.75**2 * record.loss)


def test_rates_of_groups_belong_to_the_search():
    """A mix of rates is no direction of descent at full length: the search must look at it."""
    model = network(2, 8, 1)
    objective = poisson(model)
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters()}]
    stepper = optimizer(groups)
    first, damping = objective.loss().item(), []
    for _ in range(10):
        record = stepper.step(objective)
        assert record.accepted
        assert record.new_loss == pytest.approx(objective.loss().item(), rel=1e-12)
        damping.append(record.damping)
    assert objective.loss().item() < 0.5 * first
    stepper.param_groups[0]["lr"] = stepper.param_groups[1]["lr"] = 1e-3  # as a schedule ends
    record = stepper.step(objective)
    assert record.accepted
    assert record.damping <= 10 * damping[-1]  # a short step for this reason asks for no damping


def test_momentum_comes_before_the_search():
    model = network(2, 6, 1)
    objective = poisson(model)
    stepper = CurvatureOptimizer(
        model.parameters(),
        MatrixFreeGaussNewton(),
        CheaperSide(1e-2),
        step_size=GeodesicFlow(),
        momentum=HeavyBall(0.5),
        max_halvings=0,
    )
    losses = [stepper.step(objective).new_loss for _ in range(6)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2 * losses[0]


# --- the damping ----------------------------------------------------------------------------------


def short_of(part: float, *start: float, kept: bool = True) -> Obstacle:
    """Return r(θ) = θ, whose loss is infinite beyond a part of the way to the minimum."""
    inner = fit(lambda theta: theta, *start, kept=kept)
    radius = part * float(flat(inner.parameters).norm())
    return Obstacle(inner, lambda loss, d: math.inf if d > radius else loss)


def test_damping_is_raised_in_the_step_and_kept():
    """No step of the first four dampings is short enough: τ / (1 + λ) <= 1e-3, τ >= 1 / 32."""
    objective = short_of(1e-3, 1.0, 2.0)
    stepper = optimizer(objective.parameters, dense, Damped(1e-2), accelerate=False)
    record = stepper.step(objective)
    assert record.accepted
    assert record.damping == pytest.approx(1e2)
    assert record.scale == 2.0**-4
    assert stepper.preconditioner.damping == pytest.approx(1e2)
    theta = (1 - 2.0**-4 / 101) * objective.start
    torch.testing.assert_close(flat(objective.parameters), theta)
    assert record.predicted_decrease == pytest.approx(record.loss - record.new_loss, rel=1e-6)


@pytest.mark.parametrize("tries", [1, 12])
def test_damping_is_raised_for_the_next_step_where_it_can_not_be_in_this(tries):
    """If the linearization is not kept, or one damping is to be tried, steps are lost instead."""
    objective = short_of(1e-3, 1.0, 2.0, kept=tries == 1)
    start = values(objective.parameters)
    stepper = optimizer(objective.parameters, dense, Damped(1e-2), accelerate=False, tries=tries)
    for damping in (1e-2, 1e-1, 1e0, 1e1):
        record = stepper.step(objective)
        assert not record.accepted
        assert record.new_loss == record.loss
        assert record.damping == pytest.approx(damping)
        assert same(values(objective.parameters), start)
    record = stepper.step(objective)
    assert record.accepted
    assert record.damping == pytest.approx(1e2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_loss_that_rises_everywhere(bad):
    """Rejected after all dampings, with the parameters as they were, bit for bit."""
    inner = poisson(network())
    objective = Obstacle(inner, lambda loss, d: bad)
    before = values(objective.parameters)
    stepper = optimizer(objective.parameters, tries=4)
    record = stepper.step(objective)
    assert not record.accepted
    assert record.scale == 0
    assert same(values(objective.parameters), before)
    assert record.damping == pytest.approx(10.0)  # of the last that was tried
    assert stepper.preconditioner.damping == pytest.approx(100.0)
    assert "loss" in record.reason
    objective.elsewhere = lambda loss, d: loss  # and it goes on once that is over
    assert stepper.step(objective).accepted


def test_damping_is_lowered_after_long_steps():
    """A linear problem takes full steps; the smallest damping is a setting."""
    objective = fit(lambda theta: theta, 1.0, 2.0)
    stepper = optimizer(objective.parameters, dense, Damped(1e-2), minimum=2e-5)
    dampings = [stepper.step(objective).damping for _ in range(5)]
    assert dampings == pytest.approx([1e-2, 1e-3, 1e-4, 2e-5, 2e-5])


def test_a_damping_below_the_smallest_is_left_alone():
    objective = fit(lambda theta: theta, 1.0, 2.0)
    stepper = optimizer(objective.parameters, dense, Damped(1e-6), minimum=1e-3)
    assert [stepper.step(objective).damping for _ in range(2)] == [1e-6, 1e-6]


def test_damping_never_reaches_zero():
    """From which no factor would raise it again."""
    model = network()
    objective = poisson(model)
    stepper = optimizer(model.parameters(), KFAC(), FactorDamping(1e-18))
    for _ in range(8):
        record = stepper.step(objective)
    assert record.damping >= 1e-20
    theta = short_of(1e-3, 1.0, 2.0)
    stepper = optimizer(
        theta.parameters, dense, Damped(0.0), accelerate=False, minimum=1e-12, tries=20
    )
    assert stepper.step(theta).accepted


@pytest.mark.parametrize(
    ("accelerate", "part", "lowered"),
    [(True, 0.3, True), (False, 0.3, True), (True, 0.1, True), (False, 0.1, False)],
)
def test_damping_is_lowered_where_a_short_step_is_straight(accelerate, part, lowered):
    """A quarter is long; a sixteenth is not, but the path of a linear residual does not bend."""
    objective = short_of(part, 1.0, 2.0)
    stepper = optimizer(objective.parameters, dense, Damped(1e-6), accelerate=accelerate)
    record = stepper.step(objective)
    assert record.scale == {0.3: 2.0**-2, 0.1: 2.0**-4}[part]
    expected = 1e-7 if lowered else 1e-6
    assert stepper.preconditioner.damping == pytest.approx(expected)


@pytest.mark.parametrize("kept", [True, False])
def test_a_step_after_one_that_was_much_shorter(kept):
    """The first length that is tried is none that raises the damping, nor is there none."""
    objective = fit(lambda theta: theta, 1.0, 2.0, kept=kept)
    stepper = optimizer(objective.parameters, dense, Damped(1e-6), shortest=0.5)
    stepper.preconditioner.state["halvings"] = 20
    record = stepper.step(objective)
    assert record.accepted
    assert record.scale == 0.5
    assert record.damping == 1e-6
    assert stepper.preconditioner.damping < 1e-6


@pytest.mark.parametrize(("calm", "after"), [(0.1, 1e-6), (0.13, 1e-7)])
def test_damping_is_kept_where_a_short_step_bends(calm, after):
    """r = (10 (y - x²), 1 - x): v = (2.2, -4.84) and a = (0, 2 · 2.2²) at (-1.2, 1), λ = 0.

    τ ‖a‖ / ‖v‖ = 0.114 for τ = 1/16
    """
    objective = Obstacle(fit(rosenbrock, -1.2, 1.0), lambda loss, d: math.inf if d > 0.5 else loss)
    stepper = optimizer(objective.parameters, dense, Damped(1e-6), calm=calm)
    record = stepper.step(objective)
    assert record.damping == 1e-6
    assert record.scale == 2.0**-4
    assert stepper.preconditioner.damping == pytest.approx(after)


def test_an_inverse_that_takes_more_damping_says_so():
    """Raising starts from what was taken, not from what was asked for."""
    model = network()
    objective = poisson(model)
    stepper = optimizer(model.parameters(), inverse=CheaperSide(1e-30))
    trace = MatrixFreeGaussNewton()(objective.linearize()).trace()
    taken = torch.finfo(torch.float64).eps * float(trace)
    record = stepper.step(objective)
    tens = math.log10(record.damping / taken)
    assert round(tens) >= 0
    assert tens == pytest.approx(round(tens), abs=1e-6)


def test_no_damping_for_what_is_below_the_rounding_of_the_loss():
    """At a minimum whose residual is not zero, nothing is to be gained: it is not looked for."""
    objective = fit(lambda theta: torch.cat([theta, theta.new_ones(1) + 0 * theta]), 1e-9)
    around = Obstacle(objective, lambda loss, distance: loss * (1 + 1e-15))
    stepper = optimizer(objective.parameters, dense, Damped(1e-6))
    record = stepper.step(around)
    assert record.loss == pytest.approx(0.5)
    assert not record.accepted
    assert record.damping == 1e-6
    assert len(around.evaluated) <= 8


# --- at the end, and what is refused --------------------------------------------------------------


def test_at_a_minimum():
    """A loss of zero: nothing moves, nothing fails, and no rule learns from it."""
    objective = fit(lambda theta: theta, 0.0, 0.0)
    stepper = optimizer(objective.parameters, dense, Damped(1e-2))
    record = stepper.step(objective)
    assert record.new_loss == record.loss == 0
    assert not record.accepted
    assert record.stalled
    assert stepper.preconditioner.damping == 1e-2


@pytest.mark.parametrize(
    "settings",
    [
        {"shortest": 0.0},
        {"shortest": 2.0},
        {"shortest": math.nan},
        {"factor": 1.0},
        {"tries": 0},
        {"minimum": 0.0},
        {"longest": math.nan},
        {"calm": -0.1},
        {"sufficient": 1.0},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="Must hold: 0 < shortest <= 1, factor > 1, tries >= 1"):
        GeodesicFlow(**settings)


def test_a_damping_rule_beside_it():
    with pytest.raises(ValueError, match=r"set by one part, got the step size GeodesicFlow.*Leave"):
        CurvatureOptimizer(
            network().parameters(),
            MatrixFreeGaussNewton(),
            CheaperSide(1e-2),
            step_size=GeodesicFlow(),
            damping_rule=ShortStepDamping(),
        )


def test_the_inverse_must_have_a_damping_to_set():
    class Stubborn:
        damping = 1e-2

        def __call__(self, operator):
            return operator.inverse(1e-2)

    with pytest.raises(TypeError, match="the inverse must be a dataclass with a field damping, go"):
        optimizer(network().parameters(), inverse=Stubborn())


def test_a_proposal_of_no_search():
    """Defaults say that nothing was shortened, and nothing is to change."""
    proposal = Proposal(1.0)
    assert (proposal.scale, proposal.next_damping) == (1.0, None)
