"""Names of the command line become objects of the library, by signatures and no copies of them.

``kfac_star.damping=1e-10`` sets an argument of ``pinncurv.presets.kfac_star``. A value is a Python
literal, or the name or a call of something that the library exports (``reduce``,
``LevenbergMarquardt(target=0.5)``); nothing else is evaluated. ``FILE.py:NAME`` names something in
a file of the user's own.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import typeguard


class UserError(Exception):
    """A request that cannot be met; the message says why and what to do."""


def first_line(error: BaseException | str) -> str:
    """Return what an error or a warning says first; torch adds a trace of C++ to some."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def told(error: BaseException) -> str:
    """Return what an error says, after its kind where that is needed to understand it."""
    plain = isinstance(error, (UserError, ValueError, TypeError, RuntimeError))
    return first_line(error) if plain else f"{type(error).__name__}: {first_line(error)}"


def near_misses(name: str, known: Iterable[str], at_most: int = 3) -> str:
    """Return " Perhaps you meant a or b." or, without anything near, nothing."""
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, n=at_most, cutoff=0.5)
    return f" Perhaps you meant {' or '.join(lower[n] for n in near)}." if near else ""


# --- values ---------------------------------------------------------------------------------------


@cache
def vocabulary() -> dict[str, Any]:
    """Return what the library exports and values may name: recipes, rules, samplers, ..."""
    # imported here since a list of names or an error needs none of it
    from pinncurv import curvature, diffops, linearization, linops, optim, problems  # noqa: PLC0415

    exported: dict[str, Any] = {}
    for package in (linearization, diffops, problems, linops, optim, curvature):
        for name, value in vars(package).items():
            home = getattr(value, "__module__", type(value).__module__)
            if not name.startswith("_") and not inspect.ismodule(value) and "pinncurv" in str(home):
                exported[name] = value
    return exported


def evaluate(text: str) -> Any:
    """Evaluate a literal, or a name or a call of the library's vocabulary.

    Raises:
        UserError: If it is anything else.
    """
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, UnicodeError, RecursionError, MemoryError, TypeError):
        raise UserError(
            f"{text!r} is neither a literal nor a name or call of the library."
        ) from None


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.Tuple() | ast.List():
            parts = [_value(part) for part in node.elts]
            return tuple(parts) if isinstance(node, ast.Tuple) else parts
        case ast.Dict(keys=keys) if None not in keys:
            return dict(
                zip((_value(key) for key in keys if key), map(_value, node.values), strict=True)
            )
        case ast.Name():
            return _named(node.id)
        case ast.Call(func=ast.Name()) if all(word.arg for word in node.keywords):
            function = _value(node.func)
            keywords = {word.arg: _value(word.value) for word in node.keywords if word.arg}
            try:
                return function(*map(_value, node.args), **keywords)
            except (TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
                raise UserError(f"{ast.unparse(node)}: {error}") from error
    raise UserError(
        f"{ast.unparse(node)!r} is neither a literal nor a name or call of the library."
    )


def _named(name: str) -> Any:
    known = vocabulary()
    if name not in known:
        near = near_misses(name, known) or f" It has {', '.join(sorted(known))}."
        raise UserError(f"the library exports no {name!r}.{near}")
    return known[name]


# --- arguments ------------------------------------------------------------------------------------


def arguments(
    target: Callable[..., Any], given: Iterable[str] = ()
) -> dict[str, inspect.Parameter]:
    """Return the parameters that can be set, without those that are given anyway."""
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in parameters.items() if p.kind in kinds and n not in set(given)}


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of the arguments, as far as they are known."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # an annotation of the user's own may be anything
        return {}


def bind(
    target: Callable[..., Any], settings: Mapping[str, str], label: str, given: Iterable[str] = ()
) -> dict[str, Any]:
    """Read settings as arguments of a function or class.

    Args:
        target: The function.
        settings: The values by argument, as text.
        label: What the command line calls it.
        given: Arguments that are not for the user to set.

    Raises:
        UserError: If there is no such argument, a value is of another type, or one is missing.
    """
    known, hints = arguments(target, given), hints_of(target)
    for name in settings:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise UserError(
                f"{label} has no argument {name!r}, it has {allowed}.{near_misses(name, known)}"
            )
    values = {n: _checked(text, hints.get(n, Any), f"{label}.{n}") for n, text in settings.items()}
    missing = [n for n, p in known.items() if p.default is p.empty and n not in values]
    if missing:
        raise UserError(
            f"{label} needs a value for {', '.join(missing)}: --set {label}.{missing[0]}=VALUE."
        )
    return values


