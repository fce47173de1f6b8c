"""What is right, computed slowly: un-batched nested torch.func, sharing no code with the package.

Points are taken one by one, derivatives come from nested ``torch.func`` transformations, and every
sum is a loop that follows its definition. Differential operators and loss terms are read by their
public attributes only.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacfwd, jacrev
from torch.nn import Linear, Module, functional
from torch.overrides import TorchFunctionMode

RTOL = 1e-9


class ByHand(TorchFunctionMode):
    """Functions written out whose nested derivatives torch has not, or has wrong.

    Those of LayerNorm are wrong from the second on and differently for every order of jacfwd and
    jacrev: see test_orders. Those of norms write in place to what the next order needs.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _BY_HAND.get(func, func)(*args, **(kwargs or {}))


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _layer_norm(x: Tensor, shape, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    return _affine(_standardized(x, tuple(range(-len(shape), 0)), eps), weight, bias)


def _group_norm(x: Tensor, groups: int, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
    y = _standardized(x.reshape(len(x), groups, -1), (2,), eps).reshape(x.shape)
    shape = (-1, *(1,) * (x.ndim - 2))
    return _affine(y, *(None if p is None else p.reshape(shape) for p in (weight, bias)))


def _norm(x: Tensor, ord=2, dim=None, keepdim=False, p=None, out=None, dtype=None) -> Tensor:
    ord = 2 if "fro" in (ord, p) or ord is None else ord if p is None else p
    return x.abs().pow(ord).sum(dim, keepdim=keepdim) ** (1 / ord)


def _normalize(x: Tensor, p: float = 2, dim: int = 1, eps: float = 0, out=None) -> Tensor:
    return x / _norm(x, p, dim, True)


def _std(x: Tensor, dim=None, keepdim: bool = False) -> Tensor:
    return x.var(dim, keepdim=keepdim).sqrt()


def _attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
    return torch.softmax(scores, -1) @ v


_BY_HAND = {
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), _layer_norm),
    **dict.fromkeys((functional.group_norm, torch.group_norm), _group_norm),
    **dict.fromkeys((torch.norm, torch.Tensor.norm, torch.linalg.norm), _norm),
    torch.linalg.vector_norm: _norm,
    functional.normalize: _normalize,
    functional.cosine_similarity: lambda x, y, dim=1: (
        _normalize(x, 2, dim) * _normalize(y, 2, dim)
    ).sum(dim),
    **dict.fromkeys((torch.std, torch.Tensor.std), _std),
    functional.hardsigmoid: lambda x, inplace=False: (x / 6 + 0.5).clamp(0, 1),
    functional.hardswish: lambda x, inplace=False: x * (x / 6 + 0.5).clamp(0, 1),
    functional.glu: lambda x, dim=-1: x.chunk(2, dim)[0] * x.chunk(2, dim)[1].sigmoid(),
    functional.scaled_dot_product_attention: _attention,
}


