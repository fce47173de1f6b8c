"""Loss terms: what they compute, and that a wrong declaration is an error that helps."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pinncurv.diffops import Gradient, Laplacian, Partial, Value
from pinncurv.problems import Box, Fixed, LossTerm, dirichlet
from pinncurv.problems.signature import check_data, check_operators

POINTS = Box.unit(2).interior(5)
STAYING = Fixed(torch.rand(5, 2, generator=torch.Generator().manual_seed(1)))


def _model(generator: torch.Generator, d_out: int = 1) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, d_out)).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -1, 1, generator=generator)
    return model


def _x(generator: torch.Generator, n: int = 5) -> Tensor:
    return torch.rand(n, 2, generator=generator, dtype=torch.float64)


def _term(residual: Callable[..., Tensor] = lambda x, u: u, **arguments: object) -> LossTerm:
    return LossTerm(
        **{"operators": {"u": Value()}, "points": POINTS, **arguments}, residual=residual
    )


def test_residual_gets_points_and_values(generator: torch.Generator) -> None:
    """A new PDE is one object: Allen-Cahn, against torch.func."""
    term = LossTerm(
        operators={"u": Value(), "u_t": Partial(0), "lap_u": Laplacian(dims=[1])},
        residual=lambda x, u, u_t, lap_u: u_t - 0.01 * lap_u + 5 * (u**3 - u) + x[:, :1],
        points=POINTS,
    )
    model, x = _model(generator), _x(generator)

    def single(point: Tensor) -> Tensor:
        return model(point[None])[0, 0]

    def expected(point: Tensor) -> Tensor:
        u, first = single(point), torch.func.grad(single)(point)
        second = torch.func.hessian(single)(point)[1, 1]
        return first[0] - 0.01 * second + 5 * (u**3 - u) + point[0]

    residual = term.evaluate(model, x)
    assert residual.shape == (5, 1)
    torch.testing.assert_close(residual[:, 0], torch.func.vmap(expected)(x), rtol=1e-12, atol=1e-12)


def test_one_dimensional_residual_is_a_column(generator: torch.Generator) -> None:
    """[N] counts as [N, 1]; components are kept."""
    model, x = _model(generator), _x(generator)
    column = _term().evaluate(model, x)
    assert torch.equal(_term(lambda x, u: u[:, 0]).evaluate(model, x), column)
    gradient = _term(lambda x, g: g[:, 0], operators={"g": Gradient()})
    assert gradient.evaluate(model, x).shape == (5, 2)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_as_many_components_as_points_are_fine(n: int, generator: torch.Generator) -> None:
    """A residual that really has N components is not taken for a broadcast."""
    model, x = _model(generator, d_out=n), _x(generator, n)
    torch.testing.assert_close(_term().evaluate(model, x), model(x))


@pytest.mark.parametrize("n", [2, 5])
def test_broadcast_to_all_pairs_of_points(n: int, generator: torch.Generator) -> None:
    """[N] against [N, 1] is the classical bug."""
    term = _term(lambda x, u: u - x.sum(1), name="interior")
    with pytest.raises(
        ValueError,
        match=rf"'interior': .* shape \[{n}, {n}\] .* but 1 component\(s\) .* \[N\] was broadcast "
        r"against one of shape \[N, 1\] .* f\[:, None\]",
    ):
        term.evaluate(_model(generator), _x(generator, n))


@pytest.mark.parametrize(
    ("residual", "shape"),
    [
        (lambda x, u: u.mean(), r"\[\]"),
        (lambda x, u: u[:2], r"\[2, 1\]"),
        (lambda x, u: u[:, :, None], r"\[5, 1, 1\]"),
    ],
    ids=["scalar", "fewer rows", "three dimensions"],
)
def test_residual_of_wrong_shape(
    residual: Callable[..., Tensor], shape: str, generator: torch.Generator
) -> None:
    """The residual keeps the points as first dimension."""
    with pytest.raises(
        ValueError,
        match=rf"'term': .* N = 5 points, got {shape} from values of shapes {{'u': \[5, 1",
    ):
        _term(residual).evaluate(_model(generator), _x(generator))


def test_apply_takes_given_values(generator: torch.Generator) -> None:
    """The residual function alone, on values that somebody else computed."""
    x, u = _x(generator), torch.rand(5, 1, generator=generator, dtype=torch.float64)
    assert torch.equal(_term(lambda x, u: u * x).apply(x, {"u": u}), u * x)


@pytest.mark.parametrize(
    "weight",
    [2, 0.25, torch.arange(5.0), lambda x: x[:, 0] ** 2, 0.0],
    ids=["int", "float", "tensor", "function", "zero"],
)
def test_loss_is_half_the_squared_scaled_residual(
    weight: float | Tensor | Callable[[Tensor], Tensor], generator: torch.Generator
) -> None:
    """1 / (2 N) sum_n w_n |r_n|^2, for every kind of weight and two components."""
    model, x = _model(generator, d_out=2), _x(generator)
    term = _term(weight=weight, points=STAYING)
    w = weight(x) if callable(weight) else torch.as_tensor(weight, dtype=torch.float64)
    expected = 0.5 * (w.expand(5) * (model(x) ** 2).sum(1)).mean()
    torch.testing.assert_close(0.5 * (term.scaled_residual(model, x) ** 2).sum(), expected)


def test_weights_follow_the_points(generator: torch.Generator) -> None:
    """Numbers stay numbers; tensors get the dtype of the points."""
    x = _x(generator)
    assert _term(weight=2).weights(x) == 2.0
    weights = _term(weight=torch.ones(5), points=STAYING).weights(x)
    assert isinstance(weights, Tensor)
    assert weights.dtype == torch.float64


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_bad_number_as_weight(weight: float) -> None:
    """A weight is finite and not negative."""
    with pytest.raises(ValueError, match=r"'term': a weight must be a finite number >= 0.* got"):
        _term(weight=weight)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_bad_entry_of_a_weight(bad: float, generator: torch.Generator) -> None:
    """So is every weight of a tensor, at construction, and of a function, when it is called."""
    match = rf"'term': weights must be finite and >= 0, got \[{bad}\] among 1 such of 5"
    weights = torch.tensor([1.0, 0.0, bad, 1.0, 1.0])
    with pytest.raises(ValueError, match=match):
        _term(weight=weights)
    with pytest.raises(ValueError, match=match):
        _term(weight=lambda x: weights).weights(_x(generator))


def test_number_of_weights(generator: torch.Generator) -> None:
    """There is one weight per point, in a vector."""
    x = _x(generator)
    with pytest.raises(ValueError, match=r"shape \[5\] or \[5, V\], got \[3\]. Pass a"):
        _term(weight=torch.ones(3), points=STAYING).weights(x)
    with pytest.raises(ValueError, match=r"per point and component, .* got \[5, 2, 1\]"):
        _term(weight=lambda x: x[..., None]).weights(x)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(5), r"matrix \[N, 2\], got shape \[5\]"),
        (torch.zeros(5, 3), r"matrix \[N, 2\], got shape \[5, 3\]"),
        (torch.zeros(0, 2), "N >= 1, got no points"),
        (torch.zeros(5, 2, dtype=torch.int64), r"floating point numbers, got torch.int64"),
        (torch.tensor([[0.0, math.nan], [0.0, 0.0]]), "infinity in 1 of 2 points"),
    ],
)
def test_check_points(x: Tensor, match: str) -> None:
    """Bad points are an error that names the term."""
    with pytest.raises(ValueError, match=f"Term 'data': points must form a .*{match}"):
        _term(name="data").check_points(x)


def test_good_points_pass(generator: torch.Generator) -> None:
    """Points from the term's own sampler are good, in both precisions."""
    for dtype in (torch.float32, torch.float64):
        _term().check_points(POINTS.sample(generator, dtype, "cpu"))


