"""What is right, computed slowly: nested ``torch.func`` on un-batched functions.

Networks are functions of one point, differential operators are evaluated by their definition, and
sums are loops. No jet, no recorded layer and no structured product takes part.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, jacfwd, jacrev
from torch.nn import Module

from pinncurv.diffops import (
    Bilaplacian,
    DifferentialOperator,
    Directional,
    Divergence,
    FactoredSecondOrder,
    Gradient,
    Hessian,
    Laplacian,
    Partial,
    SecondOrder,
    Value,
)
from pinncurv.linearization import trained_tensors
from pinncurv.linearization.spelled import Spelled
from pinncurv.problems import L2, LossTerm
from pinncurv.problems.energy import check_squares

Network = Callable[[Any], Any]
N = TypeVar("N", bound=Network)
PointFunction = Callable[[Tensor], Tensor]
Parameters = Mapping[str, Tensor]
# What an operator means: from a function of one point [d] and a point to the operator's value.
Reference = Callable[[PointFunction, Tensor], Tensor]
References = Mapping[str, Reference]


# --- copies on which brute force is affordable --------------------------------------------------


def in_double(model: N) -> N:
    """Return a copy of a network in float64; a function is returned as it is."""
    if not isinstance(model, Module):
        return model
    plain: N = copy.deepcopy(getattr(model, "_orig_mod", model)).double()  # without torch.compile
    return plain


def first_points(term: LossTerm, x: Tensor, count: int) -> tuple[LossTerm, Tensor]:
    """Return a term and its points, in float64, at the first few of them."""
    part = slice(0, count)
    weight = term.weight
    if isinstance(weight, Tensor) and weight.ndim:
        weight = weight[part]
    points = x[part].detach().double()
    small = replace(term.at(part), weight=weight).to(points)
    if any(True for _ in term.named_parameters()):
        small = copy.deepcopy(small)
        for _, parameter in small.named_parameters():
            parameter.data = parameter.data.double()
    return small, points


# --- networks and their parameters --------------------------------------------------------------


def trainable(model: Network, *terms: LossTerm) -> dict[str, Tensor]:
    """Return detached copies of what requires a gradient in a network and in terms."""
    module = model if isinstance(model, Module) else Module()
    return {n: p.detach().clone() for n, p in trained_tensors(module, *terms).items()}


def at_point(model: Network, parameters: Parameters | None = None) -> Callable[[Tensor], Any]:
    """Return the network as a function of one point, ``[d]`` to ``[d_out]`` or several such."""
    if not isinstance(model, Module):
        return lambda x: _first_row(_spelled(model, x[None]))
    values = trainable(model) if parameters is None else parameters
    own = {name for name, _ in model.named_parameters()}
    own_values = {name: value for name, value in values.items() if name in own}
    return lambda x: _first_row(_spelled(functional_call, model, own_values, (x[None],)))


def _spelled(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call what a user has written, with what torch has no right derivatives of written out."""
    with Spelled():
        return function(*args, **kwargs)


def _first_row(output: Any) -> Any:
    if isinstance(output, dict):
        return {key: part[0] for key, part in output.items()}
    return tuple(part[0] for part in output) if isinstance(output, tuple | list) else output[0]


def substituted(term: LossTerm, parameters: Parameters) -> LossTerm:
    """Return a term with other values of what is trained in its residual and coefficients."""
    operators = {
        name: _operator_with_values(operator, parameters, f"{term.name}.{name}")
        for name, operator in term.operators.items()
    }
    residual = _with_values(term.residual, parameters, f"{term.name}.residual")
    return term.with_fields(operators=operators, residual=residual)


def _operator_with_values(
    operator: DifferentialOperator, parameters: Parameters, name: str
) -> DifferentialOperator:
    changed = copy.copy(operator)
    for attribute, given in vars(operator).items():
        value = _with_values(given, parameters, f"{name}.{attribute}")
        object.__setattr__(changed, attribute, value)
    return changed


