"""The folder of a run, which one process at a time writes to.

config.json                the experiment, which --config and --resume read
environment.json           versions, machine, commit and command of every part
summary.csv, figure.png    the closing table and picture
OPTIMIZER/seedN/           metrics.csv, checkpoint.pt and the one before it
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from experiments.objects import UserError

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.csv"
PARTIAL = ".partial"  # ends the name of a file that is being written
LOCK = ".lock"
_PACKAGES = ("pinncurv", "torch", "curvlinops-for-pytorch", "numpy", "scipy")


class BusyError(UserError):
    """Another process writes to the run folder."""


class RunFolder:
    """A folder that this process, and no other, writes to.

    Args:
        path: The folder, which exists.

    Raises:
        BusyError: If another process writes to it.
        UserError: If nobody can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise BusyError(f"Another process is writing to the run folder {path}.") from None
        except OSError as error:
            raise _cannot("write to", path, error) from error

    @classmethod
    def create(cls, path: Path | None, stem: str) -> RunFolder:
        """Create a run folder.

        Args:
            path: The folder, which must not exist or be empty; None for a new one in runs/.
            stem: What the name of the new one starts with, e.g. the problem.

        Raises:
            UserError: If the folder is used already, or cannot be created.
        """
        path = _unused(stem) if path is None else path
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            # all that a run leaves behind that is killed before it has written its settings
            used = any(entry.name not in (LOCK, CONFIG + PARTIAL) for entry in path.iterdir())
        except OSError as error:
            raise _cannot("create", path, error) from error
        if used:
            folder.close()
            raise UserError(
                f"The run folder {path} is used already. Continue that run with --resume {path} "
                "(train.py, sweep.py), or choose another folder."
            )
        return folder

    def close(self) -> None:
        """Let other processes write."""
        self._lock.release()

    def part(self, *names: str) -> Path:
        """Return a folder in it, and create it if need be."""
        folder = self.path.joinpath(*names)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def begin(self, settings: Any, device: torch.device) -> None:
        """Write the settings, a dataclass, and what the run is made with.

        Raises:
            UserError: If they cannot be written.
        """
        earlier = read_json(self.path / ENVIRONMENT)
        history = earlier if isinstance(earlier, list) else []
        try:
            (self.path / SUMMARY).unlink(missing_ok=True)  # of settings that are no longer its own
            write_json(self.path / CONFIG, dataclasses.asdict(settings))
            write_json(self.path / ENVIRONMENT, [*history, describe_environment(device)])
        except OSError as error:
            raise _cannot("write to", self.path, error) from error


def _cannot(what: str, path: Path, error: OSError) -> UserError:
    reason = error.strerror or type(error).__name__
    return UserError(
        f"Cannot {what} the run folder {path} ({reason}). Choose another --run-folder."
    )


def _unused(stem: str) -> Path:
    """Return a new name from its stem and the time."""
    stem = re.sub(r"[^\w.-]", "_", stem)
    name = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    path, count = Path("runs") / name, 1
    while os.path.lexists(path):
        count += 1
        path = Path("runs") / f"{name}-{count}"
    return path


# --- files ----------------------------------------------------------------------------------------


def write_atomically(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Write a file completely, or not at all; the old one goes to ``keep``, if that is given."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        partial.unlink(missing_ok=True)  # what does not fit must not stay in the way of others
        raise
    if keep is not None and path.is_file():
        os.replace(path, keep)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that a person can read."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Return what a file holds; None if it cannot be read or is no JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def read_config(path: Path, option: str) -> Any:
    """Return the settings in a file, for an option of the command line.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{option}: cannot read {path} ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option}: {path} is no valid JSON ({error}).") from error


# --- environment ----------------------------------------------------------------------------------


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions, machine, commit and command."""
    status = _git("status", "--porcelain")
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [re.sub(r"(://[^/@]*:)[^/@]*@", r"\1***@", word) for word in sys.argv],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in _PACKAGES},
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "cuda": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    """Return the installed version; None for a package that is imported from a folder."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Return what git says about this repository; None where there is no git or no repository."""
    command = ["git", *arguments]
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            command, cwd=here, capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
