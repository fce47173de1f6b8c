"""Differential operators of every network kind against nested torch.func."""

from dataclasses import dataclass

import pytest
import torch

from pinncurv.diffops import (
    DifferentialOperator,
    Directional,
    Gradient,
    Laplacian,
    Partial,
    Plan,
    SecondOrder,
    Value,
    evaluate,
)
from pinncurv.diffops.coordinates import as_dim, as_dims
from pinncurv.jets import Derivative
from tests import oracles
from tests.networks import KINDS, build, points

D = 3
C = torch.tensor([[1.0, 0.5, -0.2], [0.1, 2.0, 0.7], [0.0, 0.3, -1.0]], dtype=torch.float64)
F = torch.tensor([[1.0, 0.2], [-0.5, 0.4], [0.3, 1.1]], dtype=torch.float64)
V = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)


def matrix_field(x):
    """A full matrix that varies from point to point and is not symmetric."""
    return torch.einsum("ni,nj->nij", torch.sin(x), 1 + x)


def diagonal_field(x):
    return torch.diag_embed(1 + x**2)


def factor_field(x):
    return torch.stack([x, torch.cos(x)], -1)


OPERATORS: dict[str, DifferentialOperator] = {
    "value": Value(),
    "partial": Partial(1),
    "partial_from_the_end": Partial(-1),
    "gradient": Gradient(),
    "gradient_dims": Gradient(dims=[2, 0]),
    "directional": Directional(V),
    "directional_field": Directional(torch.cos),
    "laplacian": Laplacian(),
    "laplacian_dims": Laplacian(dims=(1, 2)),
    "laplacian_of_one": Laplacian(dims=[-1]),
    "matrix": SecondOrder(C),
    "matrix_dims": SecondOrder(C[:2, :2], dims=(2, 0)),
    "matrix_diagonal": SecondOrder(torch.diag(V)),
    "matrix_sparse": SecondOrder(torch.diag(torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64))),
    "matrix_mixed": SecondOrder(torch.tensor([[0, 1, 0], [0, 0, 0], [0, 0, 0.0]])),
    "matrix_zero": SecondOrder(torch.zeros(3, 3, dtype=torch.float64)),
    "matrix_field": SecondOrder(matrix_field),
    "matrix_field_dims": SecondOrder(lambda x: matrix_field(x)[:, 1:, 1:], dims=(1, 2)),
    "diagonal_field": SecondOrder(diagonal_field),
    "factors": SecondOrder.from_factors(F),
    "factors_repeated": SecondOrder.from_factors(torch.cat([F, F[:, :1]], 1)),
    "factor_field": SecondOrder.from_factors(factor_field),
}


def expected(operators, model, x):
    """Evaluate operators point by point."""
    u = oracles.at_point(model, oracles.trainable(model))
    rows = [oracles.operator_values(operators, u, x[n], n) for n in range(len(x))]
    return {name: torch.stack([row[name] for row in rows]) for name in operators}


