"""What is right, computed slowly: nested ``torch.func`` on un-batched functions.

Networks are functions of one point, differential operators are evaluated by their definition, and
sums are loops. No jet, no recorded layer and no structured product takes part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch
from typing import Any

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
from pinncurv.problems import LossTerm
from pinncurv.verification.instance import Network

PointFunction = Callable[[Tensor], Tensor]
Parameters = Mapping[str, Tensor]
# What an operator means: from a function of one point [d] and a point to the operator's value.
Reference = Callable[[PointFunction, Tensor], Tensor]
References = Mapping[str, Reference]


def trainable(model: Network, *terms: LossTerm) -> dict[str, Tensor]:
    """Return detached copies of what requires a gradient in a network and in terms."""
    module = model if isinstance(model, Module) else Module()
    return {n: p.detach().clone() for n, p in trained_tensors(module, *terms).items()}


def at_point(model: Network, parameters: Parameters | None = None) -> Callable[[Tensor], Any]:
    """Return the network as a function of one point, ``[d]`` to ``[d_out]`` or several such."""
    if not isinstance(model, Module):
        return lambda x: _first_row(model(x[None]))
    values = trainable(model) if parameters is None else parameters
    own = {name for name, _ in model.named_parameters()}
    own_values = {name: value for name, value in values.items() if name in own}
    return lambda x: _first_row(functional_call(model, own_values, (x[None],)))


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


@singledispatch
def derivative(operator: DifferentialOperator, u: PointFunction, x: Float[Tensor, " d"]) -> Tensor:
    """Evaluate a differential operator of u at one point.

    (D u)(x)

    The shipped operators are evaluated by their definition. For another one, the derivatives that
    it requests are computed by theirs, and its ``read`` combines them.

    Args:
        operator: The operator, at this point alone.
        u: The network as a function of one point.
        x: The point.
    """
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


def _coefficient(given: Tensor | Callable[[Tensor], Tensor], x: Tensor, ndim: int) -> Tensor:
    """Return a coefficient at one point: a constant, a tensor's only row, or a function's value."""
    tensor = given if isinstance(given, Tensor) else given(x[None])
    return (tensor[0] if tensor.ndim > ndim else tensor).to(x)


def _dims(operator: Any, x: Tensor) -> list[int]:
    return list(range(len(x)) if operator.dims is None else operator.dims)


@derivative.register
def _(operator: Value, u: PointFunction, x: Tensor) -> Tensor:
    return u(x)


@derivative.register
def _(operator: Partial, u: PointFunction, x: Tensor) -> Tensor:
    tensor = _tensor(u, x, len(operator.dims))
    for dim in reversed(operator.dims):
        tensor = tensor[..., dim]
    return tensor


@derivative.register
def _(operator: Gradient, u: PointFunction, x: Tensor) -> Tensor:
    return _tensor(u, x, 1)[..., _dims(operator, x)]


@derivative.register
def _(operator: Divergence, u: PointFunction, x: Tensor) -> Tensor:
    return _tensor(u, x, 1)[..., _dims(operator, x)].trace()[None]


@derivative.register
def _(operator: Directional, u: PointFunction, x: Tensor) -> Tensor:
    result, v = _tensor(u, x, operator.order), _coefficient(operator.direction, x, 1)
    for _ in range(operator.order):
        result = result @ v
    return result


@derivative.register
def _(operator: Hessian, u: PointFunction, x: Tensor) -> Tensor:
    dims = _dims(operator, x)
    return _tensor(u, x, 2)[..., dims, :][..., dims]


@derivative.register
def _(operator: Laplacian, u: PointFunction, x: Tensor) -> Tensor:
    second = _tensor(u, x, 2)
    return torch.stack([second[..., i, i] for i in _dims(operator, x)]).sum(0)


@derivative.register
def _(operator: Bilaplacian, u: PointFunction, x: Tensor) -> Tensor:
    fourth, dims = _tensor(u, x, 4), _dims(operator, x)
    return torch.stack([fourth[..., i, i, j, j] for i in dims for j in dims]).sum(0)


@derivative.register
def _(operator: SecondOrder, u: PointFunction, x: Tensor) -> Tensor:
    dims = _dims(operator, x)
    second = _tensor(u, x, 2)[..., dims, :][..., dims]
    return (second * _coefficient(operator.matrix, x, 2)).sum((-2, -1))


@derivative.register
def _(operator: FactoredSecondOrder, u: PointFunction, x: Tensor) -> Tensor:
    F = _coefficient(operator.factors, x, 2)
    return (_tensor(u, x, 2) * (F @ F.mT)).sum((-2, -1))


def operator_value(
    name: str, term: LossTerm, u: PointFunction, x: Tensor, n: int, references: References
) -> Tensor:
    """Evaluate one of a term's operators at the n-th of the points x."""
    if name in references:
        return references[name](u, x[n])
    operator = term.operators[name].at(slice(n, n + 1))
    output: Any = u
    return derivative(
        operator, u if operator.of is None else lambda p: output(p)[operator.of], x[n]
    )