def assert_close(received: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """Check that two tensors agree to a tolerance relative to the largest entry."""
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(received, expected, rtol=0.0, atol=rtol * max(scale, 1e-3))


# --- jets of arbitrary functions ----------------------------------------------------------------


def push(
    function: Callable[[Tensor], Tensor], data: Tensor, directions: Tensor, sums: Sequence[Tensor]
) -> Tensor:
    """Return the channels of function(g) at one point from the channels of g.

    g(t) = data_0 + Σ_r data_r (w_r · t) + 1/2 Σ_c data_c tᵀ M_c t at t = 0

    has the channels ``data`` if w_r is dual to the directions and M_c to the sums.

    Args:
        function: Maps ``[1, ...]`` to ``[1, ...]``.
        data: ``[S, ...]``, channels at one point.
        directions: ``[R, d]``, linearly independent.
        sums: Coefficient matrices ``[d, d]`` of the collapsed channels, linearly independent.
    """
    R = len(directions)

    def composed(t: Tensor) -> Tensor:
        return function(_polynomial(data, directions, sums, t)[None])[0]

    return channels_at(
        composed, torch.zeros_like(directions[0]) if R else data.new_zeros(1), directions, sums
    )


def _polynomial(data: Tensor, directions: Tensor, sums: Sequence[Tensor], t: Tensor) -> Tensor:
    """Return at t the polynomial whose channels at 0 are the data."""
    R = len(directions)
    value = data[0]
    if R:
        assert torch.linalg.matrix_rank(directions) == R, "the directions must be independent"
        dual = torch.linalg.pinv(directions)  # [d, R], v_q · dual_r = 1 if q = r else 0
        for r in range(R):
            value = value + data[1 + r] * (t @ dual[:, r])
    if sums:
        Q = torch.stack([(matrix + matrix.T) / 2 for matrix in sums])
        overlap = torch.einsum("aij,bij->ab", Q, Q)
        M = torch.einsum("ab,bij->aij", torch.linalg.inv(overlap), Q)
        for c in range(len(sums)):
            value = value + 0.5 * data[1 + R + c] * (t @ M[c] @ t)
    return value


def channels_at(
    function: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, sums: Sequence[Tensor]
) -> Tensor:
    """Return value, directional derivatives and collapsed second derivatives at one point."""
    channels = [function(x)]
    if len(directions):
        jacobian = jacrev(function)(x)
        channels += [jacobian @ v for v in directions]
    if sums:
        hessian = jacrev(jacrev(function))(x)
        channels += [(hessian * matrix).sum((-2, -1)) for matrix in sums]
    return torch.stack(channels)


# --- networks and differential operators at one point -------------------------------------------


def trainable(model: Module, *terms: Any) -> dict[str, Tensor]:
    """Return detached copies of the tensors to differentiate in: of the network, then the terms."""
    named = list(model.named_parameters())
    for term in terms:
        named += [(f"{term.name}.residual.{n}", p) for n, p in _parameters_of(term.residual)]
        for name, operator in term.operators.items():
            for field, given in vars(operator).items():
                prefix = f"{term.name}.{name}.{field}"
                named += [(f"{prefix}.{n}" if n else prefix, p) for n, p in _parameters_of(given)]
    seen: dict[int, str] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            seen.setdefault(id(parameter), name)
    return {n: p.detach().clone() for n, p in named if seen.get(id(p)) == n}


def _parameters_of(given: Any) -> list[tuple[str, Tensor]]:
    if isinstance(given, Module):
        return list(given.named_parameters())
    return [("", given)] if isinstance(given, Tensor) and given.requires_grad else []


def substituted(term: Any, parameters: Mapping[str, Tensor]) -> Any:
    """Return a term with other values of what is trained in its residual and coefficients."""

    def with_values(given: Any, prefix: str) -> Any:
        if isinstance(given, Module):
            own = {
                n.removeprefix(f"{prefix}."): v
                for n, v in parameters.items()
                if n.startswith(f"{prefix}.")
            }
            return lambda *args, **kwargs: functional_call(given, own, args, kwargs)
        return parameters.get(prefix, given)

    changed = copy.copy(term)
    operators = {}
    for name, operator in term.operators.items():
        operators[name] = copy.copy(operator)
        for field, given in vars(operator).items():
            value = with_values(given, f"{term.name}.{name}.{field}")
            object.__setattr__(operators[name], field, value)
    object.__setattr__(changed, "operators", operators)
    object.__setattr__(changed, "residual", with_values(term.residual, f"{term.name}.residual"))
    return changed


def at_point(model: Module, parameters: Mapping[str, Tensor]) -> Callable[[Tensor], Any]:
    """Return the network as a function of one point ``[d]``, with one output or several."""
    names = {name for name, _ in model.named_parameters()}
    own = {name: value for name, value in parameters.items() if name in names}

    def u(x: Tensor) -> Any:
        with ByHand():
            output = functional_call(model, own, (x[None],))
        if isinstance(output, dict):
            return {key: part[0] for key, part in output.items()}
        return tuple(part[0] for part in output) if isinstance(output, tuple) else output[0]

    return u


def all_derivatives(u: Callable[[Tensor], Tensor], x: Tensor, order: int) -> Tensor:
    """Return all derivatives of an order, ``[..., d, ..., d]``, by nesting."""
    function = u
    for k in range(order):
        function = jacfwd(function) if k % 2 else jacrev(function)
    return function(x)


def operator_values(
    operators: Mapping[str, Any], u: Callable[[Tensor], Any], x: Tensor, n: int
) -> dict[str, Tensor]:
    """Evaluate differential operators of u at the n-th point x, each by its definition."""
    known: dict[Any, Tensor] = {}

    def derivatives(of: Any, order: int) -> Tensor:
        if (of, order) not in known:
            chosen = u if of is None else (lambda point: u(point)[of])
            known[of, order] = all_derivatives(chosen, x, order)
        return known[of, order]

    values = {}
    for name, operator in operators.items():
        kind, of = _kind(operator), getattr(operator, "of", None)
        dims = list(range(len(x)))
        if getattr(operator, "dims", None) is not None:
            dims = list(operator.dims)
        if kind == "Value":
            values[name] = derivatives(of, 0)
        elif kind == "Partial":
            values[name] = derivatives(of, len(dims))[(..., *dims)]
        elif kind == "Gradient":
            values[name] = torch.stack([derivatives(of, 1)[..., i] for i in dims], -1)
        elif kind == "Divergence":
            first = derivatives(of, 1)
            values[name] = sum(first[k, i] for k, i in enumerate(dims))[None]
        elif kind == "Directional":
            v = coefficient(operator.direction, x, n, 1)
            values[name] = derivatives(of, operator.order)
            for _ in range(operator.order):
                values[name] = values[name] @ v
        elif kind == "Hessian":
            values[name] = derivatives(of, 2)[..., dims, :][..., dims]
        elif kind == "Bilaplacian":
            fourth = derivatives(of, 4)
            values[name] = sum(fourth[..., i, i, j, j] for i in dims for j in dims)
        else:
            matrix = coefficient_matrix(operator, x, n)
            values[name] = (derivatives(of, 2) * matrix).sum((-2, -1))
    return values


def _kind(operator: Any) -> str:
    return type(operator).__name__


def coefficient(given: Any, x: Tensor, n: int, ndim: int) -> Tensor:
    """Return a coefficient at the n-th point x: a constant, a row of a tensor, or a function."""
    if not isinstance(given, Tensor):
        return given(x[None])[0]
    return given[n] if given.ndim > ndim else given


def frame(operator: Any, x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return B ``[d, k]`` and c with D u = Σ_ij c_ij ∂_{b_i}∂_{b_j} u, before any sampling."""
    if _kind(operator) == "FactoredSecondOrder":
        F = coefficient(operator.factors, x, n, 2)
        return F, torch.eye(F.shape[1], dtype=x.dtype)
    d = len(x)
    dims = range(d) if operator.dims is None else [dim % d for dim in operator.dims]
    select = x.new_zeros(d, len(dims))
    for a, i in enumerate(dims):
        select[i, a] = 1
    if _kind(operator) == "Laplacian":
        return select, torch.eye(len(dims), dtype=x.dtype)
    return select, coefficient(operator.matrix, x, n, 2).to(x)


def coefficient_matrix(operator: Any, x: Tensor, n: int) -> Tensor:
    """Return c with D u = Σ_ij c_ij ∂_i∂_j u."""
    B, c = frame(operator, x, n)
    if getattr(operator, "sampling", None) is not None:
        m, k, c = operator.sampling.samples, len(c), (c + c.T) / 2
        z = operator.sampling.draw(x[None], k)[:, 0]
        c = sum(torch.outer(z[r], c @ z[r]) for r in range(m)) * k / m
        c = (c + c.T) / 2
    return B @ c @ B.T


# --- loss terms ---------------------------------------------------------------------------------


def point_weight(term: Any, x: Tensor, n: int) -> Tensor:
    """Return w_n."""
    if isinstance(term.weight, tuple):
        return x.new_tensor(term.weight)
    if isinstance(term.weight, Tensor):
        return term.weight[n]
    if callable(term.weight):
        return term.weight(x)[n]
    return x.new_tensor(float(term.weight))


def residual_at(term: Any, u: Callable[[Tensor], Tensor], x: Tensor, n: int) -> Tensor:
    """Return r_n, ``[V]``, without weight and 1/N."""
    values = operator_values(term.operators, u, x[n], n)
    rows = {name: row[None] for name, row in values.items()}
    data = {name: tensor[n : n + 1] for name, tensor in term.data.items()}
    return term.residual(x[n : n + 1], **rows, **data)[0].reshape(-1)


def scaled_residual(
    term: Any, model: Module, x: Tensor, parameters: Mapping[str, Tensor]
) -> Tensor:
    """Return sqrt(w_n / N) r_n of all points, ``[N, V]``."""
    u, N, term = at_point(model, parameters), len(x), substituted(term, parameters)
    rows = [(point_weight(term, x, n) / N).sqrt() * residual_at(term, u, x, n) for n in range(N)]
    return torch.stack(rows)


def jacobian(term: Any, model: Module, x: Tensor, *others: Any) -> Tensor:
    """Return the Jacobian of the scaled residual in all trainable tensors, ``[N V, D]``.

    Those of the network come first, then those of the terms, among which others may be given.
    """
    parameters = trainable(model, *(others or (term,)))
    J = jacrev(lambda p: scaled_residual(term, model, x, p).flatten())(parameters)
    return torch.cat([J[name].reshape(len(J[name]), -1) for name in parameters], 1)


def gauss_newton(terms: Sequence[Any], model: Module, points: Sequence[Tensor]) -> Tensor:
    """Return Σ_t J_tᵀ J_t."""
    pairs = zip(terms, points, strict=True)
    jacobians = [jacobian(term, model, x, *terms) for term, x in pairs]
    return sum(J.T @ J for J in jacobians)


def loss(
    terms: Sequence[Any], model: Module, points: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> Tensor:
    """Return Σ_t 1/(2 N_t) Σ_n w_n |r_n|²."""
    total = torch.zeros((), dtype=torch.float64)
    for given, x in zip(terms, points, strict=True):
        u, term = at_point(model, parameters), substituted(given, parameters)
        for n in range(len(x)):
            r = residual_at(term, u, x, n)
            total = total + (point_weight(term, x, n) * r * r).sum() / (2 * len(x))
    return total


def gradient(terms: Sequence[Any], model: Module, points: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of the loss, one tensor per trainable tensor."""
    parameters = trainable(model, *terms)
    return list(jacrev(lambda p: loss(terms, model, points, p))(parameters).values())


# --- channels of layers, and KFAC by its definition ---------------------------------------------


def channel_set(operators: Mapping[str, Any], x: Tensor, n: int) -> tuple[Tensor, list[Tensor]]:
    """Return the directions ``[R, d]`` in their order, each once, and the collapsed sums."""
    d = len(x)
    basis = torch.eye(d, dtype=x.dtype)
    directions: list[Tensor] = []
    sums: list[Tensor] = []
    for operator in operators.values():
        kind = _kind(operator)
        if kind == "Value":
            continue
        if kind == "Partial":
            wanted = [basis[dim] for dim in operator.dims]
        elif kind == "Directional":
            wanted = [coefficient(operator.direction, x, n, 1)]
        elif getattr(operator, "sampling", None) is not None:
            B, c = frame(operator, x, n)
            z = list(operator.sampling.draw(x[None], len(c))[:, 0])
            cz = [(c + c.T) / 2 @ v for v in z]
            parallel = all(torch.equal(w, (v @ w) * v) for v, w in zip(z, cz, strict=True))
            wanted = [B @ v for v in z + ([] if parallel or kind != "SecondOrder" else cz)]
        elif kind == "FactoredSecondOrder":
            wanted = list(coefficient(operator.factors, x, n, 2).T)
        else:
            wanted = [basis[i] for i in (range(d) if operator.dims is None else operator.dims)]
        for v in wanted:
            if not any(torch.equal(v, known) for known in directions):
                directions.append(v)
        if kind not in ("Partial", "Directional", "Gradient"):
            matrix = coefficient_matrix(operator, x, n)
            if not any(torch.equal(matrix, known) for known in sums):
                sums.append(matrix)
    return torch.stack(directions) if directions else x.new_zeros(0, d), sums


@dataclass
class Layer:
    """Z ``[N, S, d_in + 1]`` (``d_in`` without bias) and G ``[V, N, S, d_out]`` of one layer."""

    Z: Tensor
    G: Tensor


class _Perturbed:
    """The network with every linear layer's output perturbed and its input returned."""

    def __init__(self, model: Module) -> None:
        self.model = model
        self.parameters = trainable(model)
        self.names = {m: n for n, m in model.named_modules() if isinstance(m, Linear)}

    def run(
        self, x: Tensor, perturb: Callable[[int, Tensor], Tensor]
    ) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]]]:
        """Return the output at one point and (layer, its input, its output) for every call."""
        calls: list[tuple[str, Tensor, Tensor]] = []

        def hook(module: Module, inputs: tuple, output: Tensor) -> Tensor:
            calls.append((self.names[module], inputs[0][0], output[0]))
            return output + perturb(len(calls) - 1, output)

        handles = [module.register_forward_hook(hook) for module in self.names]
        try:
            with ByHand():
                output = functional_call(self.model, self.parameters, (x[None],))[0]
        finally:
            for handle in handles:
                handle.remove()
        return output, calls