def _with_values(given: Any, parameters: Parameters, name: str) -> Any:
    if isinstance(given, Module):
        own = {
            n.removeprefix(f"{name}."): v for n, v in parameters.items() if n.startswith(f"{name}.")
        }
        return lambda *args, **kwargs: functional_call(given, own, args, kwargs)
    return parameters.get(name, given)


# --- differential operators at one point --------------------------------------------------------


def derivative(operator: DifferentialOperator, u: PointFunction, x: Float[Tensor, " d"]) -> Tensor:
    """Evaluate a differential operator of u at one point.

    (D u)(x)

    The shipped operators are evaluated by their definition. For another one, and for an estimate
    along random directions, the derivatives that it requests are computed by theirs, and its
    ``read`` combines them.

    Args:
        operator: The operator, at this point alone.
        u: The network as a function of one point.
        x: The point.
    """
    for kind in type(operator).__mro__:
        if kind in _DEFINITIONS and operator.sampling is None:
            return _DEFINITIONS[kind](operator, u, x)
    values = {}
    for name, request in operator.requests(x[None]).items():
        tensor = _tensor(u, x, request.order)
        total = torch.zeros_like(u(x))
        for alpha, c in request.terms.items():
            part = tensor
            for i in reversed(alpha):
                part = part @ request.directions[i].reshape(-1)
            total = total + c * part
        values[name] = total[None]
    return operator.read(x[None], values)[0]


def _tensor(u: PointFunction, x: Tensor, order: int) -> Tensor:
    """Return all derivatives of an order, ``[..., d, ..., d]``."""
    function = u
    for k in range(order):
        function = jacrev(function) if k % 2 == 0 else jacfwd(function)
    return function(x)


def _along(operator: Any, u: PointFunction, x: Tensor, order: int) -> Tensor:
    """Return all derivatives of an order along the operator's dimensions."""
    tensor = _tensor(u, x, order)
    dims = torch.arange(len(x)) if operator.dims is None else torch.tensor(operator.dims)
    for axis in range(-order, 0):
        tensor = tensor.index_select(axis, dims.to(x.device))
    return tensor


def _directional(operator: Directional, u: PointFunction, x: Tensor) -> Tensor:
    result, v = _tensor(u, x, operator.order), _coefficient(operator.direction, x, 1)
    for _ in range(operator.order):
        result = result @ v
    return result


def _weighted(operator: SecondOrder, u: PointFunction, x: Tensor) -> Tensor:
    return (_along(operator, u, x, 2) * _coefficient(operator.matrix, x, 2)).sum((-2, -1))


def _factored(operator: FactoredSecondOrder, u: PointFunction, x: Tensor) -> Tensor:
    F = _coefficient(operator.factors, x, 2)
    return (_tensor(u, x, 2) * (F @ F.mT)).sum((-2, -1))


def _coefficient(given: Tensor | Callable[[Tensor], Tensor], x: Tensor, ndim: int) -> Tensor:
    """Return a coefficient at one point: a constant, a tensor's only row, or a function's value."""
    tensor = given if isinstance(given, Tensor) else given(x[None])
    return (tensor[0] if tensor.ndim > ndim else tensor).to(x)


_DEFINITIONS: dict[type, Callable[[Any, PointFunction, Tensor], Tensor]] = {
    Value: lambda _, u, x: u(x),
    Partial: lambda D, u, x: _tensor(u, x, len(D.dims))[(..., *D.dims)],
    Directional: _directional,
    Gradient: lambda D, u, x: _along(D, u, x, 1),
    Divergence: lambda D, u, x: _along(D, u, x, 1).trace()[None],
    Hessian: lambda D, u, x: _along(D, u, x, 2),
    Laplacian: lambda D, u, x: torch.einsum("...ii->...", _along(D, u, x, 2)),
    Bilaplacian: lambda D, u, x: torch.einsum("...iijj->...", _along(D, u, x, 4)),
    SecondOrder: _weighted,
    FactoredSecondOrder: _factored,
}


def operator_value(
    name: str, term: LossTerm, u: Callable[[Tensor], Any], x: Tensor, references: References, n: int
) -> Tensor:
    """Evaluate one of a term's operators at the n-th of the points x."""
    if name in references:
        return references[name](u, x[n])
    operator = term.operators[name].at(slice(n, n + 1))
    return derivative(operator, u if operator.of is None else lambda p: u(p)[operator.of], x[n])


