"""What is right, computed slowly: nested ``torch.func`` on un-batched functions.

Networks are functions of one point, differential operators are evaluated by their definition, and
sums are loops. No jet, no recorded layer and no structured product takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import singledispatch

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call, jacfwd, jacrev
from torch.nn import Module

from pinncurv.diffops import (
    Channels,
    DifferentialOperator,
    Directional,
    FactoredSecondOrder,
    Gradient,
    Laplacian,
    Partial,
    SecondOrder,
    Value,
)
from pinncurv.problems import LossTerm
from pinncurv.verification.instance import Network

PointFunction = Callable[[Tensor], Tensor]
Parameters = Mapping[str, Tensor]
# What an operator means: from a function of one point [d] and a point to the operator's value.
Reference = Callable[[PointFunction, Tensor], Tensor]
References = Mapping[str, Reference]


def trainable(model: Network) -> dict[str, Tensor]:
    """Return detached copies of the parameters that require a gradient."""
    if not isinstance(model, Module):
        return {}
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def at_point(model: Network, parameters: Parameters | None = None) -> PointFunction:
    """Return the network as a function of one point, ``[d]`` to ``[d_out]``."""
    if not isinstance(model, Module):
        return lambda x: model(x[None])[0]
    values = trainable(model) if parameters is None else dict(parameters)
    return lambda x: functional_call(model, values, (x[None],))[0]


# --- differential operators at one point --------------------------------------------------------


@singledispatch
def derivative(operator: DifferentialOperator, u: PointFunction, x: Float[Tensor, " d"]) -> Tensor:
    """Evaluate a differential operator of u at one point.

    (D u)(x)

    The shipped operators are evaluated by their definition. For another one, the derivatives that
    it declares in ``require`` are computed, and its ``read`` combines them.

    Args:
        operator: The operator, at this point alone.
        u: The network as a function of one point.
        x: The point.
    """
    required, first = operator.require(x[None]), jacrev(u)(x)
    directions = [v.reshape(-1) for v in required.directions]
    sums = []
    for contraction in required.contractions:
        V = torch.stack([directions[i] for i in contraction.indices])
        Q = torch.eye(len(V), dtype=x.dtype, device=x.device)
        if contraction.weights is not None:
            Q = contraction.weights.reshape(-1).diag()
        if contraction.matrix is not None:
            Q = contraction.matrix.reshape(len(V), len(V))
        sums.append(_contract(u, x, V.mT @ Q @ V)[None])
    return operator.read(Channels(u(x)[None], [(first @ v)[None] for v in directions], sums))[0]


def _contract(u: PointFunction, x: Tensor, c: Tensor) -> Tensor:
    """Return Σ_ij c_ij ∂²u/∂x_i∂x_j."""
    return (jacfwd(jacrev(u))(x) * c).sum((-2, -1))


def _coefficient(given: Tensor | Callable[[Tensor], Tensor], x: Tensor, ndim: int) -> Tensor:
    """Return a coefficient at one point: a constant, a tensor's only row, or a function's value."""
    tensor = given if isinstance(given, Tensor) else given(x[None])
    return (tensor[0] if tensor.ndim > ndim else tensor).detach().to(x)


@derivative.register
def _(operator: Value, u: PointFunction, x: Tensor) -> Tensor:
    return u(x)


@derivative.register
def _(operator: Partial, u: PointFunction, x: Tensor) -> Tensor:
    return jacrev(u)(x)[..., operator.dim]


@derivative.register
def _(operator: Gradient, u: PointFunction, x: Tensor) -> Tensor:
    dims = range(len(x)) if operator.dims is None else operator.dims
    first = jacrev(u)(x)
    return torch.stack([first[..., dim] for dim in dims], -1)


@derivative.register
def _(operator: Directional, u: PointFunction, x: Tensor) -> Tensor:
    return jacrev(u)(x) @ _coefficient(operator.direction, x, 1)


@derivative.register
def _(operator: Laplacian, u: PointFunction, x: Tensor) -> Tensor:
    second = jacfwd(jacrev(u))(x)
    dims = range(len(x)) if operator.dims is None else operator.dims
    return torch.stack([second[..., dim, dim] for dim in dims]).sum(0)


@derivative.register
def _(operator: SecondOrder, u: PointFunction, x: Tensor) -> Tensor:
    second = jacfwd(jacrev(u))(x)
    dims = list(range(len(x)) if operator.dims is None else operator.dims)
    return (second[..., dims, :][..., dims] * _coefficient(operator.matrix, x, 2)).sum((-2, -1))


@derivative.register
def _(operator: FactoredSecondOrder, u: PointFunction, x: Tensor) -> Tensor:
    F = _coefficient(operator.factors, x, 2)
    return _contract(u, x, F @ F.mT)


def operator_value(
    name: str, term: LossTerm, u: PointFunction, x: Tensor, n: int, references: References
) -> Tensor:
    """Evaluate one of a term's operators at the n-th of the points x."""
    if name in references:
        return references[name](u, x[n])
    return derivative(term.operators[name].at(slice(n, n + 1)), u, x[n])


# --- loss terms ---------------------------------------------------------------------------------


def residual_at(
    term: LossTerm, u: PointFunction, x: Tensor, n: int, references: References
) -> Float[Tensor, " V"]:
    """Return r_n, without weight and 1/N."""
    rows = {name: operator_value(name, term, u, x, n, references)[None] for name in term.operators}
    data = {name: tensor[n : n + 1] for name, tensor in term.data.items()}
    return term.residual(x[n : n + 1], **rows, **data)[0].reshape(-1)


def _weight(term: LossTerm, x: Tensor, n: int) -> Tensor:
    if isinstance(term.weight, float):
        return x.new_tensor(term.weight)
    weights = term.weight if isinstance(term.weight, Tensor) else term.weight(x)
    return weights[n].to(x)


def scaled_residual(
    model: Network,
    term: LossTerm,
    x: Float[Tensor, "N d"],
    references: References,
    parameters: Parameters | None = None,
) -> Float[Tensor, "N V"]:
    """Return sqrt(w_n / N) r_n of all points."""
    u, N = at_point(model, parameters), len(x)
    rows = [
        (_weight(term, x, n) / N).sqrt() * residual_at(term, u, x, n, references) for n in range(N)
    ]
    return torch.stack(rows)


def jacobian(
    model: Network, term: LossTerm, x: Float[Tensor, "N d"], references: References
) -> dict[str, Float[Tensor, "N V *parameter"]]:
    """Return the Jacobian of the scaled residual by the name of the parameter."""
    return jacrev(lambda p: scaled_residual(model, term, x, references, p))(trainable(model))


def flat_jacobian(
    model: Network, term: LossTerm, x: Float[Tensor, "N d"], references: References
) -> Float[Tensor, "NV D"]:
    """Return the same as a matrix."""
    parts = jacobian(model, term, x, references).values()
    return torch.cat([part.flatten(2).flatten(0, 1) for part in parts], 1)


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
        J = flat_jacobian(model, term, x, references or {})
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

    rows = jacfwd(jacrev(loss))(trainable(model))
    sizes = {name: parameter.numel() for name, parameter in trainable(model).items()}
    return torch.cat(
        [torch.cat([rows[a][b].reshape(sizes[a], sizes[b]) for b in sizes], 1) for a in sizes]
    )