def layers(term: Any, model: Module, x: Tensor) -> dict[str, Layer]:
    """Return Z and G of every linear layer from explicit channels.

    Z are the channels of the layer's input as a function of x. G is the gradient of the scaled
    residual with respect to channels added to the layer's output. A layer used k times has k S
    channels.
    """
    network, N = _Perturbed(model), len(x)
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for n in range(N):
        directions, sums = channel_set(term.operators, x[n], n)
        S = 1 + len(directions) + len(sums)
        _, calls = network.run(x[n], lambda k, y: torch.zeros_like(y))
        widths = [len(output) for _, _, output in calls]

        def scaled(eps: list[Tensor], n=n, directions=directions, sums=sums) -> Tensor:
            def u(point: Tensor) -> Tensor:
                def perturb(call: int, output: Tensor) -> Tensor:
                    return _polynomial(eps[call], directions, sums, point - x[n])[None]

                return network.run(point, perturb)[0]

            return (point_weight(term, x, n) / N).sqrt() * residual_at(term, u, x, n)

        zeros = [x.new_zeros(S, width) for width in widths]
        gradients = jacrev(scaled)(zeros)
        per_layer: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
        for k, (name, _, _) in enumerate(calls):

            def layer_input(point: Tensor, k=k) -> Tensor:
                return network.run(point, lambda _, y: torch.zeros_like(y))[1][k][1]

            Z = channels_at(layer_input, x[n], directions, sums)
            if model.get_submodule(name).bias is not None:
                column = x.new_zeros(S, 1)
                column[0] = 1
                Z = torch.cat([Z, column], 1)
            known = per_layer.setdefault(name, ([], []))
            known[0].append(Z)
            known[1].append(gradients[k])
        for name, (Zs, Gs) in per_layer.items():
            total = found.setdefault(name, ([], []))
            total[0].append(torch.cat(Zs))
            total[1].append(torch.cat(Gs, 1))
    return {name: Layer(torch.stack(Z), torch.stack(G, 1)) for name, (Z, G) in found.items()}


