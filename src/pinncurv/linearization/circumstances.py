"""What a function depends on besides its arguments, as far as Python can tell."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping, Set
from typing import Any

from torch import Tensor
from torch.nn import Module

_DEPTH = 5
_MOST = 200  # objects that are looked into
_LONGEST = 64  # longer containers and arrays are told apart by identity
_LIBRARIES = ("torch", "pinncurv", "math", "numpy", "jaxtyping", "builtins")


def circumstances(given: Any, depth: int = _DEPTH, seen: dict[int, Any] | None = None) -> Any:
    """Return what changes when a number, tensor or function inside of an object does.

    Numbers and strings are themselves, tensors their identity and, unless they are trained, their
    version (the parameters are followed by whoever moves them), functions what they
    close over, their defaults and the global names that they use, modules and other objects their
    attributes. Not seen: what lies deeper than five objects or beyond the first 200, in long
    containers, in libraries, and writes through ``tensor.data``.

    Args:
        given: Any object.
        depth: How deep to look.
        seen: What has been looked into already, by identity.
    """
    if isinstance(given, bool | int | float | complex | str | bytes | None):
        return given if given == given else "nan"  # NaN differs from itself
    if isinstance(given, Tensor):
        if given.requires_grad:
            return id(given)
        return id(given), given.data_ptr(), None if given.is_inference() else given._version
    seen = {} if seen is None else seen
    if depth == 0 or isinstance(given, type | types.ModuleType) or len(seen) > _MOST:
        return id(given)
    if id(given) in seen:
        return id(given)
    seen[id(given)] = given  # kept alive, or another object might get its identity
    inner = functools.partial(circumstances, depth=depth - 1, seen=seen)
    if isinstance(given, types.FunctionType):
        if (given.__module__ or "").partition(".")[0] in _LIBRARIES:
            return id(given)
        cells = [_content(cell) for cell in given.__closure__ or ()]
        names = [given.__globals__[n] for n in _names(given.__code__) if n in given.__globals__]
        used = [value for value in names if not isinstance(value, types.ModuleType | type)]
        defaults = [given.__defaults__, given.__kwdefaults__]
        return id(given.__code__), tuple(inner(part) for part in (*cells, *used, *defaults))
    if isinstance(given, types.MethodType):
        return inner(given.__func__), inner(given.__self__)
    if isinstance(given, functools.partial):
        return inner(given.func), inner(given.args), inner(given.keywords)
    if isinstance(given, Mapping | Set | list | tuple):
        if len(given) > _LONGEST:
            return id(given), len(given)
        if isinstance(given, Mapping):
            return _items(given, inner)
        return type(given), tuple(inner(part) for part in given)
    if type(given).__module__ == "numpy":
        small = getattr(given, "size", _LONGEST + 1) <= _LONGEST
        return (id(type(given)), given.tobytes()) if small else id(given)
    if isinstance(given, Module):
        return tuple(_of_module(module, inner) for module in given.modules())
    attributes = getattr(given, "__dict__", None)
    return id(given), _items(attributes, inner) if attributes else None


# what modules have of torch, and do not compute with
_OF_TORCH = set(vars(Module())) - {"training", "_buffers"}


def _items(mapping: Mapping[Any, Any], inner: Callable[[Any], Any]) -> Any:
    return tuple((inner(key), inner(value)) for key, value in mapping.items())


def _of_module(module: Module, inner: Callable[[Any], Any]) -> Any:
    """Return the identity of a module and its parameters, its attributes, and its forward."""
    own = {k: v for k, v in vars(module).items() if k not in _OF_TORCH}
    parameters = tuple(id(p) for p in module._parameters.values())
    return id(module), parameters, _items(own, inner), inner(type(module).forward)


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
