"""Computed references are kept on disk, and computed anew when their file is lost or damaged."""

import contextlib
import hashlib
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_EDITION = b"1"  # raised when a change of the code makes other, better references
Arrays = Mapping[str, NDArray[np.float64]]


def cache_folder() -> Path:
    """Return where references are kept: $PINNCURV_CACHE, or pinncurv in the user's cache."""
    if chosen := os.environ.get("PINNCURV_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pinncurv"


def kept(name: str, definition: bytes, compute: Callable[[], Arrays]) -> Arrays:
    """Return what a function computes, from the file of an earlier call if there is one.

    A file is found by a hash of the definition, its checksums are verified, and it appears at
    once and whole. Where none can be written, nothing is kept.

    Args:
        name: What the file is called, with the hash.
        definition: All that the result depends on.
        compute: Returns the arrays by name.
    """
    digest = hashlib.sha256(definition + _EDITION).hexdigest()
    path = cache_folder() / f"{name}-{digest[:16]}.npz"
    # OSError: there is none, or no access; the others: it is cut off, damaged, or something else
    unreadable = contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)
    with unreadable, path.open("rb") as file:
        return dict(np.load(file, allow_pickle=False))
    arrays = compute()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, arrays)
    return arrays


def _write(path: Path, arrays: Any) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.close()
            os.replace(file.name, path)
        finally:
            Path(file.name).unlink(missing_ok=True)
