"""The loss on one batch, its gradient by every route, and the report on the parameters."""

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pinncurv import linearization
from pinncurv.curvature import KFAC, Objective, coverage
from pinncurv.diffops import Value
from pinncurv.linearization import linearize
from pinncurv.machine import Sizes
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.networks import KINDS, build, points
from tests.problems.shipped import GALLERY, SHIPPED
from tests.terms import TERMS

TERMS3 = [TERMS["log_fokker_planck"], TERMS["anisotropic"], TERMS["vector"]]
BATCH3 = [points(4, seed=3), points(3, seed=4), points(5, seed=5)]


def objective(kind="gated", chunk_size=None) -> Objective:
    return Objective(build(kind), TERMS3, BATCH3, chunk_size)


@pytest.mark.parametrize(
    ("kind", "chunk_size"),
    [(kind, None) for kind in KINDS]
    + [(kind, n) for kind in ("gated", "repeated", "tokens") for n in (1, 2, 4)],
)
def test_loss_and_gradient(kind, chunk_size):
    """Autograd of the oracle's loss, by three routes."""
    made = objective(kind, chunk_size)
    parameters = oracles.trainable(made.model)
    loss = oracles.loss(TERMS3, made.model, BATCH3, parameters)
    gradient = oracles.gradient(TERMS3, made.model, BATCH3)
    oracles.assert_close(made.loss().detach(), loss)
    by_autograd = torch.autograd.grad(made.loss(), list(made.model.parameters()))
    linearized = made.linearize()
    made.backward()
    for parameter, *received, wanted in zip(
        made.model.parameters(), by_autograd, linearized.gradient(), gradient, strict=True
    ):
        for tensor in (parameter.grad, *received):
            oracles.assert_close(tensor, wanted)


