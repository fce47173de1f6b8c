"""What a saved state belongs to: parameters by name, and the method by its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

from torch import Tensor

from pinncurv.linops import check_damping

# The key of what an optimizer remembers of no single parameter.
SHARED = "curvature"

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


def checked(
    state: Mapping[str, Any],
    method: Mapping[str, str],
    entries: Iterable[str],
    parameters: Iterable[Tensor],
) -> dict[str, Any]:
    """Check a state dictionary of a ``CurvatureOptimizer`` before it is loaded.

    Args:
        state: The dictionary.
        method: The parts of the optimizer that is to go on with it, as ``describe`` says them.
        entries: What it remembers of no single parameter.
        parameters: Its parameters, in the order of the groups.

    Returns:
        The entries.

    Raises:
        ValueError: If the state is not of that class, of other parts, of another version or of
            parameters of other shapes, or if a number in it is NaN or out of range.
    """
    if SHARED not in state["state"]:
        raise ValueError(
            "The state must come from a CurvatureOptimizer, but it has no entry "
            f"'{SHARED}'. Load the checkpoint of the same optimizer."
        )
    shared = dict(state["state"][SHARED])
    _check_same_method(shared.pop("method", {}), method)
    if set(shared) != set(entries):
        raise ValueError(
            f"The state must have the entries {sorted(entries)}, got {sorted(shared)}. It was "
            "saved by another version: start without it."
        )
    check_numbers(state)
    check_damping(shared["damping"])
    for group in state["param_groups"]:
        check_group(group, zero_rate=True)
    saved = chain.from_iterable(group["params"] for group in state["param_groups"])
    for index, parameter in zip(saved, parameters, strict=False):  # torch compares their numbers
        for key, tensor in state["state"].get(index, {}).items():
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"The state must belong to the same network, but '{key}' of parameter "
                    f"{index} has shape {list(tensor.shape)}, the parameter has "
                    f"{list(parameter.shape)}. Load the checkpoint of the same network."
                )
    return shared


def _check_same_method(saved: Mapping[str, str], present: Mapping[str, str]) -> None:
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


def merged(
    saved: Sequence[str | None] | None, present: Sequence[str | None], remembers: bool
) -> list[str | None]:
    """Return names of now, and of then for parameters that are frozen now.

    Args:
        saved: Names in the order of the groups; None where unknown.
        present: The same of now.
        remembers: Whether something of then is remembered by position, so that it must be the same.

    Raises:
        ValueError: If they must be the same and are not; names the first.
    """
    if saved is None:
        return list(present)
    pairs = list(zip(saved, present, strict=False))
    differing = [(a, b) for a, b in pairs if a is not None and b is not None and a != b]
    if remembers and (len(saved) != len(present) or differing):
        example = f"'{differing[0][0]}' is now '{differing[0][1]}'" if differing else "some are new"
        raise ValueError(
            "The state of an optimizer must go on with the same parameters in the same order, but "
            f"of {len(saved)} then and {len(present)} now, {len(differing)} have another name: "
            f"{example}. Build the optimizer from the parameters in the order of the state, or "
            "start a new one."
        )
    return [b or a for a, b in pairs] if len(saved) == len(present) else list(present)


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
