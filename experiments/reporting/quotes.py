"""Tables that the report takes over from the pages of ``paper``, where they were written down."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from experiments.objects import UserError
from experiments.reporting.typeset import Column, Table, as_written, text

PAGES = Path(__file__).resolve().parents[2] / "paper"


@dataclass(frozen=True)
class Quote:
    """A part of a table of a page.

    Args:
        name: The name of its files.
        title: What it shows.
        page: The page.
        under: The heading that it follows.
        columns: The columns that are taken, the first of which names the lines.
        lines: The lines that are taken, by their first cell; all by default.
    """

    name: str
    title: str
    page: str
    under: str
    columns: Sequence[str]
    lines: Sequence[str] = ()

    def table(self) -> Table:
        """Return it.

        Raises:
            UserError: If the page has no such table any more.
        """
        for found in _tables(PAGES / self.page, self.under):
            if set(self.columns) <= set(found):
                break
        else:
            raise UserError(
                f"{self.page} must have a table under {self.under!r} with the columns "
                f"{', '.join(self.columns)}."
            )
        found = found[list(self.columns)].set_index(self.columns[0], drop=False)
        if missing := [line for line in self.lines if line not in found.index]:
            raise UserError(
                f"The table under {self.under!r} of {self.page} must have the lines "
                f"{', '.join(missing)}, got {', '.join(found.index)}."
            )
        found = found.loc[list(self.lines or found.index)]
        first, *others = self.columns
        shown = [Column(first, first, text), *(Column(c, c, as_written) for c in others)]
        return Table(self.name, self.title, found, shown)


def _tables(page: Path, heading: str) -> Iterator[pd.DataFrame]:
    """Yield the tables of a page between a heading and the next one."""
    parts = re.split(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    body = dict(zip(parts[1::2], parts[2::2], strict=True)).get(heading, "")
    for found in re.finditer(r"(?:^\|.*\n)+", body, flags=re.MULTILINE):
        cells = [
            [cell.strip().replace("**", "") for cell in line.strip("|").split("|")]
            for line in found[0].splitlines()
        ]
        yield pd.DataFrame(cells[2:], columns=cells[0])


QUOTES = (
    Quote(
        "quote_shares",
        "Quality of curvature operators along KFAC* on poisson2d with 921 parameters",
        "findings.md",
        "Along KFAC*, a small network",
        ("operator", "error, 10", "error, 200", "share, 0", "share, 10", "share, 50", "share, 200"),
        (
            *("exact", "exact blocks", "exact diagonal"),
            *("KFAC expand", "KFAC reduce", "KFAC expand, terms merged"),
            *("KFAC expand, empirical", "KFAC expand, forward-only"),
            *("one product per channel", "one product per pair of channels"),
            *("EKFAC, basis of KFAC expand", "best Kronecker product", "subspace of 100 points"),
            *("10 of CG, KFAC preconditions", "10 of CG, EKFAC preconditions", "gradient"),
        ),
    ),
    Quote(
        "quote_prediction",
        "Rank correlation of measures with the loss after 30 more steps",
        "findings.md",
        "What predicts the training",
        ("measure", "LM, 0", "LM, 10", "LM, 50", "LM, 200"),
    ),
    Quote(
        "quote_quality",
        "Share of the possible decrease against cost",
        "findings.md",
        "Quality against cost",
        ("method", "share, step 0", "share, step 10", "share, step 50", "cost, KFAC* = 1"),
    ),
    Quote(
        "quote_fails",
        "The same in more dimensions",
        "findings.md",
        "Where it fails",
        ("operator", *(f"{name}, {k}" for name in ("heat4d", "poisson5d") for k in (0, 50, 250))),
    ),
    Quote(
        "quote_operators",
        "Time and memory of operators on poisson2d with 9,873 parameters",
        "results.md",
        "What the operators cost",
        ("2-64-64-48-48-1: D = 9,873", "build ms", "solve ms", "MB"),
    ),
    Quote(
        "quote_nested",
        "Loss and gradient against nested reverse mode",
        "results.md",
        "Second edition: what the core costs",
        ("", "nested ms", "pinncurv ms", "ratio", "peak MB nested / pinncurv"),
    ),
    Quote(
        "quote_steps",
        "Time of a step over that of loss and gradient by nested reverse mode",
        "results.md",
        "Time and memory",
        ("size", "gradient", "KFAC*", "Gauss-Newton", "peak MB of KFAC*"),
    ),
)
