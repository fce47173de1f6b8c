"""Where in a model something was called: error messages name it."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterable, Iterator
from types import FrameType

from torch.nn import Module


def calling_module() -> str:
    """Return the path of the innermost module whose forward is running, such as ``net.2``.

    The call stack is read instead of tracked by hooks: this costs nothing until an error happens.
    """
    return _path(_callers(inspect.currentframe()))


def raising_module(error: BaseException) -> str:
    """Return the path of the innermost module that an error was raised in."""
    return _path(reversed([frame for frame, _ in traceback.walk_tb(error.__traceback__)]))


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _path(frames: Iterable[FrameType]) -> str:
    """Return the path of the innermost module in frames, in the outermost one."""
    running: list[Module] = []
    for frame in frames:
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Module) and all(candidate is not m for m in running):
            running.append(candidate)
    if not running:
        return "no module"
    innermost, outermost = running[0], running[-1]
    if innermost is outermost:
        return f"the model {type(outermost).__name__}"
    for name, module in outermost.named_modules():
        if module is innermost:
            return name
    return type(innermost).__name__
