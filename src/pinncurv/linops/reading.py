"""Reading what was computed on a device: the host waits, and many numbers take as long as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# Flags that nobody has read yet, each with what is to be done if it is false.
_WAITING: ContextVar[list[tuple[Tensor, Callable[[], None]]] | None] = ContextVar(
    "waiting_checks", default=None
)


@contextmanager
def checks_wait() -> Iterator[None]:
    """Let checks inside the block wait until something else is read there, or until its end."""
    token = _WAITING.set([])
    try:
        yield
        read()
    finally:
        _WAITING.reset(token)


def check(flag: Tensor, otherwise: Callable[[], None]) -> None:
    """Call a function if a flag is false: at once, or later within ``checks_wait``.

    Args:
        flag: One element.
        otherwise: What is called; most raise an error.
    """
    waiting = _WAITING.get()
    if waiting is not None:
        waiting.append((flag, otherwise))
    elif not read(flag)[0][0]:
        otherwise()


def read(*values: Tensor) -> list[list[float]]:
    """Return the entries of tensors, flattened, with one wait for the device.

    Checks that wait are settled first, in order.
    """
    waiting, failed = _WAITING.get(), []
    flags = list(waiting or [])
    wanted = [*(flag for flag, _ in flags), *values]
    if not wanted:
        return []
    flat = torch.cat([value.reshape(-1).to(wanted[-1].device) for value in wanted]).tolist()
    if waiting:
        waiting.clear()  # before they are settled: who raises may read
        failed = [otherwise for (_, otherwise), good in zip(flags, flat, strict=False) if not good]
    for otherwise in failed:
        otherwise()
    numbers, start = [], len(flags)
    for value in values:
        numbers.append([float(number) for number in flat[start : start + value.numel()]])
        start += value.numel()
    return numbers


def is_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether the sum of all entries is finite, which proves that they are.

    The converse fails on overflow.
    """
    return torch.stack([tensor.sum() for tensor in tensors]).sum().isfinite()


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether all entries are finite."""
    sums_are = bool(read(is_finite(tensors))[0][0])
    return sums_are or all(bool(tensor.isfinite().all()) for tensor in tensors)


def check_finite(tensors: Sequence[Tensor], otherwise: Callable[[], None]) -> None:
    """Call a function if an entry is not finite: at once, or later within ``checks_wait``."""

    def look() -> None:
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            otherwise()

    check(is_finite(tensors), look)
