"""Writing files such that no half-written one is ever seen under its name."""

from __future__ import annotations

import os
from pathlib import Path

# Ends the name of a file that is being written.
PARTIAL = ".partial"


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file completely, or not at all.

    Args:
        path: The file.
        content: Its new content.
        keep: Where the old file goes; it is lost if None.
    """
    partial = path.with_name(path.name + PARTIAL)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if keep is not None and path.exists():
        os.replace(path, keep)
    os.replace(partial, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring the renaming to the disk, where the system can open folders."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
