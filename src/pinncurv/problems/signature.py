"""Whether a residual function accepts the operators and data that a loss term declares."""

import difflib
import inspect
import keyword
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module


def check_operators(term: str, operators: Mapping[str, Any]) -> None:
    """Check that there are operators, that they are objects, and that keywords can carry them.

    Raises:
        TypeError: If an operator is a class, not an object.
        ValueError: If there is no operator or a name is no Python identifier.
    """
    if not operators:
        raise ValueError(
            f"Term '{term}': there must be at least one operator, got none. Declare what the "
            'residual needs, e.g. {"u": Value()}.'
        )
    for name, operator in operators.items():
        _check_name(term, "operators", name)
        if isinstance(operator, type):
            raise TypeError(
                f"Term '{term}': operator '{name}' must be an object, got the class "
                f"{operator.__name__}. Write {operator.__name__}()."
            )


def check_data(term: str, data: Mapping[str, Any], operators: Collection[str]) -> None:
    """Check that data are tensors with rows, and that keywords of their own can carry them.

    Raises:
        TypeError: If data is no tensor.
        ValueError: If a tensor has no rows, or a name is no Python identifier or an operator's.
    """
    for name, tensor in data.items():
        _check_name(term, "data", name)
        if name in operators:
            raise ValueError(
                f"Term '{term}': data and operators must have different names, got '{name}' in "
                f"both. Rename one, e.g. to '{name}_data'."
            )
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"Term '{term}': data '{name}' must be a tensor, got {type(tensor).__name__}. "
                "Use torch.as_tensor."
            )
        if tensor.ndim == 0:
            raise ValueError(
                f"Term '{term}': data '{name}' must have one row per point, shape [N, ...], got a "
                "single number. Write it into the residual."
            )


def _check_name(term: str, what: str, name: Any) -> None:
    """Check that a keyword argument can carry the name."""
    if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)):
        raise ValueError(
            f"Term '{term}': names of {what} must be Python identifiers, because the residual gets "
            f"them as keyword arguments, got {name!r}. Rename it, e.g. to 'u_x'."
        )


def check_signature(
    term: str,
    residual: Callable[..., Any],
    operators: Collection[str],
    data: Collection[str] = (),
) -> None:
    """Check that residual(x, name=..., ...) with the names of operators and data is a valid call.

    Raises:
        ValueError: If it is not; the error says what is missing or unexpected, with near misses.
    """
    names = [*operators, *data]
    try:
        called = residual.forward if isinstance(residual, Module) else residual
        signature = inspect.signature(called)
    except ValueError:  # a function written in C, which does not tell its arguments
        return
    try:
        signature.bind(None, **dict.fromkeys(names))
    except TypeError as error:
        raise ValueError(
            f"Term '{term}': the residual is called as residual(x, {', '.join(names)}), which "
            f"its signature {signature} does not allow: {error}."
            f"{_disagreements(signature, operators, data)} Make the names agree; x comes first, by "
            "position."
        ) from None


def _disagreements(
    signature: inspect.Signature, operators: Collection[str], data: Collection[str]
) -> str:
    """List the names that only one side has."""
    parameters = list(signature.parameters.values())[1:]
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    accepted = {p.name: p.default is p.empty for p in parameters if p.kind in keywords}
    names = {*operators, *data}
    missing = [name for name, required in accepted.items() if required and name not in names]
    unused = [name for name in operators if name not in accepted]
    unused_data = [name for name in data if name not in accepted]
    source = "an operator or data" if data else "an operator"
    return (
        _describe(f"Arguments without {source}", missing, unused + unused_data)
        + _describe("Operators without an argument", unused, missing or accepted)
        + _describe("Data without an argument", unused_data, missing or accepted)
    )


def _describe(what: str, names: list[str], candidates: Collection[str]) -> str:
    """Name the culprits and, for each, what it may be a misspelling of."""
    described = []
    for name in names:
        near = difflib.get_close_matches(name, candidates, n=1)
        described.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    return f" {what}: {', '.join(described)}." if described else ""
