"""Whether a residual function accepts the operators that a loss term declares."""

import difflib
import inspect
import keyword
from collections.abc import Callable, Collection, Mapping
from typing import Any


def check_operators(term: str, operators: Mapping[str, Any]) -> None:
    """Check that there are operators, that they are objects, and that keywords can carry them.

    Args:
        term: The name of the loss term, for errors.
        operators: The operators by name.

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
        if not (isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)):
            raise ValueError(
                f"Term '{term}': names of operators must be Python identifiers, because the "
                f"residual gets them as keyword arguments, got {name!r}. Rename it, e.g. to 'u_x'."
            )
        if isinstance(operator, type):
            raise TypeError(
                f"Term '{term}': operator '{name}' must be an object, got the class "
                f"{operator.__name__}. Write {operator.__name__}()."
            )


def check_signature(term: str, residual: Callable[..., Any], operators: Collection[str]) -> None:
    """Check that residual(x, name=..., ...) with the operators' names is a valid call.

    Args:
        term: The name of the loss term, for errors.
        residual: The residual function.
        operators: The names of the operators.

    Raises:
        ValueError: If it is not; the error says what is missing or unexpected, with near misses.
    """
    try:
        signature = inspect.signature(residual)
    except ValueError:  # a function written in C, which does not tell its arguments
        return
    try:
        signature.bind(None, **dict.fromkeys(operators))
    except TypeError as error:
        raise ValueError(
            f"Term '{term}': the residual is called as residual(x, {', '.join(operators)}), which "
            f"its signature {signature} does not allow: {error}."
            f"{_disagreements(signature, operators)} Make the names agree; x comes first, by "
            "position."
        ) from None


def _disagreements(signature: inspect.Signature, operators: Collection[str]) -> str:
    """List the names that only one side has."""
    parameters = list(signature.parameters.values())[1:]
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    accepted = {p.name: p.default is p.empty for p in parameters if p.kind in keywords}
    missing = [name for name, required in accepted.items() if required and name not in operators]
    unexpected = [name for name in operators if name not in accepted]
    return _describe("Arguments without an operator", missing, unexpected) + _describe(
        "Operators without an argument", unexpected, missing or accepted
    )


def _describe(what: str, names: list[str], candidates: Collection[str]) -> str:
    """Name the culprits and, for each, what it may be a misspelling of."""
    described = []
    for name in names:
        near = difflib.get_close_matches(name, candidates, n=1)
        described.append(f"'{name}'" + (f" (did you mean '{near[0]}'?)" if near else ""))
    return f" {what}: {', '.join(described)}." if described else ""
