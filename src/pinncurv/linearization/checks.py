"""Checks of what cannot be declared, made once: points do not mix, and jets see what torch sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import Module

from pinncurv.jets import Derivative, Jet, agree, merge, outputs as outputs_of, seed
from pinncurv.linearization.part import TermPart
from pinncurv.linearization.spelled import Spelled

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

    r(x_n, ...) is the same whatever the other points are, and whenever it is called.

    Args:
        part: The term at all points.
        model: The network.

    Raises:
        ValueError: If network or residual mix the points, change from call to call, or write to
            what they are given; names the rows that differ.
    """
    rows = torch.linspace(0, len(part.x) - 1, min(len(part.x), CHECKED_POINTS)).round().long()
    few = part.at(rows.to(part.x.device))
    with torch.no_grad():
        together = _evaluate(few, model)
        size = _size(few, together)
        for group in _groups(len(rows)):
            alone = _evaluate(few.at(torch.tensor(group, device=part.x.device)), model)
            expected = together[group]
            bad = _differing(alone, expected, size)
            if bad is not None:
                raise _mixed(few, model, rows[group][bad].tolist(), alone, expected)


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


def _evaluate(part: TermPart, model: Module) -> Tensor:
    """Evaluate the residual; check that its arguments are left as they are."""
    x = part.x.clone()
    given = part.plan.read(x, model(Jet(part.seed.data, part.plan.layout)))
    values = {**given, **{name: tensor.clone() for name, tensor in part.data.items()}}
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
    return residual


def _size(part: TermPart, residual: Tensor) -> float:
    """Return the size of the numbers that a residual is the sum of, for what rounding does."""
    known = [residual, part.x, *(t for t in part.data.values() if t.is_floating_point())]
    sizes = [t.abs().nan_to_num(0, 0, 0).max() for t in known if t.numel()]
    return float(torch.stack([s.to(residual) for s in sizes]).max())


def _differing(a: Tensor, b: Tensor, size: float) -> Tensor | None:
    """Return which rows of two residuals differ by more than rounding; None for none."""
    if a.shape != b.shape:
        return torch.ones(len(a), dtype=torch.bool)
    equal = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= 2000 * _eps(a) * size)
    return None if equal.all() else ~equal.all(dim=1).cpu()


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


def _mixed(
    few: TermPart, model: Module, rows: list[int], alone: Tensor, together: Tensor
) -> ValueError:
    """Say who is not pointwise, and how."""
    name = few.term.name
    once, again = _evaluate(few, model), _evaluate(few, model)
    if _differing(once, again, _size(few, once)) is not None:
        return ValueError(
            f"Term '{name}': network and residual must be functions of their arguments, but give "
            "other numbers when they are called a second time at the same points. Draw random "
            "numbers beforehand (as data= of the LossTerm), call model.eval(), and keep nothing "
            "that changes from call to call."
        )
    if alone.shape != together.shape:
        how = (
            f"it has {together.shape[1]} components at {len(few.x)} points and {alone.shape[1]} at "
            f"{len(alone)} of them. A tensor [N] may have been broadcast against one of [N, 1]"
        )
    else:
        how = (
            f"its rows at points {rows} change when other points are left out or stand in another "
            f"order, e.g. from {together.flatten()[:3].tolist()} to {alone.flatten()[:3].tolist()}"
        )
    return ValueError(
        f"Term '{name}': every row of the residual must depend on its own point only, but {how}. "
        "Means, norms, shifts or sums over the points, in the residual or the network, have no "
        "Gauss-Newton matrix of this kind. Write an integral as one point that holds all nodes "
        "(README, 'Integral conditions'), and constants as numbers."
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
        outputs = [jet.data for _, jet in outputs_of(model(seed(x, layout)))]
        weights = [torch.randn(o.shape[1:], generator=generator).to(o) for o in outputs]
        ours = [_sum_of(weights, [o[c] for o in outputs]) for c in channels]
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
        tolerance = 50 * _eps(b) ** 0.5 * (size + 1e-3 * max(sizes))
        if b.isfinite().all() and not (a - b).abs().max() <= tolerance:
            raise ValueError(
                f"Term '{part.term.name}': the network {type(model).__name__} must do to a jet "
                f"what it does to a tensor, but by torch.autograd its {what} is "
                f"{b.flatten()[:3].tolist()}, by jets {a.flatten()[:3].tolist()}. It may branch on "
                "the type of its input, detach it, call a torch.autograd.Function or a rule of "
                "your own that is wrong. pinncurv.verify(...) says more; check=False of the "
                "Objective turns this check off."
            )


def _sum_of(weights: list[Tensor], outputs: list[Tensor]) -> Tensor:
    """Return Σ aᵀ u over all outputs and points."""
    return torch.stack([(a * u).sum() for a, u in zip(weights, outputs, strict=True)]).sum()


def _by_reverse_mode(
    model: Module, x: Tensor, w: Tensor, weights: list[Tensor], order: int
) -> list[Tensor]:
    """Return aᵀ u and its derivatives along w, by repeated torch.autograd.grad."""
    t = x.new_zeros((), requires_grad=True)
    with Spelled():
        outputs = [u for _, u in outputs_of(model(x + t * w)) if isinstance(u, Tensor)]
    found = [_sum_of(weights, outputs)]
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