@pytest.mark.parametrize("d_out", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_all_operators_in_one_pass(kind, d_out):
    model, x = build(kind, D, d_out), points(3, D)
    received, wanted = evaluate(OPERATORS, model, x), expected(OPERATORS, model, x)
    for name in OPERATORS:
        trailing = {"gradient": (3,), "gradient_dims": (2,)}.get(name, ())
        assert received[name].shape == (3, d_out, *trailing), name
        oracles.assert_close(received[name].detach(), wanted[name].detach())


@pytest.mark.parametrize("name", OPERATORS)
def test_each_operator_alone(name):
    model, x = build("gated", D, 2), points(3, D)
    operators = {name: OPERATORS[name]}
    received, wanted = evaluate(operators, model, x), expected(operators, model, x)
    oracles.assert_close(received[name].detach(), wanted[name].detach())


def test_coefficients_per_point_as_tensors():
    x = points(4, D)
    model = build("tanh", D, 2)
    operators = {
        "directional": Directional(torch.cos(x)),
        "matrix": SecondOrder(matrix_field(x)),
        "factors": SecondOrder.from_factors(factor_field(x)),
    }
    received, wanted = evaluate(operators, model, x), expected(operators, model, x)
    for name in operators:
        oracles.assert_close(received[name].detach(), wanted[name].detach())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_with_respect_to_the_parameters(kind):
    """The derivative of operators' values in the parameters, through the hand-written backward."""
    model, x = build(kind, D, 2), points(2, D)
    operators = {name: OPERATORS[name] for name in ("value", "directional", "matrix", "laplacian")}
    received = evaluate(operators, model, x)
    sum(value.square().sum() for value in received.values()).backward()
    parameters = oracles.trainable(model)

    def total(p):
        u = oracles.at_point(model, p)
        values = [oracles.operator_values(operators, u, x[n], n) for n in range(len(x))]
        return sum(value.square().sum() for row in values for value in row.values())

    wanted = torch.func.jacrev(total)(parameters)
    for name, parameter in model.named_parameters():
        oracles.assert_close(parameter.grad, wanted[name])


def test_by_hand():
    """u = x² y + y³: an anchor without any network or oracle."""
    x = torch.tensor([[2.0, 3.0]], dtype=torch.float64)
    operators = {
        "u": Value(),
        "g": Gradient(),
        "lap": Laplacian(),
        "mixed": SecondOrder(torch.tensor([[0.0, 1.0], [0.0, 0.0]])),
    }
    received = evaluate(operators, lambda p: p[:, :1] ** 2 * p[:, 1:] + p[:, 1:] ** 3, x)
    numbers = {name: value.flatten().tolist() for name, value in received.items()}
    assert numbers == {"u": [39.0], "g": [12.0, 31.0], "lap": [24.0], "mixed": [4.0]}


def test_network_with_values_without_a_last_axis():
    x = points(3, D)
    received = evaluate({"u": Value(), "g": Gradient()}, lambda p: p.prod(-1), x)
    assert received["u"].shape == (3,)
    assert received["g"].shape == (3, D)


# --- merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operators", "R", "number_of_sums"),
    [
        ([Value()], 0, 0),
        ([Gradient()], 3, 0),
        ([Laplacian()], 3, 1),
        ([Gradient(), Laplacian(), Partial(0), Value()], 3, 1),
        ([Partial(0), Laplacian(dims=(1, 2))], 3, 1),
        ([Partial(0), Partial(0), Partial(-3)], 1, 0),
        ([Laplacian(), Laplacian()], 3, 1),
        ([Laplacian(), Laplacian(dims=(0, 1))], 3, 2),
        ([Laplacian(dims=(0, 1)), SecondOrder(C)], 3, 2),
        ([Directional(torch.eye(3)[1].double()), Partial(1)], 1, 0),
        ([Directional(V), Gradient()], 4, 0),
        ([SecondOrder(torch.diag(torch.tensor([0.0, 1.0, 0.0])))], 1, 1),
        ([SecondOrder.from_factors(F), Gradient()], 5, 1),
        ([SecondOrder.from_factors(F), SecondOrder.from_factors(F)], 2, 1),
        ([SecondOrder(matrix_field), Gradient()], 3, 1),
    ],
)
def test_directions_and_sums_are_merged(operators, R, number_of_sums):
    named = {f"o{i}": operator for i, operator in enumerate(operators)}
    layout = Plan.of(named, points(4, D)).layout
    assert (R, number_of_sums, 1 + R + number_of_sums) == (layout.R, layout.C, layout.S)


def test_directions_keep_the_order_of_declaration():
    plan = Plan.of({"a": Partial(2), "b": Laplacian()}, points(1, D))
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(plan.layout.directions, eye[[2, 0, 1]])


def test_the_channels_of_a_field_do_not_depend_on_the_points():
    """Where the field happens to vanish, chunks of points would have different channels."""
    vanishing = SecondOrder(lambda x: torch.diag_embed(x.clamp(min=0)))
    for x in (points(3, D), -points(3, D), torch.zeros(1, D, dtype=torch.float64)):
        assert Plan.of({"o": vanishing}, x).layout.S == 5


# --- extension and errors -----------------------------------------------------------------------


class HessianEntry(DifferentialOperator):
    """∂²u/∂x_0∂x_1 by a requirement of one's own, as a plain class."""

    def requests(self, x):
        """Request the mixed derivative."""
        eye = torch.eye(x.shape[-1], dtype=x.dtype)
        return {"mixed": Derivative.along(eye[0], eye[1])}

    def read(self, x, derivatives):
        """Return it."""
        return derivatives["mixed"]