# --- loss terms ---------------------------------------------------------------------------------


def residual_at(
    term: LossTerm, u: PointFunction, x: Tensor, references: References, n: int
) -> Float[Tensor, " V"]:
    """Return r_n, without weight and 1/N."""
    rows = {name: operator_value(name, term, u, x, references, n)[None] for name in term.operators}
    data = {name: tensor[n : n + 1] for name, tensor in term.data.items()}
    return _spelled(term.residual, x[n : n + 1], **rows, **data)[0].reshape(-1)


def _weight(term: LossTerm, x: Tensor, n: int) -> Tensor:
    weights = term.weights(x)
    if isinstance(weights, float):
        return x.new_tensor(weights)
    return weights[n] if len(weights) == len(x) else weights[0]


def scaled_residual(
    model: Network,
    term: LossTerm,
    x: Float[Tensor, "N d"],
    references: References,
    parameters: Parameters | None = None,
) -> Float[Tensor, "_ V"]:
    """Return sqrt(w_n / N) r_n of all points; of an L2 term that of all entries.

    Raises:
        TypeError: If the term is an energy.
    """
    check_squares([term])
    if isinstance(term, L2):
        values = trainable(model, term) if parameters is None else parameters
        own = {n for n, _ in model.named_parameters()} if isinstance(model, Module) else set()
        return math.sqrt(term.weight) * _flatten(term.chosen(values, own))[:, None]
    u, N = at_point(model, parameters), len(x)
    term = term if parameters is None else substituted(term, parameters)
    rows = [
        (_weight(term, x, n) / N).sqrt() * residual_at(term, u, x, references, n) for n in range(N)
    ]
    return torch.stack(rows)


def jacobian(
    model: Network,
    term: LossTerm,
    x: Float[Tensor, "N d"],
    references: References,
    parameters: Parameters,
) -> Float[Tensor, "_ V D"]:
    """Return the Jacobian of the scaled residual in given parameters, one after the other."""
    return jacrev(
        lambda flat: scaled_residual(model, term, x, references, _unflatten(flat, parameters))
    )(_flatten(parameters))


def _flatten(parameters: Parameters) -> Tensor:
    return torch.cat([parameter.flatten() for parameter in parameters.values()])


def _unflatten(flat: Tensor, like: Parameters) -> dict[str, Tensor]:
    pieces = flat.split([parameter.numel() for parameter in like.values()])
    return {
        name: piece.reshape(parameter.shape).to(parameter)
        for (name, parameter), piece in zip(like.items(), pieces, strict=True)
    }


def gauss_newton(
    model: Network,
    terms: Sequence[LossTerm],
    points: Sequence[Tensor],
    references: References | None = None,
) -> Float[Tensor, "D D"]:
    """Return the Gauss-Newton matrix of the loss, of terms at the points of each.

    Σ_t J_tᵀJ_t

    ``references`` say what operators that are not shipped mean, by name.
    """
    parameters = trainable(model, *terms)
    pairs = zip(terms, points, strict=True)
    J = torch.cat(
        [jacobian(model, t, x, references or {}, parameters).flatten(0, 1) for t, x in pairs]
    )
    return J.mT @ J


def hessian(
    model: Network,
    terms: Sequence[LossTerm],
    points: Sequence[Tensor],
    references: References | None = None,
) -> Float[Tensor, "D D"]:
    """Return the Hessian of the loss, see ``gauss_newton``.

    ∇² ½ Σ_t ‖r̃_t‖²
    """
    parameters = trainable(model, *terms)

    def loss(flat: Tensor) -> Tensor:
        values, pairs = _unflatten(flat, parameters), zip(terms, points, strict=True)
        residuals = [scaled_residual(model, t, x, references or {}, values) for t, x in pairs]
        return 0.5 * torch.stack([residual.square().sum() for residual in residuals]).sum()

    return jacfwd(jacrev(loss))(_flatten(parameters))
