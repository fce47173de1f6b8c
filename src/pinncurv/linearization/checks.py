"""Checks of what cannot be declared, made once: points do not mix, and jets see what torch sees."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.jets import Derivative, Jet, agree, merge, outputs as outputs_of, seed
from pinncurv.linearization.part import TermPart
from pinncurv.linearization.spelled import Spelled
from pinncurv.problems import LossTerm

CHECKED_POINTS = 16  # points to look at


def _groups(n: int) -> list[list[int]]:
    """Cut n points into two groups, in another order, none in the place that it has among all."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    order = {2: [1, 0], 3: [1, 0, 2], 4: [1, 3, 2, 0], 5: [1, 3, 0, 4, 2]}.get(n, order)
    groups = [order[: (n + 1) // 2], order[(n + 1) // 2 :]]
    # a single point is taken three times, since squeeze() does another thing to one
    return [group * 3 if len(group) == 1 else group for group in groups if group]


def check_pointwise(part: TermPart, model: Module) -> None:
    """Check that each row of the residual depends on its point only, at a few of the points.

    u(x_n) and r(x_n, u_n) are the same whatever the other points are, and whenever they are called

    What fails in single precision is looked at once more in double precision, since sin(1e5 x)
    amplifies rounding, which does depend on the number of points.

    Args:
        part: The term at all points.
        model: The network.

    Raises:
        ValueError: If network or residual mix the points, change from call to call, or write to
            what they are given; names the rows that differ.
    """
    rows = torch.linspace(0, len(part.x) - 1, min(len(part.x), CHECKED_POINTS)).round().long()
    index = rows.to(part.x.device)
    few = part.at(index)
    tolerance = 2000 * torch.finfo(part.x.dtype).eps
    with torch.no_grad():
        error = _mixing(few, model, tolerance, rows)
        if error is None:
            return
        _check_repeatable(few, model, tolerance)
        try:
            precise = few.x.dtype != torch.float64 and _in_double(part.term.at(index), few.x, model)
            if precise and _mixing(*precise, tolerance, rows) is None:
                return
        except Exception:  # something can't be converted
            raise error from None
        raise error


def _in_double(term: LossTerm, x: Tensor, model: Module) -> tuple[TermPart, Module]:
    """Return copies of a term and a network in double precision."""
    residual, operators, network = copy.deepcopy((term.residual, term.operators, model))
    for thing in (network, residual, *(v for o in operators.values() for v in vars(o).values())):
        if isinstance(thing, Module):
            thing.double()
    term = term.with_fields(residual=residual, operators=operators, weight=1.0)
    return TermPart.of_all(term, x.double()), network


def _mixing(few: TermPart, model: Module, tolerance: float, rows: Tensor) -> ValueError | None:
    """Return what says which rows change when they are computed without others.

    The residual is called with the very same values, among all points and among some: then it
    matters only what it does itself.
    """
    together = _evaluate(few, model)
    for group in _groups(len(few.x)):
        same = {name: value[group] for name, value in together.items()}
        alone = _evaluate(few.at(torch.tensor(group, device=few.x.device)), model, same)
        for name, size in _sizes(few, together).items():
            bad = _differing(alone[name], same[name], tolerance * size)
            if bad is not None:
                return _mixed(few, name, rows[group][bad].tolist(), alone[name], same[name])
    return None


def check_residual_on_jets(part: TermPart, model: Module) -> None:
    """Check that a residual does on jets, by which trained tensors are recorded, the same.

    Args:
        part: The term at all points.
        model: The network.

    Raises:
        ValueError: If it does not.
    """
    few = part.at(slice(0, CHECKED_POINTS))
    if not agree(few.evaluate(model, as_jets=True).detach(), few.evaluate(model).detach()):
        raise ValueError(
            f"Term '{part.term.name}': the residual must do on jets, by which its trained tensors "
            "are recorded, what it does on tensors, but its values differ. Don't branch on "
            "isinstance(u, Tensor), torch.is_tensor or hasattr, and write u = u + ... instead of "
            "u += ..."
        )


_RESIDUAL = ""  # among the names of operators


def _evaluate(
    part: TermPart, model: Module, given: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the values of the operators, and the residual of these or of given ones.

    The residual gets copies; it is checked that it leaves them as they are.
    """
    x = part.x.clone()
    read = part.plan.read(x, model(Jet(part.seed.channels, part.plan.layout)))
    given = read if given is None else {name: given[name] for name in read}
    values = {name: tensor.clone() for name, tensor in [*given.items(), *part.data.items()]}
    before = {name: tensor._version for name, tensor in {"x": x, **values}.items()}
    residual = part.call(x, values)
    after = {name: tensor._version for name, tensor in {"x": x, **values}.items()}
    written = [name for name in before if before[name] != after[name]]
    if written:
        raise ValueError(
            f"Term '{part.term.name}': the residual must leave its arguments as they are, but "
            f"writes to {', '.join(written)} in place. Write e.g. u = u - 1 in place of u -= 1 or "
            "u.sub_(1)."
        )
    return {**read, _RESIDUAL: residual}


def _sizes(part: TermPart, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the size of what values are the sum of; those of the network have one size."""
    known = [part.x, *(t for t in part.data.values() if t.is_floating_point())]
    own = [value for name, value in values.items() if name != _RESIDUAL]
    sizes = {True: _largest(values[_RESIDUAL], *known), False: _largest(*own, *known)}
    return {name: sizes[name == _RESIDUAL] for name in values}


def _largest(*tensors: Tensor) -> Tensor:
    """Return the largest finite absolute value."""
    sizes = [t.abs().nan_to_num(0, 0, 0).max() for t in tensors if t.numel()]
    return torch.stack([size.to(tensors[0]) for size in sizes]).max()


def _differing(a: Tensor, b: Tensor, allowed: Tensor) -> Tensor | None:
    """Return which rows of two tensors differ by more than is allowed; None for none."""
    if a.shape != b.shape:
        return torch.ones(len(a), dtype=torch.bool)
    equal = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= allowed)
    return None if equal.all() else ~equal.flatten(1).all(dim=1).cpu()


def _check_repeatable(few: TermPart, model: Module, tolerance: float) -> None:
    """Check that a second call gives the same numbers."""
    once, again = _evaluate(few, model), _evaluate(few, model)
    for name, size in _sizes(few, once).items():
        if _differing(once[name], again[name], tolerance * size) is not None:
            raise ValueError(
                f"Term '{few.term.name}': network and residual must be functions of their "
                "arguments, but give other numbers when they are called a second time at the same "
                "points. Draw random numbers beforehand (as data= of the LossTerm), call "
                "model.eval(), and keep nothing that changes from call to call."
            )


def _mixed(
    few: TermPart, name: str, rows: list[int], alone: Tensor, together: Tensor
) -> ValueError:
    """Say who is not pointwise, and how."""
    if alone.shape != together.shape:
        how = (
            f"it has {together.shape[1]} components at {len(few.x)} points and {alone.shape[1]} at "
            f"{len(alone)} of them. A tensor [N] may have been broadcast against one of [N, 1]"
        )
    else:
        how = (
            f"{'its rows' if name == _RESIDUAL else f'already the values of {name!r}'} at points "
            f"{rows} change when other points are left out or stand in another "
            f"order, e.g. from {together.flatten()[:3].tolist()} to {alone.flatten()[:3].tolist()}"
        )
    return ValueError(
        f"Term '{few.term.name}': every row of the residual must depend on its own point only, but "
        f"{how}. Means, norms, shifts or sums over the points, in the residual or the network, "
        "have no Gauss-Newton matrix of this kind. Write an integral as one point that holds all "
        "nodes (README, 'Integral conditions'), and constants as numbers."
    )


def check_derivatives(part: TermPart, model: Module, parameters: Mapping[str, Tensor]) -> None:
    """Check jets through the network against reverse mode: two points, one random direction.

    Σ_k c_k aᵀ ∂ᵏ/∂tᵏ u(x + t w) for k = 0 up to the highest order of the term, c, a, w random, and
    its gradient in the parameters

    Args:
        part: The term.
        model: The network.
        parameters: The trained tensors by name.

    Raises:
        ValueError: If they differ; says in what.
    """
    generator = torch.Generator().manual_seed(0)
    # generic points between the given ones, which may lie on kinks; two, for squeeze()
    some = part.x[:CHECKED_POINTS]
    noise = torch.randn(2, x_dim := some.shape[1], generator=generator, dtype=torch.float64)
    x = some.mean(0) + (0.1 * some.std(0, correction=0) + 1e-3) * noise.to(some)
    w = torch.randn(x_dim, generator=generator, dtype=torch.float64).to(x)
    order = part.plan.layout.orders[-1]
    own = {id(parameter) for parameter in model.parameters()}
    mine = {name: p for name, p in parameters.items() if id(p) in own}
    layout, channels = merge([Derivative.along(*[w] * k) for k in range(order + 1)], x)
    with torch.enable_grad():
        received = dict(outputs_of(model(seed(x, layout))))
        jets = {name: jet for name, jet in received.items() if isinstance(jet, Jet)}
        weights = {n: torch.randn(j.shape, generator=generator).to(x) for n, j in jets.items()}
        ours = [_sum_of(weights, {n: j.channels[c] for n, j in jets.items()}) for c in channels]
        try:
            theirs = _by_reverse_mode(model, x, w, weights, order)
            gradients = _gradients(theirs, mine)
        except (RuntimeError, NotImplementedError):
            return  # torch has no derivative of something; jets need none of it
        own_gradients = _gradients(ours, mine)
    names = [f"derivative {k} along a direction" for k in range(order + 1)]
    _compare(part, model, names, ours, theirs)
    names = [f"gradient in {name}" for name in mine]
    _compare(part, model, names, own_gradients, gradients)


def _compare(
    part: TermPart, model: Module, names: list[str], ours: list[Tensor], theirs: list[Tensor]
) -> None:
    """Compare one by one, relative to the size of each and a thousandth of the largest."""
    sizes = [float(b.detach().abs().max()) for b in theirs]
    for what, a, b, size in zip(names, ours, theirs, sizes, strict=True):
        tolerance = 50 * torch.finfo(b.dtype).eps ** 0.5 * (size + 1e-3 * max(sizes))
        if b.isfinite().all() and not (a - b).abs().max() <= tolerance:
            raise ValueError(
                f"Term '{part.term.name}': the network {type(model).__name__} must do to a jet "
                f"what it does to a tensor, but by torch.autograd its {what} is "
                f"{b.flatten()[:3].tolist()}, by jets {a.flatten()[:3].tolist()}. It may branch on "
                "the type of its input, detach it, call a torch.autograd.Function or a rule of "
                "your own that is wrong. pinncurv.verify(...) says more; check=False of the "
                "Objective turns this check off."
            )


def _sum_of(weights: Mapping[str, Tensor], outputs: Mapping[str, Any]) -> Tensor:
    """Return Σ aᵀ u over the outputs that depend on x, and the points."""
    return torch.stack([(a * outputs[name]).sum() for name, a in weights.items()]).sum()


def _by_reverse_mode(
    model: Module, x: Tensor, w: Tensor, weights: Mapping[str, Tensor], order: int
) -> list[Tensor]:
    """Return aᵀ u and its derivatives along w, by repeated torch.autograd.grad."""
    t = x.new_zeros((), requires_grad=True)
    with Spelled():
        found = [_sum_of(weights, dict(outputs_of(model(x + t * w))))]
    for _ in range(order):
        last = found[-1]
        grad = (
            torch.autograd.grad(last, t, create_graph=True, allow_unused=True)[0]
            if last.requires_grad
            else None
        )
        found.append(torch.zeros_like(last) if grad is None else grad)
    return found


def _gradients(values: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the gradient of a weighted sum of values in each parameter."""
    total = torch.stack([value / (1 + k) for k, value in enumerate(values)]).sum()
    tensors = list(parameters.values())
    if not tensors or not total.requires_grad:
        return [torch.zeros_like(p) for p in tensors]
    found = torch.autograd.grad(total, tensors, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(tensors, found, strict=True)]
