"""Free memory, and the check that something large fits into it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


# Not worth a look at what is free.
_ALWAYS = 1 << 26


class NotEnoughMemoryError(MemoryError):
    """Something needs more memory than is free."""


def check_memory(
    what: str, elements: int, dtype: torch.dtype, device: torch.device, instead: str
) -> None:
    """Check that something fits into the memory, before it is made.

    Args:
        what: What it is.
        elements: How many numbers it has.
        dtype: Their type.
        device: Where they are.
        instead: What else to do, as a sentence.

    Raises:
        NotEnoughMemoryError: If it does not fit.
    """
    needed = elements * dtype.itemsize
    if needed < _ALWAYS:
        return
    free = free_memory(device)
    if free is not None and needed > free:
        raise NotEnoughMemoryError(
            f"{what[:1].upper()}{what[1:]} must fit into the memory, but takes {_text(needed)}, "
            f"and {_text(free)} are free on {device}. {instead}"
        )


def free_memory(device: torch.device) -> int | None:
    """Return how many bytes are free, or None where that is not known.

    Limits of a control group count. On CUDA it is what the device and torch's cache have left.
    """
    if device.type == "cpu":
        known = [number for number in (_available(), _below_limit()) if number is not None]
        return min(known, default=None)
    if device.type == "cuda" and torch.cuda.is_available():
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return None


def _available() -> int | None:
    """Return what the system says is available."""
    try:
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # no Linux: all of it
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _below_limit() -> int | None:
    """Return what the process's control groups have left; None without a limit."""
    left = (_left(folder, *names) for folder, names in _groups())
    return min((number for number in left if number is not None), default=None)


def _groups() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of the memory's control groups, with the names of limit, use and cache."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = root / path.strip("/")
        yield from (
            (folder, names) for folder in (own, *own.parents) if folder.is_relative_to(root)
        )


def _left(folder: Path, limit: str, used: str, cache: str) -> int | None:
    """Return what one control group has left; files that it has read can be dropped."""
    try:
        most = int((folder / limit).read_text())
        statistics = (folder / "memory.stat").read_text().split()
        dropped = int(statistics[statistics.index(cache) + 1]) if cache in statistics else 0
        return max(0, most - int((folder / used).read_text()) + dropped)
    except (OSError, ValueError):  # not there, or "max"
        return None


def _text(number: int) -> str:
    """Return bytes for a reader."""
    value, unit = next(
        (number / 1000**power, unit)
        for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"))
        if number >= 1000**power or unit == "MB"
    )
    return f"{value:.3g} {unit}"
