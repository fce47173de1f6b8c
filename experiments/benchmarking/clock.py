"""The time of a piece of work, and the peak memory of this process (Linux) or of a GPU."""

import time
from collections.abc import Callable
from pathlib import Path

import torch

_PROC = Path("/proc/self")


def best_seconds(work: Callable[[], object], device: str, repetitions: int = 5) -> float:
    """Return the shortest time of a piece of work, after one that does not count."""
    seconds(work, device)
    return min(seconds(work, device) for _ in range(repetitions))


def seconds(work: Callable[[], object], device: str) -> float:
    """Return the time of a piece of work, on a GPU until it has ended there."""
    start = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def reset_peak(device: str) -> None:
    """Let the peak start from what is held now."""
    if device == "cpu":
        (_PROC / "clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats(device)


def peak_megabytes(device: str) -> float:
    """Return the peak since it was reset: resident, or allocated on a GPU."""
    return _resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated(device) / 1e6


def megabytes(device: str) -> float:
    """Return what is held now."""
    return _resident("VmRSS") if device == "cpu" else torch.cuda.memory_allocated(device) / 1e6


def _resident(which: str) -> float:
    lines = (_PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e6
