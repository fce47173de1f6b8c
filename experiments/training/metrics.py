"""The metrics of one optimizer as a CSV file."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.training.files import write_atomically

METRICS = "metrics.csv"
_TEXTS = ("accepted", "reason")

Value = float | int | bool | str


class MetricsFile:
    """Appends rows; each is on its way to the disk when ``append`` returns.

    Args:
        folder: Where the file is, or will be.
        columns: The columns.
        last_step: Rows of later steps, and incomplete ones, are removed first: what happened after
            the checkpoint that a run continues from happens again.
    """

    def __init__(self, folder: Path, columns: Sequence[str], last_step: int) -> None:
        path = folder / METRICS
        kept = [row for row in _complete_rows(path, columns) if int(row["step"]) <= last_step]
        self.last_step = int(kept[-1]["step"]) if kept else -1
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, columns)
        writer.writeheader()
        writer.writerows(kept)
        write_atomically(path, buffer.getvalue().encode())
        self._file = path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, columns)

    def append(self, row: Mapping[str, Value]) -> None:
        """Append a row; NaN becomes an empty cell."""
        self._writer.writerow({key: _cell(value) for key, value in row.items()})
        self._file.flush()
        self.last_step = int(row["step"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(folder: Path) -> dict[str, list[float]]:
    """Return the numbers of the metrics by column; NaN for empty cells, nothing without a file.

    Args:
        folder: Where the file is.
    """
    path = folder / METRICS
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in (rows[0] if rows else ()) if name not in _TEXTS]
    return {name: [float(row[name] or "nan") for row in rows] for name in names}


def _cell(value: Value) -> Value:
    return "" if isinstance(value, float) and math.isnan(value) else value


def _complete_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows that were written to the end."""
    if not path.exists():
        return []
    text = path.read_text(errors="replace")
    with io.StringIO(text[: text.rfind("\n") + 1], newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [row for row in rows if _is_complete(row, columns)]


def _is_complete(row: Mapping[str, str | None], columns: Sequence[str]) -> bool:
    """Return whether a row has all its cells, and numbers in them."""
    if row.keys() != set(columns) or None in row.values():
        return False
    try:
        int(row["step"] or "")
        for name, cell in row.items():
            if name not in _TEXTS:
                float(cell or "nan")
    except ValueError:
        return False
    return True