def _checked(text: str, hint: Any, name: str) -> Any:
    """Evaluate a value and compare it with the type of its argument."""
    options = [get_args(part) for part in _parts(hint) if get_origin(part) is Literal]
    texts = [str(option) for group in options for option in group]
    if text in texts or (str in _parts(hint) and not text.startswith(("'", '"'))):
        return None if text == "None" and type(None) in _parts(hint) else text
    try:
        value = evaluate(text)
        typeguard.check_type(
            value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS
        )
    except UserError as error:
        if texts:
            wanted = f"one of {', '.join(texts)}, got {text}"
            raise UserError(f"{name} must be {wanted}.{near_misses(text, texts)}") from None
        raise UserError(f"{name} must be {inspect.formatannotation(hint)}; {error}") from None
    except typeguard.TypeCheckError:
        wanted = f"one of {', '.join(texts)}" if texts else inspect.formatannotation(hint)
        raise UserError(f"{name} must be {wanted}, got {text}.{near_misses(text, texts)}") from None
    return value


def _parts(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


# --- names ----------------------------------------------------------------------------------------


def resolve(name: str, known: Mapping[str, Callable[..., Any]], kind: str) -> Callable[..., Any]:
    """Return what a name of the library, or FILE.py:NAME, stands for.

    Args:
        name: The name.
        known: The names of the library.
        kind: What is looked for, e.g. "problem".

    Raises:
        UserError: If there is nothing of the name.
    """
    if is_own(name):
        file, _, own = name.rpartition(":")
        return _from_file(file or name, own if file else "", kind)
    plain = name.replace("-", "_")
    if plain not in known:
        near = near_misses(plain, known) or f" Choose one of {', '.join(known)}"
        raise UserError(
            f"There is no {kind} {name!r}.{near.rstrip('.')}, or FILE.py:NAME for your own."
        )
    return known[plain]


def is_own(name: str) -> bool:
    """Whether a name is that of something in a file of the user's own."""
    return ".py" in name


def short(name: str) -> str:
    """Return the name without its file, as folders and tables have it."""
    return name.rsplit(":", 1)[-1].replace("-", "_") if is_own(name) else name.replace("-", "_")


def digest(name: str) -> str:
    """Return the checksum of the user's file behind a name; nothing for a name of the library."""
    return (
        hashlib.sha256(Path(name.rsplit(":", 1)[0]).expanduser().read_bytes()).hexdigest()
        if is_own(name)
        else ""
    )


@cache
def _module(path: Path) -> Any:
    """Run a file of the user's own, once."""
    if not path.is_file():
        raise UserError(f"There is no file {path}. Name it relative to {Path.cwd()}.")
    spec = importlib.util.spec_from_file_location(f"own_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that what it defines can be pickled
    sys.path.insert(0, str(path.parent))  # so that it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        with suppress(ValueError):  # which the file may have removed itself
            sys.path.remove(str(path.parent))
    return module


def _from_file(file: str, name: str, kind: str) -> Any:
    module = _module(Path(file).expanduser().resolve())
    found = vars(module).get(name)
    if found is None:
        own = [
            n
            for n, v in vars(module).items()
            if not n.startswith("_") and _home(v) in (module.__name__, "")
        ]
        raise UserError(
            f"{file} defines no {name!r} to be a {kind}.{near_misses(name, own)} It has "
            f"{', '.join(own) or 'nothing'}."
        )
    return found


def _home(value: Any) -> str:
    """Return the name of the module that a value is from."""
    try:
        return str(value.__name__ if inspect.ismodule(value) else value.__module__)
    except Exception:  # numbers have none, and an object of the user's own may be anything
        return ""


# --- help -----------------------------------------------------------------------------------------


def describe(name: str, target: Callable[..., Any], given: Iterable[str] = ()) -> Iterator[str]:
    """Yield the lines of ``--list NAME``: arguments, types, defaults and docstring."""
    hints = hints_of(target)
    yield f"{name}: {getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    for argument, parameter in arguments(target, given).items():
        default = "required" if parameter.default is parameter.empty else _shown(parameter.default)
        kind = inspect.formatannotation(hints[argument]) if argument in hints else ""
        yield f"  --set {name}.{argument}={default}" + (f"    ({kind})" if kind else "")
    yield ""
    yield inspect.getdoc(target) or "(no docstring)"


def summary(target: Callable[..., Any]) -> str:
    """Return the first sentence of a docstring."""
    return first_line(inspect.getdoc(target) or "")


def _shown(default: Any) -> str:
    return getattr(default, "__name__", None) or repr(default)
