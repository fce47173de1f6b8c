"""Curvature of physics-informed neural networks: Gauss-Newton, KFAC and relatives in PyTorch."""

from importlib.metadata import version
from typing import Any

__version__ = version("pinncurv")


def __getattr__(name: str) -> Any:
    """Import ``pinncurv.verify`` when it is asked for: the package itself imports nothing."""
    if name == "verify":
        from pinncurv.verification import verify  # noqa: PLC0415 - only when asked for

        return verify
    raise AttributeError(f"module 'pinncurv' has no attribute {name!r}")
