"""What a function depends on besides its arguments, as far as Python can tell."""

from __future__ import annotations

import functools
import sys
import types
import weakref
from abc import ABC
from collections.abc import Callable, Container, Mapping, Sequence, Set
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import chain
from numbers import Number
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from pinncurv.jets import has_hooks

_DEPTH = 8
_MOST = 500  # objects that are looked into
_LONGEST = 64  # longer containers are told apart by identity, unless they hold numbers and strings
_LARGEST = 1 << 16  # longer arrays and containers of numbers, too
_LIBRARIES = ("torch", "pinncurv", "math", "numpy", "jaxtyping", "builtins")


def circumstances(given: Any, known: Container[int] | None = None) -> Any:
    """Return what changes when a number, tensor or function inside of an object does.

    Numbers and strings are themselves, tensors their identity and, unless they are known, their
    version, functions what they close over, their defaults, their attributes and the global names
    that they use, also of modules that are imported, and other objects the attributes that some of
    that code names, and those of their classes. Not seen: what lies deeper than eight objects or
    beyond the first 500, in long containers of objects, in libraries, in iterators and generators,
    in objects without attributes (such as of ctypes, or an open file), and writes through
    ``tensor.data``.

    Args:
        given: Any object.
        known: Ids of tensors that are followed by whoever moves them; None for all parameters.
    """
    key = getattr(given, "__func__", given)
    kept = isinstance(key, types.FunctionType | Module)  # which saves a second look
    names = _NAMED.setdefault(key, set(_ROOTS)) if kept else set(_ROOTS)
    while True:
        number = len(names)
        found = _look(given, known, names, _DEPTH, {})
        if len(names) == number:  # else what was looked into before may have more that is used
            return found


def _look(
    given: Any, known: Container[int] | None, names: set[str], depth: int, seen: dict[int, Any]
) -> Any:
    """Look into an object, not into those that were seen before, by identity."""
    if isinstance(given, _PLAIN_TYPES):
        return given if given == given else "nan"  # NaN differs from itself
    if isinstance(given, Tensor):
        trained = given.requires_grad
        if id(given) in known if known is not None else trained or isinstance(given, Parameter):
            return identity(given), trained, given.dtype, given.device, has_hooks(given)
        version = None if given.is_inference() else given._version
        return identity(given), trained, given.data_ptr(), version
    if depth == 0 or len(seen) > _MOST or id(given) in seen:
        return identity(given)
    if isinstance(given, types.ModuleType):
        return identity(given)
    if isinstance(given, type | types.FunctionType) and _of_library(given):
        return identity(given)
    seen[id(given)] = given  # kept alive, or another object might get its identity
    inner = functools.partial(_look, known=known, names=names, depth=depth - 1, seen=seen)
    if isinstance(given, types.FunctionType):
        mine = _names(given.__code__)
        names.update(mine)
        used = [_content(cell) for cell in given.__closure__ or ()]
        used += [given.__globals__[name] for name in mine if name in given.__globals__]
        for module in [part for part in used if isinstance(part, types.ModuleType)]:
            if not _of_library(module):  # config.factor
                used += [vars(module)[name] for name in mine if name in vars(module)]
        used += [given.__defaults__, given.__kwdefaults__]
        return identity(given.__code__), tuple(map(inner, used)), _items(vars(given), inner)
    if isinstance(given, type):
        own = chain(*[vars(cls).items() for cls in given.__mro__ if not _of_library(cls)])
        return identity(given), tuple((k, inner(v)) for k, v in own if _is_used(k, given, names))
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
        return (identity(type(given)), hash(given.tobytes())) if small else identity(given)
    if isinstance(given, Module):
        return tuple(_of_module(module, names, inner) for module in given.modules())
    if isinstance(given, Number):  # Decimal
        return given if given == given else "nan"
    attributes = {**getattr(given, "__dict__", {}), **_slots(given)}
    attributes = {k: v for k, v in attributes.items() if _is_used(k, type(given), names)}
    return identity(given), inner(type(given)), _items(attributes, inner)


def identity(given: Any) -> Any:
    """Return what is equal as long as an object lives, and for no other one with its id then."""
    try:
        return id(given), weakref.ref(given)
    except TypeError:  # of lists and the like there is none
        return id(given)


# Attributes that the code inside of an object names: others, such as a history of losses next to a
# residual, make no difference.
_NAMED: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
_ROOTS = ("forward", "training")
_DYNAMIC = {"getattr", "attrgetter", "vars", "__dict__", "asdict", "astuple", "eval", "exec"}
_PLAIN_BASES = {object, Module, ABC, types.SimpleNamespace}  # which use no attributes of others
_UNUSED = {*vars(type), *vars(object), *vars(dataclass(type("", (), {}))), "__slots__", "__del__"}


def _is_used(name: str, of: type, names: set[str]) -> bool:
    """Whether an attribute of an object or its class may make a difference."""
    if name.startswith("__"):
        return name == "__call__" or name not in _UNUSED
    return name in names or not _is_plain(of) or not _DYNAMIC.isdisjoint(names)


@functools.lru_cache(maxsize=1024)
def _is_plain(given: type) -> bool:
    """Whether no code of a library, which is not looked into, uses attributes of a class."""
    return all(cls in _PLAIN_BASES or not _of_library(cls) for cls in given.__mro__)


_PLAIN_TYPES = (bool, int, float, complex, str, bytes, range, type(None))
_PLAIN = set(_PLAIN_TYPES)


def _of_container(given: Any, inner: Callable[[Any], Any]) -> Any:
    parts = [*given, *given.values()] if isinstance(given, Mapping) else given
    plain = all(issubclass(kind, _PLAIN_TYPES) for kind in set(map(type, parts)))
    if len(given) > (_LARGEST if plain else _LONGEST):
        return identity(given), len(given)
    return type(given), tuple(parts if plain else map(inner, parts))


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


# what modules have of torch, and what of that they compute with
_OF_TORCH = set(vars(Module())) - {"training"}
_USED = ("_buffers", "_forward_hooks", "_forward_pre_hooks")


def _items(mapping: Mapping[Any, Any], inner: Callable[[Any], Any]) -> Any:
    plain = _PLAIN
    return tuple((k, v if type(v) in plain else inner(v)) for k, v in mapping.items())


def _of_module(module: Module, names: set[str], inner: Callable[[Any], Any]) -> Any:
    """Return the identity of a module, its parts and its parameters, its attributes and forward."""
    given = vars(module)
    own = {
        k: v
        for k, v in given.items()
        if (k not in _OF_TORCH and _is_used(k, type(module), names)) or (k in _USED and v)
    }
    hooks = len(module._backward_hooks) + len(module._backward_pre_hooks)
    parts = tuple(map(id, module._modules.values()))
    parameters = tuple(map(inner, module._parameters.values()))
    return identity(module), parts, parameters, hooks, _items(own, inner), inner(type(module))


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
