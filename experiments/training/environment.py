"""What a run was made with, for the record."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("pinncurv", "torch", "curvlinops-for-pytorch", "numpy", "scipy")


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions, machine and commit.

    Args:
        device: Where the run computes.
    """
    return {
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cuda": torch.version.cuda,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": _has_uncommitted_changes(),
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    """Return the installed version; None for a package that is imported from a folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _has_uncommitted_changes() -> bool | None:
    status = _git("status", "--porcelain")
    return None if status is None else bool(status)


def _git(*arguments: str) -> str | None:
    """Return what git says about this repository; None where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