@pytest.mark.parametrize(
    ("residual", "match"),
    [
        (
            lambda x, u, u_tt: u,
            r"'term': .* residual\(x, u, u_t\), .* signature \(x, u, u_tt\) does not allow.* "
            r"Arguments without an operator: 'u_tt' \(did you mean 'u_t'\?\)\. "
            r"Operators without an argument: 'u_t' \(did you mean 'u_tt'\?\)\. Make the names",
        ),
        (lambda x, u: u, r"Operators without an argument: 'u_t'"),
        (lambda x, u, u_t, mu: u, r"Arguments without an operator: 'mu'\."),
        (lambda u, u_t: u, r"multiple values for argument 'u'"),
        (lambda: None, r"too many positional arguments"),
        (lambda *, u, u_t: u, r"too many positional arguments"),
    ],
    ids=["misspelt", "operator too many", "argument too many", "no x", "none", "keywords only"],
)
def test_signature_of_the_residual(residual: Callable[..., Tensor], match: str) -> None:
    """Names that disagree are found at construction, with what may have been meant."""
    with pytest.raises(ValueError, match=match):
        _term(residual, operators={"u": Value(), "u_t": Partial(0)})


@pytest.mark.parametrize(
    "residual",
    [
        lambda x, u, u_t: u,
        lambda x, *, u_t, u: u,
        lambda points, u, **rest: u,
        lambda *points, **values: values["u"],
        lambda x, /, u, u_t, scale=2.0: u,
        torch.add,  # written in C: the signature is unknown
    ],
    ids=["plain", "keywords", "rest", "anything", "default", "unknown"],
)
def test_accepted_signatures(residual: Callable[..., Tensor]) -> None:
    """Whatever can be called as residual(x, u=..., u_t=...) is accepted."""
    _term(residual, operators={"u": Value(), "u_t": Partial(0)})