def test_an_operator_of_ones_own():
    model, x = build("residual", D), points(2, D)
    mixed = torch.zeros(D, D, dtype=torch.float64)
    mixed[0, 1] = 1
    wanted = expected({"o": SecondOrder(mixed)}, model, x)["o"]
    received = evaluate({"g": Gradient(), "o": HessianEntry()}, model, x)["o"]
    oracles.assert_close(received.detach(), wanted.detach())


def test_an_operator_that_cannot_be_hashed():
    """A plain dataclass defines equality and so loses its hash."""

    @dataclass
    class First(HessianEntry):
        scale: float

        def read(self, x, derivatives):
            """Return a multiple."""
            return self.scale * derivatives["mixed"]

    model, x = build("residual", D), points(2, D)
    first, second = (evaluate({"o": First(s)}, model, x)["o"] for s in (1.0, 3.0))
    torch.testing.assert_close(second, 3 * first)


@pytest.mark.parametrize("operator", [Partial(3), Partial(-4), Gradient([0, 3]), Laplacian([5])])
def test_coordinate_out_of_range_raises(operator):
    with pytest.raises(IndexError, match=r"between -3 and 2 for points with 3 coordinates, got"):
        evaluate({"o": operator}, build("tanh", D), points(2, D))


# under pytest the annotations of the operators themselves speak first


def test_dims_that_are_no_sequence_raise():
    with pytest.raises(TypeError, match=r"dims must be a sequence of integers, got 0.*dims=\[0\]"):
        as_dims(0)


@pytest.mark.parametrize("dim", [0.0, True, "0", None])
def test_coordinates_that_are_no_integers_raise(dim):
    message = rf"must be an integer .* got '?{dim}'? of type {type(dim).__name__}\. Write"
    with pytest.raises(TypeError, match=message):
        as_dim(dim)
    with pytest.raises(TypeError, match=message):
        as_dims([dim])


def test_a_truth_value_is_no_coordinate():
    with pytest.raises(TypeError, match=r"must be an integer .* got True"):
        Partial(True)
    with pytest.raises(TypeError, match=r"must be an integer .* got True"):
        Laplacian(dims=[0, True])


@pytest.mark.parametrize("kind", [Gradient, Laplacian])
def test_repeated_or_missing_coordinates_raise(kind):
    with pytest.raises(ValueError, match="one or more different coordinates"):
        kind(dims=[0, 0])
    with pytest.raises(ValueError, match="one or more different coordinates"):
        kind(dims=[])
    with pytest.raises(ValueError, match="must name different coordinates"):
        evaluate({"o": kind(dims=[0, -3])}, build("tanh", D), points(2, D))


@pytest.mark.parametrize(
    "operator",
    [
        Directional(V[:2]),
        Directional(torch.ones(4, 3)),
        Directional(torch.ones(2, 2, 3)),
        Directional(lambda x: V),
        SecondOrder(C[:2]),
        SecondOrder(C[0]),
        SecondOrder(torch.ones(4, 3, 3)),
        SecondOrder(lambda x: C),
        SecondOrder(C, dims=(0, 1)),
        SecondOrder.from_factors(F[:2]),
        SecondOrder.from_factors(lambda x: F),
    ],
)
def test_coefficients_of_a_wrong_shape_raise(operator):
    with pytest.raises(ValueError, match=r"of a differential operator must have shape .* got \["):
        evaluate({"o": operator}, build("tanh", D), points(2, D))


def test_output_that_is_no_jet_raises():
    with pytest.raises(TypeError, match="must return a function of its input, got Tensor"):
        evaluate({"u": Value()}, lambda x: torch.ones(2, 1), points(2, D))


@pytest.mark.parametrize("kind", ["tanh", "gated", "hard_boundary"])
def test_float32(kind):
    operators = {n: o for n, o in OPERATORS.items() if n not in ("matrix_mixed",)}
    model, x = build(kind, D, 2), points(3, D)
    wanted = evaluate(operators, model, x)
    received = evaluate(operators, model.float(), x.float())
    for name in operators:
        assert received[name].dtype == torch.float32
        torch.testing.assert_close(received[name].double(), wanted[name], rtol=1e-4, atol=1e-4)