@pytest.mark.parametrize("name", [*SHIPPED, *GALLERY])
def test_gradient_of_shipped_problems(name):
    problem = (SHIPPED | GALLERY)[name]()
    model = build("tanh", problem.d_in, problem.d_out)
    sample = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    batch = [x[:2] for x in sample]
    made = Objective(model, problem.terms, batch)
    loss = oracles.loss(problem.terms, model, batch, oracles.trainable(model))
    oracles.assert_close(made.loss().detach(), loss)
    received = made.linearize().gradient()
    if problem.d_in > 20:  # third derivatives of 100 coordinates are too slow for the oracle
        made.loss().backward()
        wanted = [p.grad for p in model.parameters()]
    else:
        wanted = oracles.gradient(problem.terms, model, batch)
    for a, b in zip(received, wanted, strict=True):
        oracles.assert_close(a, b)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_losses_of_the_terms(chunk_size):
    made = objective(chunk_size=chunk_size)
    losses, linearized = made.term_losses(), made.linearize()
    assert list(losses) == ["log_fokker_planck", "anisotropic", "vector"]
    for term, x in zip(TERMS3, BATCH3, strict=True):
        expected = oracles.loss([term], made.model, [x], oracles.trainable(made.model))
        oracles.assert_close(losses[term.name].detach(), expected)
        assert linearized.term_losses[term.name] == pytest.approx(expected.item(), rel=1e-12)
    oracles.assert_close(sum(losses.values()).detach(), made.loss().detach())


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_residual_jacobian_and_gradient_agree(chunk_size):
    """∇L = Jᵀ r̃ and L = ½‖r̃‖²."""
    made = objective(chunk_size=chunk_size)
    linearized = made.linearize()
    residual = torch.cat([r.flatten() for r in linearized.residual])
    gradient = torch.cat([g.flatten() for g in linearized.gradient()])
    oracles.assert_close(0.5 * residual.square().sum(), made.loss().detach())
    oracles.assert_close(linearized.jacobian.adjoint() @ residual, gradient)
    again = torch.cat([g.flatten() for g in linearized.gradient()])
    assert torch.equal(again, gradient)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_gradient_after_or_before_a_curvature(chunk_size):
    """The gradient is summed up while a curvature is built; the order must not matter."""
    first, second = (objective(chunk_size=chunk_size).linearize() for _ in range(2))
    before = first.gradient()
    KFAC()(second.linearizations)
    next(iter(second.linearizations[0]))
    for a, b in zip(before, second.gradient(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_is_summed_up_once(monkeypatch):
    """It is taken along in the first pass that anybody makes."""
    reference = objective().linearize().gradient()
    passes = []
    evaluate = linearization.TermPart.evaluate
    monkeypatch.setattr(
        linearization.TermPart,
        "evaluate",
        lambda part, *a: (passes.append(len(part.x)), evaluate(part, *a))[1],
    )
    made = objective(chunk_size=2)
    passes.clear()
    linearized = made.linearize()
    KFAC()(linearized)
    once = len(passes)
    for a, b in zip(linearized.gradient(), reference, strict=True):
        torch.testing.assert_close(a, b)
    assert linearized.term_losses
    assert len(passes) == once


def test_gradient_within_an_unfinished_iteration():
    """An outer iteration holds the sums up, so the gradient takes a pass of its own."""
    linearized = objective(chunk_size=2).linearize()
    for _ in linearized.linearizations[0]:
        inside = linearized.gradient()
    for a, b in zip(inside, objective().linearize().gradient(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_pass_that_fails_does_not_corrupt_the_gradient():
    reference = objective(chunk_size=2).linearize().gradient()
    linearized = objective(chunk_size=2).linearize()

    def fail(t, chunk):
        if t == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        linearized.run(fail)
    for a, b in zip(linearized.gradient(), reference, strict=True):
        torch.testing.assert_close(a, b)


def test_loss_and_gradient_take_the_points_in_chunks():
    made = objective(chunk_size=2)
    sizes = [[len(chunk.residual) for chunk in term] for term in made.linearize()]
    assert sizes == [[2, 2], [2, 1], [2, 2, 1]]


def test_linearization_leaves_no_trace():
    made = objective()
    state = copy.deepcopy(made.model.state_dict())
    made.linearize().gradient()
    assert all(p.grad is None and p.requires_grad for p in made.model.parameters())
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert all(not g.requires_grad for g in made.linearize().gradient())


def test_loss_honours_no_grad():
    made = objective()
    with torch.no_grad():
        assert not made.loss().requires_grad
    assert made.loss().requires_grad


def test_backward_accumulates_like_that_of_torch():
    made = objective(chunk_size=2)
    losses = made.backward()
    for name, loss in made.term_losses().items():
        torch.testing.assert_close(losses[name], loss.detach())
        assert not losses[name].requires_grad
    once = [p.grad.clone() for p in made.model.parameters()]
    made.backward()
    for parameter, g in zip(made.model.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * g)


def test_second_derivative_of_the_loss():
    """The loss may be differentiated twice, for the full Hessian."""
    made = Objective(build("gelu"), TERMS3, BATCH3)
    parameters = list(made.model.parameters())
    gradient = torch.autograd.grad(made.loss(), parameters, create_graph=True)
    v = [torch.ones_like(p) for p in parameters]
    inner = sum((g * w).sum() for g, w in zip(gradient, v, strict=True))
    received = torch.autograd.grad(inner, parameters)
    names = list(oracles.trainable(made.model))

    def slope(p):
        loss = oracles.loss(TERMS3, made.model, BATCH3, p)
        return loss

    values = oracles.trainable(made.model)
    ones = {name: torch.ones_like(value) for name, value in values.items()}
    h = 1e-5
    shifted = [
        torch.func.jacrev(slope)({n: values[n] + s * h * ones[n] for n in names}) for s in (1, -1)
    ]
    for name, hv in zip(names, received, strict=True):
        finite = (shifted[0][name] - shifted[1][name]) / (2 * h)
        oracles.assert_close(hv, finite, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_evaluation_that_is_linearized_later(chunk_size):
    """The loss comes with the linearization, at the cost of one of them."""
    made = objective(chunk_size=chunk_size)
    evaluation = made.evaluate()
    assert evaluation.loss == pytest.approx(made.loss().item(), rel=1e-12)
    linearized = evaluation.linearize()
    for a, b in zip(linearized.gradient(), made.linearize().gradient(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("term", ["point_tensors", "anisotropic", "data"])
def test_blocks_of_points_are_invisible(term, monkeypatch):
    """Large batches are cut into blocks that stay in the cache; here each point is one."""
    made = Objective(build("gated"), [TERMS[term]], [points()])
    loss, gradient = made.loss(), made.linearize().gradient()
    monkeypatch.setattr("pinncurv.machine.sizes._CPU", Sizes(1, 1 << 22, 256, 128))
    made = Objective(made.model, made.terms, made.points)
    torch.testing.assert_close(made.loss(), loss)
    torch.testing.assert_close(made.linearize().gradient(), gradient)
    made.backward()
    torch.testing.assert_close([p.grad for p in made.model.parameters()], gradient)


def measured(y: Tensor, captured: bool) -> LossTerm:
    """A term that fits measurements y at fixed points."""
    if captured:
        return LossTerm({"u": Value()}, lambda x, u: u - y, Fixed(points(len(y))), name="fit")
    return LossTerm(
        {"u": Value()}, lambda x, u, y: u - y, Fixed(points(len(y))), name="fit", data={"y": y}
    )


def test_data_in_a_large_batch():
    """Several blocks, by their natural size; single precision data in a double network."""
    model, x = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1)).double(), points(9000)
    made = Objective(model, [measured(x[:, :1].float(), captured=False)], [x])
    assert len(list(made.linearize().linearizations[0])) > 1
    expected = 0.5 * (model(x) - x[:, :1].float()).square().mean()
    torch.testing.assert_close(made.loss(), expected)
    gradient = torch.autograd.grad(expected, list(model.parameters()))
    made.backward()
    for parameter, received, wanted in zip(
        model.parameters(), made.linearize().gradient(), gradient, strict=True
    ):
        oracles.assert_close(parameter.grad, wanted)
        oracles.assert_close(received, wanted)


def test_captured_data_in_a_large_batch_raise():
    model, x = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1)).double(), points(9000)
    message = r"Term 'fit': .* N = 16 points .* size of tensor a .* Pass tensors .* by data="
    with pytest.raises(ValueError, match=message) as caught:
        Objective(model, [measured(x[:, :1], captured=True)], [x]).linearize()
    assert isinstance(caught.value.__cause__, RuntimeError)


# --- bad input ------------------------------------------------------------------------------------


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="one tensor of points for each, got 3 terms and 2"):
        Objective(build("tanh"), TERMS3, BATCH3[:2])
    with pytest.raises(ValueError, match="one or more terms"):
        Objective(build("tanh"), [], [])


def test_names_must_differ():
    with pytest.raises(ValueError, match="names of the terms must differ"):
        Objective(build("tanh"), [TERMS["value"]] * 2, [points()] * 2)


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        objective(chunk_size=0)


def test_points_must_fit():
    bad = points()
    bad[0, 0] = torch.nan
    for x, message in [
        (bad, r"Term 'value'.*NaN"),
        (points()[:0], r"Term 'value'.*no points"),
        (points().float(), r"float32 .*term 'value'"),
        (points(3, 3), r"Term 'value'.*got shape \[3, 3\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            Objective(build("tanh"), [TERMS["value"]], [x])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_parameters_must_be_finite(bad):
    model = build("tanh")
    with torch.no_grad():
        model[2].bias[1] = bad
    with pytest.raises(FloatingPointError, match=r"must be finite, but 2\.bias contains"):
        Objective(model, [TERMS["value"]], [points()])


def test_data_must_match_the_points():
    with pytest.raises(
        ValueError, match=r"'fit': data 'y' must have one row .* N = 3, got .*\[4, 1"
    ):
        Objective(build("tanh"), [measured(points(4, 1), captured=False)], [points(3)])


def test_weights_must_match_the_points():
    term = TERMS["anisotropic"]
    with pytest.raises(ValueError, match=r"Term 'anisotropic'.*shape \[4\]"):
        Objective(build("tanh"), [term], [points(4)])


# --- coverage -------------------------------------------------------------------------------------


def test_coverage_report():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(2, 3), nn.Linear(3, 3, bias=False)
            self.head, self.spare = nn.Linear(3, 1), nn.Linear(2, 2)
            self.head.requires_grad_(False)

        def forward(self, x):
            h = torch.tanh(self.first(x))
            return self.head(self.shared(torch.tanh(self.shared(h))))

    model, x = Net().double(), points()
    terms = [TERMS["poisson"], TERMS["value"]]
    for chunk_size in (None, 2):
        report = coverage(model, [linearize(t, model, x, chunk_size=chunk_size) for t in terms])
        assert str(report).splitlines() == [
            "first.weight [3, 2]: weight in poisson (S = 4), value (S = 1)",
            "first.bias [3]: bias in poisson (S = 4), value (S = 1)",
            "shared.weight [3, 3]: weight in poisson (S = 8), value (S = 2)",
            "head.weight [1, 3]: frozen",
            "head.bias [1]: frozen",
            "spare.weight [2, 2]: unused",
            "spare.bias [2]: unused",
        ]
    assert [p.treatment for p in report.parameters].count("unused") == 2
    assert report.parameters[2].channels == {"poisson": 8, "value": 2}


def test_scale_of_the_loss():
    """Weights and 1/N once and only once."""
    term, x = TERMS["vector"], points()
    model = build("tanh")
    loss = Objective(model, [term], [x]).loss()
    heavy = dataclasses.replace(term, weight=1.4)
    torch.testing.assert_close(Objective(model, [heavy], [x]).loss(), 2 * loss)
    torch.testing.assert_close(Objective(model, [term], [torch.cat([x, x])]).loss(), loss)
    r = term.evaluate(model, x)
    torch.testing.assert_close(loss, 0.7 * r.square().sum() / (2 * 3))
