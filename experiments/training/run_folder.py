"""The folder of a run.

config.json         the settings, which --config and --resume read
environment.json    versions, machine and commit
summary.csv         the closing table
figure.png          the picture
<optimizer>/        metrics.csv, checkpoint.pt and the one before it
"""

from __future__ import annotations

import dataclasses
import json
import os
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from experiments.training.errors import UserError
from experiments.training.files import PARTIAL, write_atomically
from experiments.training.settings import ProblemSettings

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there.
    fcntl = None  # type: ignore[assignment]

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
_LOCK = ".lock"

# All that a run leaves behind that is killed before it has written its settings.
_REMNANTS = {_LOCK, CONFIG + PARTIAL}


class RunFolder:
    """A folder that this process, and no other, writes to.

    Args:
        path: The folder, which exists.

    Raises:
        UserError: If another process writes to it, or nobody can.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._lock: IO[str] = (path / _LOCK).open("w")
        except OSError as error:
            raise UserError(
                f"Cannot write to the run folder {path} ({error.strerror}). Choose another one "
                "with --run-folder."
            ) from error
        try:
            if fcntl is not None:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(f"Another process is writing to the run folder {path}.") from error

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
            used = any(entry.name not in _REMNANTS for entry in path.iterdir())
        except OSError as error:
            raise UserError(
                f"Cannot create the run folder {path} ({error.strerror}). Choose another one with "
                "--run-folder."
            ) from error
        if used:
            raise UserError(
                f"The run folder {path} is used already. Continue that run with --resume {path}, "
                "or choose another folder."
            )
        return cls(path)

    def close(self) -> None:
        """Let other processes write."""
        self._lock.close()

    def optimizer(self, name: str) -> Path:
        """Return the folder of one optimizer, and create it if need be."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def write_settings(self, settings: ProblemSettings) -> None:
        """Write the settings."""
        self._write_json(CONFIG, dataclasses.asdict(settings))

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Write what the run is made with; what earlier parts of it were made with is kept."""
        path = self.path / ENVIRONMENT
        try:
            earlier = json.loads(path.read_text())
        except (OSError, ValueError):
            earlier = []
        now = {"started": datetime.now().astimezone().isoformat(timespec="seconds")}
        self._write_json(ENVIRONMENT, [*earlier, {**now, **environment}])

    def _write_json(self, name: str, content: Any) -> None:
        text = json.dumps(content, indent=2) + "\n"
        write_atomically(self.path / name, text.encode())


def _unused(stem: str) -> Path:
    """Return a new name from its stem and the time."""
    name = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    path, count = Path("runs") / name, 1
    while os.path.lexists(path):
        count += 1
        path = Path("runs") / f"{name}-{count}"
    return path
