"""Checkpoints that are whole or refused, and that know what they belong to."""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.training.errors import UserError
from experiments.training.files import write_atomically

CURRENT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"

# The hexadecimal SHA-256 of all that stands before it, and a newline. torch.load ignores it.
_CHECKSUM_BYTES = 65

_log = logging.getLogger(__name__)


class DamagedCheckpointError(Exception):
    """A file that is no whole checkpoint."""


def save(folder: Path, state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Save a checkpoint; the one before it stays until the new one is complete, and after.

    Args:
        folder: Where to.
        state: Dictionaries, lists, numbers, strings and tensors.
        identity: What the state belongs to.
    """
    buffer = io.BytesIO()
    torch.save({"identity": dict(identity), "state": dict(state)}, buffer)
    content = buffer.getvalue()
    write_atomically(folder / CURRENT, content + _checksum(content), keep=folder / PREVIOUS)


def load(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Load the newest whole checkpoint of a folder.

    Args:
        folder: Where from.
        identity: What the state must belong to.

    Returns:
        The state on the CPU; None if nothing has been saved yet.

    Raises:
        UserError: If the only checkpoints are damaged, or belong to something else.
    """
    paths = [path for path in (folder / CURRENT, folder / PREVIOUS) if path.exists()]
    problems = []
    for path in paths:
        try:
            checkpoint = read(path)
        except DamagedCheckpointError as error:
            problems.append(str(error))
            _log.warning("%s Trying the one before it.", error)
            continue
        _check_identity(path, checkpoint["identity"], identity)
        return checkpoint["state"]
    if problems:
        raise UserError(
            f"No whole checkpoint is left in {folder}: {' '.join(problems)} Restore one, or delete "
            f"{folder} to train this optimizer again from the start."
        )
    return None


def read(path: Path) -> dict[str, Any]:
    """Read and verify one checkpoint.

    Raises:
        DamagedCheckpointError: If it is not what was written.
    """
    content = path.read_bytes()
    payload, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if checksum != _checksum(payload):
        raise DamagedCheckpointError(
            f"{path} is damaged: its {len(content)} bytes do not have the checksum they end with."
        )
    try:
        checkpoint = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise DamagedCheckpointError(f"{path} cannot be read: {error}.") from error
    if not (isinstance(checkpoint, dict) and {"identity", "state"} <= checkpoint.keys()):
        raise DamagedCheckpointError(f"{path} is no checkpoint of this program.")
    return checkpoint


def _checksum(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b"\n"


def _check_identity(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of something else, and say what differs."""
    was, now = _flat(found), _flat(expected)
    differences = [
        f"{name} was {was.get(name, 'absent')} and now is {now.get(name, 'absent')}"
        for name in {**was, **now}
        if name not in was or name not in now or was[name] != now[name]
    ]
    if differences:
        raise UserError(
            f"{path} belongs to another run: {'; '.join(differences)}. Resume with the settings it "
            "was made with (give none of these anew), or start a new run."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries as one, with dots in the names and lists for sequences."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, (list, tuple)) else value
    return flat
