"""What a function depends on besides its arguments, as far as Python can tell."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence, Set
from contextvars import ContextVar
from numbers import Number
from typing import Any

from torch import Tensor
from torch.nn import Module

_DEPTH = 8
_MOST = 500  # objects that are looked into
_LONGEST = 64  # longer containers are told apart by identity, unless they hold numbers
_LARGEST = 1 << 16  # longer arrays and containers of numbers, too
_LIBRARIES = ("torch", "pinncurv", "math", "numpy", "jaxtyping", "builtins")


def circumstances(given: Any, depth: int = _DEPTH, seen: dict[int, Any] | None = None) -> Any:
    """Return what changes when a number, tensor or function inside of an object does.

    Numbers and strings are themselves, tensors their identity and, unless they are trained, their
    version (the parameters are followed by whoever moves them), functions what they
    close over, their defaults, their attributes and the global names that they use, also of modules
    that are imported, containers and context variables what they contain, and other objects their
    attributes and those of their class. Not seen: what lies deeper than eight objects or beyond the
    first 500, in long containers of objects, in libraries, in iterators and generators, and in
    objects without attributes (such as of ctypes, or an open file), and writes through
    ``tensor.data``.

    Args:
        given: Any object.
        depth: How deep to look.
        seen: What has been looked into already, by identity.
    """
    if isinstance(given, bool | int | float | complex | str | bytes | range | None):
        return given if given == given else "nan"  # NaN differs from itself
    if isinstance(given, Tensor):
        if given.requires_grad:
            return id(given)
        return id(given), given.data_ptr(), None if given.is_inference() else given._version
    seen = {} if seen is None else seen
    if depth == 0 or len(seen) > _MOST or id(given) in seen:
        return id(given)
    if isinstance(given, types.ModuleType | type | types.FunctionType) and _of_library(given):
        return id(given)
    seen[id(given)] = given  # kept alive, or another object might get its identity
    inner = functools.partial(circumstances, depth=depth - 1, seen=seen)
    if isinstance(given, types.FunctionType):
        names = _names(given.__code__)
        used = [_content(cell) for cell in given.__closure__ or ()]
        used += [given.__globals__[name] for name in names if name in given.__globals__]
        for module in [part for part in used if isinstance(part, types.ModuleType)]:
            if not _of_library(module):  # config.factor
                used += [vars(module)[name] for name in names if name in vars(module)]
        used += [given.__defaults__, given.__kwdefaults__]
        return id(given.__code__), tuple(map(inner, used)), _items(vars(given), inner)
    if isinstance(given, types.ModuleType):
        return id(given)
    if isinstance(given, type):
        own = {k: v for k, v in vars(given).items() if k == "__call__" or not k.startswith("__")}
        return id(given), _items(own, inner)
    if isinstance(given, property | staticmethod | classmethod):
        return inner(given.fget if isinstance(given, property) else given.__func__)
    if isinstance(given, types.MethodType):
        return inner(given.__func__), inner(given.__self__)
    if isinstance(given, types.BuiltinMethodType | types.MethodWrapperType):
        return id(given), inner(given.__self__)  # numbers.__getitem__
    if isinstance(given, functools.partial):
        return inner(given.func), inner(given.args), inner(given.keywords)
    if isinstance(given, ContextVar):
        return id(given), inner(given.get(None))
    if isinstance(given, Mapping | Set | Sequence):
        return _of_container(given, inner), _items(getattr(given, "__dict__", {}), inner)
    if type(given).__module__ == "numpy":
        small = getattr(given, "size", _LARGEST + 1) <= _LARGEST
        return (id(type(given)), hash(given.tobytes())) if small else id(given)
    if isinstance(given, Module):
        return tuple(_of_module(module, inner) for module in given.modules())
    if isinstance(given, Number):  # Decimal
        return given if given == given else "nan"
    attributes = {**getattr(given, "__dict__", {}), **_slots(given)}
    return id(given), inner(type(given)), _items(attributes, inner)


_NUMBERS = {bool, int, float}
_PLAIN = {*_NUMBERS, complex, str, bytes, type(None)}


def _of_container(given: Any, inner: Callable[[Any], Any]) -> Any:
    if len(given) > _LONGEST:
        plain = len(given) <= _LARGEST and all(type(part) in _NUMBERS for part in given)
        return (type(given), tuple(given)) if plain else (id(given), len(given))
    if isinstance(given, Mapping):
        return _items({inner(key): value for key, value in given.items()}, inner)
    return type(given), tuple(inner(part) for part in given)


def _of_library(given: Any) -> bool:
    name = given.__name__ if isinstance(given, types.ModuleType) else given.__module__
    return _is_library((name or "").partition(".")[0])


@functools.cache
def _is_library(root: str) -> bool:
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return root in _LIBRARIES or root in sys.stdlib_module_names or "site-packages" in file


def _slots(given: Any) -> dict[str, Any]:
    names = [vars(cls).get("__slots__", ()) for cls in type(given).__mro__]
    flat = [n for part in names for n in ((part,) if isinstance(part, str) else part)]
    return {name: getattr(given, name) for name in flat if hasattr(given, name)}


# what modules have of torch, and do not compute with
_OF_TORCH = set(vars(Module())) - {"training", "_buffers"}


def _items(mapping: Mapping[Any, Any], inner: Callable[[Any], Any]) -> Any:
    plain = _PLAIN
    return tuple((k, v if type(v) in plain else inner(v)) for k, v in mapping.items())


def _of_module(module: Module, inner: Callable[[Any], Any]) -> Any:
    """Return the identity of a module and its parameters, its attributes, and its forward."""
    own = {k: v for k, v in vars(module).items() if k not in _OF_TORCH}
    parameters = tuple(id(p) for p in module._parameters.values())
    hooks = len(module._backward_hooks) + len(module._backward_pre_hooks)
    return id(module), parameters, hooks, _items(own, inner), inner(type(module))


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the names that code uses, with that of the functions defined in it."""
    inner = [_names(part) for part in code.co_consts if isinstance(part, types.CodeType)]
    return tuple(dict.fromkeys((*code.co_names, *(name for names in inner for name in names))))


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