@pytest.mark.parametrize("name", ["du/dt", "lambda", "1st", ""])
def test_names_of_operators(name: str) -> None:
    """Names must be usable as keyword arguments."""
    with pytest.raises(ValueError, match=rf"must be Python identifiers, .* got '{name}'. Rename"):
        _term(lambda x, **values: x, operators={name: Value()})


def test_bad_declarations() -> None:
    """No operators, or a class in place of an object."""
    with pytest.raises(ValueError, match="at least one operator, got none"):
        _term(lambda x: x, operators={})
    with pytest.raises(TypeError, match=r"'u' must be an object, got the class Value. Write Value"):
        check_operators("term", {"u": Value})


# --- data at the points ---------------------------------------------------------------------------


def _measured(**data: Tensor) -> LossTerm:
    return _term(lambda x, u, y: u - y, name="fit", data=data, points=STAYING)


def test_data_are_arguments_of_the_residual(generator: torch.Generator) -> None:
    """Next to the values, converted to the points' dtype unless they are no real numbers."""
    model, x = _model(generator), _x(generator)
    y, mask = torch.rand(5, 1, generator=generator), torch.tensor([1, 0, 1, 1, 0]).bool()
    data = {"y": y, "mask": mask}
    term = _term(lambda x, u, y, mask: mask[:, None] * (u - y), data=data, points=STAYING)
    torch.testing.assert_close(term.evaluate(model, x), mask[:, None] * (model(x) - y))
    converted = term.to(x)
    assert {name: t.dtype for name, t in converted.data.items()} == {
        "y": torch.float64,
        "mask": torch.bool,
    }
    assert converted.to(x) is converted


def test_data_at_a_part_of_the_points(generator: torch.Generator) -> None:
    """They are cut like the points; the term itself does not change."""
    model, x, y = _model(generator), _x(generator), _x(generator)[:, :1]
    term = _measured(y=y)
    part = slice(1, 3)
    torch.testing.assert_close(
        term.at(part).evaluate(model, x[part]), term.evaluate(model, x)[part]
    )
    assert term.data["y"] is y
    assert term.at(part).weight == term.weight