# --- the same for channels of any order, in the standard basis ------------------------------------

Channel = Mapping[tuple[int, ...], float]  # Σ_α c_α ∂^α, with sorted α


def requested(operator: Any, d: int) -> list[Channel]:
    """Return the derivatives that an operator with constant coefficients names."""
    kind = _kind(operator)
    dims = list(range(d)) if getattr(operator, "dims", None) is None else list(operator.dims)
    if kind == "Value":
        return [{(): 1.0}]
    if kind == "Partial":
        return [{tuple(sorted(dims)): 1.0}]
    if kind in ("Gradient", "Divergence"):
        return [{(i,): 1.0} for i in dims]
    if kind == "Hessian":
        return [{pair: 1.0} for pair in itertools.combinations_with_replacement(dims, 2)]
    if kind == "Laplacian":
        return [{(i, i): 1.0 for i in dims}]
    assert kind == "Bilaplacian", kind
    return [Counter(tuple(sorted((i, i, j, j))) for i in dims for j in dims)]


def channels_of(operators: Mapping[str, Any], d: int) -> list[Channel]:
    """Return what must be propagated: all that is below what is named, and the named sums.

    By Faà di Bruno's formula ∂^α f(g) takes the ∂^β g with β ≤ α; β = α enters it linearly.
    """
    named = [c for operator in operators.values() for c in requested(operator, d)]
    below = {
        beta
        for channel in named
        for alpha in channel
        for k in range(len(alpha))
        for beta in itertools.combinations(alpha, k)
    } | {()}
    lower: list[Channel] = [{beta: 1.0} for beta in sorted(below)]
    sums: list[Channel] = []
    for channel in named:
        if channel not in lower and channel not in sums:
            sums.append(channel)
    return lower + sums