# --- loss terms ---------------------------------------------------------------------------------


def residual_at(
    term: LossTerm, u: PointFunction, x: Tensor, n: int, references: References
) -> Float[Tensor, " V"]:
    """Return r_n, without weight and 1/N."""
    rows = {name: operator_value(name, term, u, x, n, references)[None] for name in term.operators}
    data = {name: tensor[n : n + 1] for name, tensor in term.data.items()}
    return term.residual(x[n : n + 1], **rows, **data)[0].reshape(-1)


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
) -> Float[Tensor, "N V"]:
    """Return sqrt(w_n / N) r_n of all points."""
    u, N = at_point(model, parameters), len(x)
    term = term if parameters is None else substituted(term, parameters)
    rows = [
        (_weight(term, x, n) / N).sqrt() * residual_at(term, u, x, n, references) for n in range(N)
    ]
    return torch.stack(rows)


def jacobian(
    model: Network, term: LossTerm, x: Float[Tensor, "N d"], references: References
) -> dict[str, Float[Tensor, "N V *parameter"]]:
    """Return the Jacobian of the scaled residual by the name of the parameter."""
    return jacrev(lambda p: scaled_residual(model, term, x, references, p))(trainable(model, term))


def flat_jacobian(
    model: Network,
    term: LossTerm,
    x: Float[Tensor, "N d"],
    references: References,
    parameters: Parameters,
) -> Float[Tensor, "NV D"]:
    """Return the same as a matrix, in given parameters."""
    J = jacrev(lambda p: scaled_residual(model, term, x, references, p))(parameters)
    return torch.cat([J[name].flatten(2).flatten(0, 1) for name in parameters], 1)


def gauss_newton(
    model: Network,
    terms: Sequence[LossTerm],
    points: Sequence[Tensor],
    references: References | None = None,
) -> Float[Tensor, "D D"]:
    """Return the Gauss-Newton matrix of the loss.

    Σ_t J_tᵀJ_t

    Args:
        model: The network.
        terms: The loss terms.
        points: The points of each term.
        references: What operators that are not shipped mean, by name.
    """
    matrices = []
    for term, x in zip(terms, points, strict=True):
        J = flat_jacobian(model, term, x, references or {}, trainable(model, *terms))
        matrices.append(J.mT @ J)
    return torch.stack(matrices).sum(0)


def hessian(
    model: Network,
    terms: Sequence[LossTerm],
    points: Sequence[Tensor],
    references: References | None = None,
) -> Float[Tensor, "D D"]:
    """Return the Hessian of the loss.

    ∇² ½ Σ_t ‖r̃_t‖²

    Args:
        model: The network.
        terms: The loss terms.
        points: The points of each term.
        references: What operators that are not shipped mean, by name.
    """

    def loss(parameters: Parameters) -> Tensor:
        pairs = zip(terms, points, strict=True)
        residuals = [scaled_residual(model, t, x, references or {}, parameters) for t, x in pairs]
        return 0.5 * torch.stack([residual.square().sum() for residual in residuals]).sum()

    rows = jacfwd(jacrev(loss))(trainable(model, *terms))
    sizes = {name: parameter.numel() for name, parameter in trainable(model, *terms).items()}
    return torch.cat(
        [torch.cat([rows[a][b].reshape(sizes[a], sizes[b]) for b in sizes], 1) for a in sizes]
    )