def test_data_broadcast_to_all_pairs_of_points(generator: torch.Generator) -> None:
    """[N] against [N, 1] is found for data as for anything else."""
    x = _x(generator)
    with pytest.raises(ValueError, match=r"'fit': .* 1 component\(s\) .* \[N\] was broadcast"):
        _measured(y=x[:, 0]).evaluate(_model(generator), x)


def test_data_for_other_points(generator: torch.Generator) -> None:
    """Found before any work, or by the residual."""
    x = _x(generator)
    term = _measured(y=x[:3, :1])
    with pytest.raises(
        ValueError, match=r"'fit': data 'y' must have one row per point, N = 5, got"
    ):
        term.check_points(x)
    with pytest.raises(
        ValueError, match=r"'fit': .* N = 5 points and values .* 'y': \[3, 1\]}: The size of tensor"
    ):
        term.evaluate(_model(generator), x)


@pytest.mark.parametrize(
    ("residual", "data", "match"),
    [
        (
            lambda x, u, y: u,
            {"z": torch.ones(5)},
            r"(?s)without an operator or data: 'y'.*Data.*'z'",
        ),
        (lambda x, u: u, {"y": torch.ones(5)}, r"Data without an argument: 'y'"),
        (lambda x, u: u, {"u": torch.ones(5)}, r"different names, got 'u' in both"),
        (lambda x, u, y: u, {"y": torch.tensor(1.0)}, r"data 'y' must have one row .* number"),
        (lambda x, u, **y: u, {"y-z": torch.ones(5)}, r"names of data must be .* got 'y-z'"),
    ],
    ids=["other name", "not accepted", "name of an operator", "number", "no identifier"],
)
def test_bad_data(residual: Callable[..., Tensor], data: dict[str, Tensor], match: str) -> None:
    """Found at construction."""
    with pytest.raises(ValueError, match=match):
        _term(residual, data=data)


def test_data_must_be_tensors() -> None:
    """Lists are not converted, since their dtype would be a guess."""
    with pytest.raises(TypeError, match=r"'term': data 'y' must be a tensor, got list"):
        check_data("term", {"y": [1.0, 2.0]}, ["u"])


# --- errors from inside the residual --------------------------------------------------------------


def test_dtype_of_the_residual(generator: torch.Generator) -> None:
    """Double precision constants in a float32 network are named, not handed on."""
    model, x = _model(generator).float(), _x(generator).float()
    term = _term(lambda x, u: u - x[:, :1].double(), name="interior")
    with pytest.raises(
        ValueError, match=r"'interior': .* dtype of the points, torch.float32, got torch.float64"
    ):
        term.evaluate(model, x)


def test_other_errors_in_the_residual_are_handed_on(generator: torch.Generator) -> None:
    """Only shapes have an explanation to add."""

    def residual(x: Tensor, u: Tensor) -> Tensor:
        raise RuntimeError("solver did not converge")

    with pytest.raises(RuntimeError, match=r"^solver did not converge$"):
        _term(residual).evaluate(_model(generator), _x(generator))


def test_residual_must_return_a_tensor(generator: torch.Generator) -> None:
    """A forgotten return."""
    with pytest.raises(TypeError, match=r"'term': the residual must return a tensor .* NoneType"):
        _term(lambda x, u: None).evaluate(_model(generator), _x(generator))


def test_terms_are_immutable(generator: torch.Generator) -> None:
    """Later changes of the user's dictionary have no effect."""
    operators = {"u": Value()}
    term = _term(operators=operators)
    operators["u_t"] = Partial(0)
    assert list(term.operators) == ["u"]
    term.evaluate(_model(generator), _x(generator))
    with pytest.raises(AttributeError, match="cannot assign"):
        term.name = "other"


def test_dirichlet(generator: torch.Generator) -> None:
    """A condition on the values, with weight and name."""
    model, x = _model(generator), _x(generator)
    term = dirichlet(lambda x: x[:, :1], POINTS, weight=3.0, name="data")
    torch.testing.assert_close(term.evaluate(model, x), model(x) - x[:, :1])
    assert (term.name, term.weight) == ("data", 3.0)
