"""What is right passes the verification; what is wrong is caught, and named."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from pinncurv.curvature import KFAC, DiagonalGaussNewton, GaussNewton, MatrixFreeGaussNewton
from pinncurv.curvature.hessian import Hessian
from pinncurv.diffops import Derivative, DifferentialOperator, Laplacian, Value
from pinncurv.jets import register_elementwise, register_rule
from pinncurv.linearization.spelled import Spelled
from pinncurv.linops import DenseLinearOperator, SymmetricLinearOperator
from pinncurv.problems import Fixed, LossTerm
from pinncurv.verification import (
    Check,
    Report,
    VerificationError,
    gauss_newton,
    hessian,
    verify,
    verify_activation,
    verify_curvature,
    verify_network,
    verify_operator,
    verify_term,
)
from tests import oracles
from tests.networks import build, points
from tests.terms import TERMS


def failed(report: Report) -> list[str]:
    """Return what failed, without the subject."""
    return [check.name.partition(": ")[2] for check in report.failures]


def message(report: Report, name: str) -> str:
    """Return what one failed check says."""
    (check,) = [check for check in report.failures if check.name.endswith(name)]
    return check.message


def term_of(residual, operators=None, **options) -> LossTerm:
    return LossTerm(operators or {"u": Value()}, residual, Fixed(points()), **options)


# --- what is right --------------------------------------------------------------------------------


def test_brute_force_agrees_with_the_oracles_of_the_tests():
    model, terms = build("gated"), [TERMS["anisotropic"], TERMS["data"], TERMS["log_fokker_planck"]]
    batch = [points(), points(), points(4)]
    oracles.assert_close(
        gauss_newton(model, terms, batch), oracles.gauss_newton(terms, model, batch)
    )
    one, x = [TERMS["poisson"]], [points(1)]
    nested = torch.func.hessian(lambda p: oracles.loss(one, model, x, p))(oracles.trainable(model))
    oracles.assert_close(
        hessian(model, one, x)[:6, :6], nested["u.weight"]["u.weight"].reshape(6, 6)
    )


def test_a_whole_problem():
    """Float32, more points than are used, weights and data per point."""
    model = build("residual").float()
    before = [parameter.clone() for parameter in model.parameters()]
    x = points(7).float()
    data = TERMS["data"]
    terms = [
        dataclasses.replace(TERMS["anisotropic"], weight=torch.arange(7.0)),
        dataclasses.replace(data, data={"observed": x[:, :1], "sign": torch.ones(7).long()}),
    ]
    report = verify(model, terms, [x, x], curvature=GaussNewton(), exact=gauss_newton)
    assert report.passed, str(report.raise_if_failed())
    assert all(map(torch.equal, model.parameters(), before))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert len(report.checks) > 50
    assert str(report).endswith("all checks passed, but 1 skipped")


@pytest.mark.parametrize("kind", ["repeated", "fourier", "tokens", "no_bias"])
def test_networks(kind):
    verify_network(build(kind), points(5)).raise_if_failed()


def test_a_network_that_starts_at_zero_and_one_without_parameters():
    model = build("tanh")
    nn.init.zeros_(model[-1].weight)
    verify_network(model, points()).raise_if_failed()
    verify_network(lambda x: torch.sin(x[:, :1]) * x[:, 1:].exp(), points()).raise_if_failed()
    verify_network(build("tanh").requires_grad_(False), points()).raise_if_failed()


@pytest.mark.parametrize(
    ("curvature", "options"),
    [
        (KFAC(), {}),
        (MatrixFreeGaussNewton(), {"exact": gauss_newton}),
        (Hessian(), {"exact": hessian, "semidefinite": False}),
        (DiagonalGaussNewton(), {}),
    ],
)
def test_curvatures(curvature, options):
    terms, model = [TERMS["poisson"], TERMS["value"]], build("gelu")
    report = verify_curvature(curvature, model, terms, [points(2), points(2)], **options)
    report.raise_if_failed()
    assert sum("inverse(damping" in check.name for check in report.checks) == 3


@pytest.mark.parametrize("function", [torch.tanh, torch.square, nn.GELU(), nn.Softplus(beta=2.0)])
def test_activations(function):
    report = verify_activation(function).raise_if_failed()
    assert "f'''' by a double backward pass through f''" in str(report)


def test_activation_on_an_interval():
    verify_activation(torch.log, 0.1, 2.0).raise_if_failed()
    assert "not finite" in str(verify_activation(torch.log, -1.0, 1.0))


# --- activations ----------------------------------------------------------------------------------


def cubic(x: Tensor) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(cubic, (x,), x)
    return x**3


def unregistered(x: Tensor) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(unregistered, (x,), x)
    return x**3


@pytest.mark.parametrize(
    ("curvature", "third", "names"),
    [
        (
            5.0,
            6.0,
            ["f'' of the jet", "behind a linear map: Laplacian"],
        ),
        (6.0, 7.0, ["f''' by a backward pass through f''"]),
    ],
)
def test_wrong_derivative(curvature, third, names):
    def cubic(x: Tensor) -> Tensor:
        if has_torch_function_unary(x):
            return handle_torch_function(cubic, (x,), x)
        return x**3

    @register_elementwise(cubic)
    def derivatives(x):
        yield from (x**3, 3 * x**2, curvature * x, torch.full_like(x, third))

    report = verify_activation(cubic)
    assert set(names) <= set(failed(report)), str(report)
    assert "f' of the jet" not in failed(report)
    factor = curvature / 6 if curvature != 6 else third / 6
    assert f"it is {factor:.6g} times what is right" in message(report, names[0])
    M = points(2)
    wrong = verify_network(lambda x: cubic(x @ M), points())
    assert ("operator 'laplacian', Laplacian" in failed(wrong)) == (curvature != 6)


def test_activation_without_a_rule():
    report = verify_activation(unregistered)
    assert failed(report) == ["accepts a jet"]
    assert "No jet rule for" in message(report, "accepts a jet")


def test_activation_that_loses_shape_or_dtype():
    report = verify_activation(lambda x: torch.tanh(x).to(torch.float64).flatten(1))
    assert failed(report) == [
        "keeps the shape ['N', 1], dtype and device",
        "keeps the shape ['N', 3], dtype and device",
        "keeps the shape ['N', 2, 3], dtype and device",
    ]


# --- networks -------------------------------------------------------------------------------------


class TwoBranches(nn.Module):
    """A network with a branch that is used in some way."""

    def __init__(self, use) -> None:
        super().__init__()
        self.main, self.branch, self.use = build("tanh"), build("gelu", seed=1), use

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + self.use(self.branch, x)


def without_grad(branch: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return branch(x)


@pytest.mark.parametrize(
    ("use", "faults"),
    [(lambda branch, x: branch(x).detach(), []), (without_grad, ["can be evaluated"])],
)
def test_detached_branch(use, faults):
    """Its parameters are named; autograd that is switched off is refused besides."""
    report = verify_network(TwoBranches(use), points())
    assert "branch.0.weight, branch.0.bias" in message(
        report, "every parameter influences the output"
    )
    assert "main" not in message(report, "every parameter influences the output")
    assert failed(report) == [*faults, "every parameter influences the output"]


def test_unused_branch():
    report = verify_network(TwoBranches(lambda branch, x: 0 * x[:, :1]), points())
    assert failed(report) == ["every parameter influences the output"]


def test_parameter_outside_linear_layers():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.factor = build("tanh"), nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * self.net(x)

    report = verify_network(Scaled(), points()).raise_if_failed()
    assert "network: Jacobian in 'factor'" in [check.name for check in report.checks]


def scaled_product(x: Tensor, y: Tensor) -> Tensor:
    if has_torch_function_unary(x):
        return handle_torch_function(scaled_product, (x, y), x, y)
    return x * y


@register_rule(scaled_product)
def without_mixed_term(x, y):
    """The product rule of a novice: (ab)'' = a'' b + a b''."""
    data = x.channels * y.channels[:1] + x.channels[:1] * y.channels
    data[0] = x.channels[0] * y.channels[0]
    return x.like(data)


def test_wrong_rule():
    report = verify_network(lambda x: scaled_product(x[:, :1].sin(), x[:, 1:] + x[:, :1]), points())
    assert "operator 'laplacian', Laplacian" in failed(report)
    assert "operator 'gradient', Gradient" not in failed(report)


def test_network_that_mixes_points():
    """Jets refuse the mean over points; a hidden statistic passes them and is caught."""
    report = verify_network(nn.Sequential(build("tanh"), nn.BatchNorm1d(1).double()), points())
    assert not report.passed
    model = build("tanh")
    report = verify_network(lambda x: model(x) * x.shape[0], points())
    assert "points do not mix" in failed(report)


# --- loss terms -----------------------------------------------------------------------------------


def test_residual_that_mixes_points():
    report = verify_term(
        term_of(lambda x, u: u - u.mean(0), name="centered"), build("tanh"), points()
    )
    assert "term 'centered': points do not mix" in [check.name for check in report.failures]
    assert "residual" in failed(report)
    assert "operator 'u', Value" not in failed(report)


@dataclass(frozen=True)
class Wave(DifferentialOperator):
    """u_tt - c² u_xx, where the square is forgotten."""

    speed: float

    def requests(self, x: Tensor) -> dict[str, Derivative]:
        basis = tuple(torch.eye(2, dtype=x.dtype))
        return {"wave": Derivative(basis, {(0, 0): 1.0, (1, 1): -self.speed})}

    def read(self, x: Tensor, derivatives) -> Tensor:
        return derivatives["wave"]


def wave(u, x: Tensor) -> Tensor:
    H = torch.func.hessian(u)(x)
    return H[..., 0, 0] - 0.49 * H[..., 1, 1]


def test_own_operator():
    """Its declared derivatives are checked; its meaning if there is a reference."""
    model, x = build("tanh"), points()
    term = term_of(lambda x, w: w, {"w": Wave(0.7)}, name="wave")
    declared = verify_term(term, model, x).raise_if_failed()
    (skipped,) = [check for check in declared.checks if check.passed is None]
    assert "pass references={'w': lambda u, x: ...}" in skipped.message
    report = verify_term(term, model, x, references={"w": wave})
    assert {"operator 'w', Wave", "residual", "Jacobian in '0.weight'"} <= set(failed(report))
    right = term_of(lambda x, w: w, {"w": Wave(0.49)}, name="wave")
    report = verify(model, [right], [x], references={"w": wave})
    assert report.passed
    assert all(check.passed for check in report.checks if "wave" in check.name)


class WrongLaplacian(Laplacian):
    """A shipped operator, redefined with an error of a factor."""

    def read(self, x: Tensor, derivatives) -> Tensor:
        return 2 * derivatives["u"]


def test_factor_in_an_operator():
    term = term_of(lambda x, lap: lap, {"lap": WrongLaplacian()})
    report = verify_term(term, build("tanh"), points())
    assert message(report, "operator 'lap', WrongLaplacian") == "it is 2 times what is right"


def test_term_that_can_not_be_evaluated():
    term = term_of(lambda x, u: u @ torch.ones(5), name="bad")
    report = verify_term(term, build("tanh"), points())
    assert failed(report) == ["can be evaluated"]
    assert "raised" in message(report, "can be evaluated")


# --- operators and curvatures ---------------------------------------------------------------------


def psd(D: int = 6) -> Tensor:
    X = points(D, D)
    return X @ X.T + torch.eye(D).double()


class Asymmetric(DenseLinearOperator):
    def _matmat(self, X):
        Y = super()._matmat(X)
        Y[0] = Y[0] + 0.1 * X[1].sum(0)
        return Y


class WritesToItsArgument(DenseLinearOperator):
    def _matmat(self, X):
        Y = super()._matmat(X)
        X[0].mul_(2)
        return Y


class WrongTrace(DenseLinearOperator):
    def trace(self):
        return self.matrix.trace() / 6


class WrongInverse(DenseLinearOperator):
    def inverse(self, damping):
        return super().inverse(2 * damping)


class NoInverse(SymmetricLinearOperator):
    def _matmat(self, X):
        return [3 * x for x in X]


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (Asymmetric, ["is the right matrix", "symmetric", "adjoint"]),
        (WritesToItsArgument, ["arguments are not written to"]),
        (WrongTrace, ["trace()"]),
        (WrongInverse, ["inverse(damping"]),
    ],
)
def test_wrong_operators(kind, names):
    report = verify_operator(kind(psd(), [(2, 2), (2,)]), psd())
    for name in names:
        assert any(name in each for each in failed(report)), str(report)
    good = verify_operator(DenseLinearOperator(psd(), [(2, 2), (2,)]), psd()).raise_if_failed()
    assert "product with a list (matrix)" in str(good)


def test_indefinite_and_singular_operators():
    matrix = psd() - 2 * psd().trace() * torch.eye(6).double() / 6
    operator = DenseLinearOperator(matrix, [(6,)])
    assert "positive semidefinite" in failed(verify_operator(operator))
    report = verify_operator(operator, semidefinite=False)
    assert all("inverse" in name for name in failed(report)), "DenseLinearOperator clips"
    zero = verify_operator(DenseLinearOperator(0 * psd(), [(6,)]))
    zero.raise_if_failed()
    nan = verify_operator(DenseLinearOperator(psd().log().mul(torch.nan), [(6,)]))
    assert "36 of 36 are not" in message(nan, "product with the identity")


def test_operator_without_inverse():
    report = verify_operator(NoInverse([(2, 2)], torch.device("cpu"), torch.float64))
    assert report.passed
    skipped = [check for check in report.checks if check.passed is None]
    assert len(skipped) == 3
    assert "CGInverseLinearOperator" in skipped[0].message


def gauss_newton_divided_by_points(linearizations):
    exact = GaussNewton()(linearizations)
    return DenseLinearOperator(exact.matrix / len(linearizations[0].x), exact.shapes)


def gauss_newton_of_first_term(linearizations):
    return MatrixFreeGaussNewton()(linearizations[:1])


def scaled_by_last_chunk(linearizations):
    """What should be summed over the chunks is overwritten by each."""
    exact = GaussNewton()(linearizations)
    *_, chunk = linearizations[0]
    return DenseLinearOperator(exact.matrix * chunk.residual.square().sum(), exact.shapes)


@pytest.mark.parametrize(
    ("curvature", "name"),
    [
        (gauss_newton_divided_by_points, "duplicated points change nothing"),
        (gauss_newton_of_first_term, "every term twice is as good as its weight doubled"),
        (scaled_by_last_chunk, "chunk_size=1 changes nothing"),
    ],
)
def test_curvatures_that_scale_wrongly(curvature, name):
    terms, batch = [TERMS["poisson"], TERMS["value"]], [points(), points()]
    report = verify_curvature(curvature, build("tanh"), terms, batch)
    assert name in failed(report), str(report)


def test_curvature_that_is_a_multiple_of_what_it_should_be():
    terms, batch = [TERMS["poisson"]], [points()]
    report = verify(
        build("tanh"), terms, batch, curvature=gauss_newton_divided_by_points, exact=gauss_newton
    )
    assert message(report, "is the right matrix") == "it is 0.333333 times what is right"
    assert all(check.name.startswith("curvature") for check in report.failures)


def test_curvature_on_other_parameters():
    def one_vector(linearizations):
        return DenseLinearOperator(GaussNewton()(linearizations).matrix, [(25,)])

    report = verify_curvature(one_vector, build("tanh"), [TERMS["poisson"]], [points()])
    assert failed(report) == ["acts on the trainable parameters"]
    assert "acts on [[25]], the parameters are [[3, 2]" in message(report, "trainable parameters")


# --- what torch cannot ---


class Between(nn.Module):
    """Calls a function between two layers."""

    def __init__(self, function) -> None:
        super().__init__()
        self.first, self.function, self.last = nn.Linear(2, 6), function, nn.Linear(6, 1)

    def forward(self, x):
        return self.last(self.function(torch.tanh(self.first(x))))


def attention(h, **options):
    h = h.view(-1, 1, 3, 2)
    return functional.scaled_dot_product_attention(h, h.sin(), h, **options).flatten(1)


MASK = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).bool()
SPELLED = {
    "LayerNorm": nn.LayerNorm(6),
    "GroupNorm": nn.GroupNorm(2, 6),
    "attention": attention,
    "causal": lambda h: attention(h, is_causal=True, scale=0.7),
    "mask": lambda h: attention(h, attn_mask=MASK),
    "added mask": lambda h: attention(h, attn_mask=MASK.double()),
    "normalize": lambda h: functional.normalize(h, dim=1),
    "norm": lambda h: h / h.norm(dim=1, keepdim=True),
    "linalg.norm": lambda h: h / torch.linalg.norm(h, dim=1, keepdim=True),
    "vector_norm": lambda h: h / torch.linalg.vector_norm(h, 4, 1, True),
    "cosine": lambda h: h * functional.cosine_similarity(h, h.sin(), dim=1)[:, None],
    "std": lambda h: h / h.std(1, keepdim=True),
}


@pytest.mark.parametrize("function", SPELLED)
@pytest.mark.filterwarnings("ignore:The second derivative of abs")  # of a norm that takes |x|
def test_what_torch_differentiates_wrongly_or_not_at_all(function):
    torch.manual_seed(0)
    report = verify_network(Between(SPELLED[function]), points())
    assert all(check.passed for check in report.checks), str(report)


@pytest.mark.parametrize("function", SPELLED)
def test_what_is_written_out_has_the_right_values(function):
    torch.manual_seed(0)
    model, x = Between(SPELLED[function]).double(), points()
    with Spelled():
        written_out = model(x)
    torch.testing.assert_close(written_out, model(x), rtol=1e-12, atol=0)


def test_where_brute_force_cannot_the_check_is_skipped():
    """Non-reentrant checkpoints set hooks, which torch.func refuses."""
    model = Between(lambda h: checkpoint(torch.sin, h, use_reentrant=False))
    report = verify(model, [TERMS["poisson"]], [points()], GaussNewton(), exact=gauss_newton)
    report.raise_if_failed()
    skipped = {check.name for check in report.checks if check.passed is None}
    assert "network: Jacobian in every parameter" in skipped
    assert "curvature: is the right matrix" in skipped
    assert "not checked: brute force raised RuntimeError: torch.func" in str(report)


# --- nothing raises -------------------------------------------------------------------------------


def test_nothing_raises():
    model, term, x = build("tanh"), TERMS["poisson"], points()

    def broken(linearizations):
        raise KeyError("no such layer")

    report = verify(model, [term], [x], curvature=broken)
    assert message(report, "could be verified") == "raised KeyError: 'no such layer'"
    assert "got 1 terms and 2 tensors" in str(verify(model, [term], [x, x]))
    for bad in (x[0], x[:, :1], x * torch.nan, x[:0]):
        assert not verify(model, [term], [bad], curvature=KFAC()).passed


def test_report():
    good, bad = Check("a: b", True, 1e-12, 1e-9), Check("a: c", False, 0.5, 1e-9, "it is wrong")
    note = Check("a: d", None, message="pass more")
    report = Report((good,)) + Report((note,))
    assert report.raise_if_failed() is report
    assert str(report).splitlines() == [
        "ok       1.0e-12 <= 1e-09  a: b",
        "skipped                    a: d",
        "                           pass more",
        "all checks passed, but 1 skipped",
    ]
    report += Report((bad,))
    assert not report.passed
    assert report.failures == (bad,)
    with pytest.raises(VerificationError, match=r"1 of 3 checks failed:\n.*a: c\n +it is wrong"):
        report.raise_if_failed()