def _derivatives_of(function: Callable[[Tensor], Tensor], x: Tensor, channel: Channel) -> Tensor:
    terms = [
        c * all_derivatives(function, x, len(alpha))[(..., *alpha)] for alpha, c in channel.items()
    ]
    return sum(terms[1:], terms[0])


def _monomials(channel: Channel, t: Tensor) -> Tensor:
    """Return a polynomial of which this channel is 1 at 0, and what is below it 0."""
    total = t.new_zeros(())
    for alpha, c in channel.items():
        factorials = math.prod(math.factorial(k) for k in Counter(alpha).values())
        total = total + c * math.prod((t[i] for i in alpha), start=t.new_ones(())) / factorials
    return total / sum(c * c for c in channel.values())


def layers_of_any_order(term: Any, model: Module, x: Tensor) -> dict[str, Layer]:
    """Return Z and G of every linear layer as ``layers`` does, for operators of any order."""
    network, (N, d) = _Perturbed(model), x.shape
    channels = channels_of(term.operators, d)
    S, found = len(channels), {}
    for n in range(N):
        calls = network.run(x[n], lambda k, y: torch.zeros_like(y))[1]

        def scaled(eps: list[Tensor], n=n) -> Tensor:
            def perturb(point: Tensor) -> Callable[[int, Tensor], Tensor]:
                factors = torch.stack([_monomials(c, point - x[n]) for c in channels])
                return lambda call, _: (factors @ eps[call])[None]

            def u(point: Tensor) -> Tensor:
                return network.run(point, perturb(point))[0]

            return (point_weight(term, x, n) / N).sqrt() * residual_at(term, u, x, n)

        G = jacrev(scaled)([x.new_zeros(S, len(output)) for _, _, output in calls])
        for k, (name, _, _) in enumerate(calls):

            def layer_input(point: Tensor, k=k) -> Tensor:
                return network.run(point, lambda _, y: torch.zeros_like(y))[1][k][1]

            Z = torch.stack([_derivatives_of(layer_input, x[n], c) for c in channels])
            if model.get_submodule(name).bias is not None:
                Z = torch.cat([Z, torch.eye(S, 1, dtype=x.dtype)], 1)  # () comes first
            Zs, Gs = found.setdefault((name, n), ([], []))
            Zs.append(Z)
            Gs.append(G[k])
    names = dict.fromkeys(name for name, _ in found)
    return {
        name: Layer(
            torch.stack([torch.cat(found[name, n][0]) for n in range(N)]),
            torch.stack([torch.cat(found[name, n][1], 1) for n in range(N)], 1),
        )
        for name in names
    }


def kfac_expand(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return A = 1/(N S) Σ_ns z zᵀ and B = Σ_vns g gᵀ, by loops."""
    N, S, d = layer.Z.shape
    V, _, _, d_out = layer.G.shape
    A, B = torch.zeros(d, d).double(), torch.zeros(d_out, d_out).double()
    for n in range(N):
        for s in range(S):
            A += torch.outer(layer.Z[n, s], layer.Z[n, s]) / (N * S)
            for v in range(V):
                B += torch.outer(layer.G[v, n, s], layer.G[v, n, s])
    return A, B


def kfac_reduce(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return A = 1/N Σ_n z̄ z̄ᵀ and B = Σ_vn ḡ ḡᵀ with z̄ = mean_s z and ḡ = Σ_s g, by loops."""
    N, S, d = layer.Z.shape
    V, _, _, d_out = layer.G.shape
    A, B = torch.zeros(d, d).double(), torch.zeros(d_out, d_out).double()
    for n in range(N):
        z = sum(layer.Z[n, s] for s in range(S)) / S
        A += torch.outer(z, z) / N
        for v in range(V):
            g = sum(layer.G[v, n, s] for s in range(S))
            B += torch.outer(g, g)
    return A, B
