"""What a saved state belongs to: parameters by name, and the method by its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

# What schedulers of torch write into a group besides the learning rate.
_OF_SCHEDULERS = {"initial_lr", "max_lr", "min_lr", "swa_lr"}


def names_of(objective: Any) -> list[str]:
    """Return the names of an objective's parameters, their positions if it has none."""
    names = getattr(objective, "names", None)
    if names is not None:
        return list(names)
    return [f"parameter {i}" for i in range(len(objective.parameters))]


def describe(part: Any) -> str:
    """Return what a part of a method is, but no number in it, which may differ after loading."""
    if is_dataclass(part) and not isinstance(part, type):
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        inner = [
            f"{name}={describe(value)}"
            for name, value in values.items()
            if not isinstance(value, int | float | None)
        ]
        return f"{type(part).__name__}({', '.join(inner)})"
    if part is None or isinstance(part, str | tuple | list):
        return repr(part)
    return getattr(part, "__qualname__", type(part).__name__)


def check_same_method(saved: Mapping[str, str], present: Mapping[str, str]) -> None:
    """Check that a state was saved by the same method.

    Raises:
        ValueError: If a part differs; names it.
    """
    differing = [
        f"{name} {saved.get(name)} instead of {present.get(name)}"
        for name in {**present, **saved}
        if saved.get(name) != present.get(name)
    ]
    if differing:
        raise ValueError(
            "The state must come from an optimizer of the same parts, but it was saved with "
            f"{'; '.join(differing)}. Build the optimizer as it was (numbers may differ), or start "
            "without the state."
        )


def check_same_names(saved: Sequence[str | None], present: Sequence[str | None]) -> None:
    """Check that what is remembered by position belongs to the parameters of the same names.

    Args:
        saved: Names in the order of the groups; None where unknown.
        present: The same of now.

    Raises:
        ValueError: If they differ; names the first.
    """
    pairs = list(zip(saved, present, strict=False))
    differing = [(a, b) for a, b in pairs if a is not None and b is not None and a != b]
    if len(saved) != len(present) or differing:
        example = f"'{differing[0][0]}' is now '{differing[0][1]}'" if differing else "some are new"
        raise ValueError(
            "The state of an optimizer must go on with the same parameters in the same order, but "
            f"of {len(saved)} then and {len(present)} now, {len(differing)} have another name: "
            f"{example}. Build the optimizer from the parameters in the order of the state, or "
            "start a new one."
        )


def merged(saved: Sequence[str | None] | None, present: Sequence[str | None]) -> list[str | None]:
    """Return names of now, and of then for parameters that are frozen now."""
    if saved is None or len(saved) != len(present):
        return list(present)
    return [new or old for old, new in zip(saved, present, strict=True)]


def names_in_groups(
    groups: Iterable[Mapping[str, Any]], named: Iterable[tuple[str, Tensor]]
) -> list[str | None]:
    """Return the names of the parameters of groups, None for those that are not among the named."""
    known = {id(p): name for name, p in named}
    return [known.get(id(p)) for group in groups for p in group["params"]]


def check_group(group: Mapping[str, Any], zero_rate: bool = False) -> None:
    """Check that a group of parameters has no options but a learning rate.

    Args:
        group: The group.
        zero_rate: Whether the rate may be zero, as a schedule makes it.

    Raises:
        ValueError: If there is an unknown option, or the rate is not finite and positive.
    """
    unknown = sorted(set(group) - {"params", "param_names", "lr"} - _OF_SCHEDULERS)
    if unknown:
        raise ValueError(
            f"A group of parameters must have no options but lr, got {', '.join(unknown)}, which "
            "would be ignored. Regularization is a term of the loss; damping and momentum are "
            "arguments of the optimizer."
        )
    lr = float(group["lr"])
    if not (math.isfinite(lr) and (lr > 0 or (zero_rate and lr == 0))):
        raise ValueError(f"lr must be finite and positive, got {lr}.")


def check_numbers(state: Any, where: str = "state") -> None:
    """Check that no number or tensor of a state to be loaded is NaN.

    Raises:
        ValueError: If one is; says where.
    """
    if isinstance(state, Mapping):
        for key, value in state.items():
            check_numbers(value, f"{where}[{key!r}]")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            check_numbers(value, f"{where}[{i}]")
    elif (isinstance(state, float) and math.isnan(state)) or (
        isinstance(state, Tensor) and bool(state.isnan().any())
    ):
        raise ValueError(
            f"The state to be loaded must contain no NaN, but {where} is or has one. Load an "
            "earlier checkpoint."
        )


def check_no_stray_gradients(parameters: Iterable[Tensor]) -> None:
    """Check that nobody left gradients, which a step would neither use nor add to.

    Raises:
        ValueError: If a parameter has a gradient other than zero.
    """
    known = list(parameters)
    strays = [p for p in known if p.grad is not None and bool(p.grad.any())]
    if strays:
        raise ValueError(
            "A step differentiates its objective itself, so .grad must be None or zero before it, "
            f"got gradients of {len(strays)} of {len(known)} parameters, which would be ignored. "
            "Call zero_grad() first; what they were for belongs into the objective, as a LossTerm."
        )
