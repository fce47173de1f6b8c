"""The closing table."""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from experiments.training.files import write_atomically
from experiments.training.metrics import read_metrics

SUMMARY = "summary.csv"


@dataclass(frozen=True)
class Result:
    """Where an optimizer ended up.

    Args:
        outcome: How its training ended.
        metrics: The last row of its metrics.
    """

    outcome: str
    metrics: Mapping[str, float]


def read_result(folder: Path, outcome: str) -> Result:
    """Return the result that an optimizer's metrics end with.

    Args:
        folder: The folder of the optimizer.
        outcome: How its training ended.
    """
    return Result(outcome, {name: column[-1] for name, column in read_metrics(folder).items()})


def show(results: Mapping[str, Result], title: str, console: Console) -> None:
    """Print the table.

    Args:
        results: The result of each optimizer.
        title: What was trained.
        console: Where to print.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("steps", "time [s]", "loss", "RMSE", "relative error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, result in results.items():
        row = defaultdict(lambda: math.nan, result.metrics)  # empty if the start failed
        table.add_row(
            name,
            f"{row['step']:.0f}",
            f"{row['seconds']:.1f}",
            *(f"{row[key]:.2e}" for key in ("loss", "rmse", "relative_error")),
        )
    console.print(table)
    console.print(
        "time: of the optimizer's steps alone. RMSE: root mean square of u - u* on fresh points; "
        "relative error: the same, divided by the root mean square of u*.",
        highlight=False,
    )


def save(results: Mapping[str, Result], path: Path) -> None:
    """Write the table as CSV, with the losses of all terms and how each training ended."""
    buffer = io.StringIO(newline="")
    columns = ["optimizer", "outcome", *max((r.metrics for r in results.values()), key=len)]
    writer = csv.DictWriter(buffer, columns)
    writer.writeheader()
    for name, result in results.items():
        writer.writerow({"optimizer": name, "outcome": result.outcome, **result.metrics})
    write_atomically(path / SUMMARY, buffer.getvalue().encode())
