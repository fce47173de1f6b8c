"""Tables of numbers as people read them: one list of columns makes Markdown and LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.folder import write_atomically
from experiments.results import write_table

# What pdfLaTeX does not know by itself, or takes for a command.
_LATEX = {
    **{c: f"\\{c}" for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "λ": r"$\lambda$",
    "⁻¹": r"$^{-1}$",
    "ᵀ": r"$^\top$",
    "²": r"$^2$",
    "×": r"$\times$",
    "−": "$-$",
    "Δ": r"$\Delta$",
}
_SPECIAL = re.compile("|".join(map(re.escape, _LATEX)))


def error(value: float) -> str:
    """Return an error to two digits."""
    if pd.isna(value):
        return ""
    if math.isinf(value):
        return "inf"
    if value == 0:
        return "0"
    if 0.01 <= value < 99.5:  # which is 100 to two digits
        return f"{value:#.2g}".rstrip(".")
    return re.sub(r"e([+-])0*", lambda m: "e" + m[1].strip("+"), f"{value:.1e}")


def count(value: float) -> str:
    """Return a whole number."""
    return "" if pd.isna(value) else f"{value:,.0f}"


def amount(value: float) -> str:
    """Return a time or size to three digits."""
    if pd.isna(value):
        return ""
    return count(value) if value >= 100 else f"{value:.3g}"


def text(value: Any) -> str:
    """Return words, which are aligned on their left."""
    return "" if pd.isna(value) else str(value)


def as_written(value: Any) -> str:
    """Return a number that is text already."""
    return str(value)


def latex(words: str) -> str:
    """Return words such that LaTeX shows them."""
    return _SPECIAL.sub(lambda found: _LATEX[found[0]], words)


def in_formula(value: float) -> str:
    """Return an error as a formula of LaTeX."""
    mantissa, _, exponent = error(value).replace("inf", r"\infty").partition("e")
    return f"{mantissa}\\cdot 10^{{{exponent}}}" if exponent else mantissa


@dataclass(frozen=True)
class Column:
    """A column that is shown.

    Args:
        key: The column of the table.
        title: Its title.
        show: What makes text of a value.
        group: What it has in common with its neighbours, a title above theirs.
    """

    key: str
    title: str
    show: Callable[[Any], str] = error
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A table that is shown.

    Columns without any text are left out.

    Args:
        name: The name of its files.
        title: What it shows.
        data: The numbers.
        columns: What of them is shown.
        best: The column whose smallest number is bold.
        sections: The column whose changes begin a new part with its value as a headline.
    """

    name: str
    title: str
    data: pd.DataFrame
    columns: Sequence[Column]
    best: str | None = None
    sections: str | None = None

    def write(self, folder: Path) -> None:
        """Write the numbers as CSV, and what is shown as LaTeX."""
        write_table(folder / f"{self.name}.csv", self.data)
        write_atomically(folder / f"{self.name}.tex", self.latex().encode())

    def shown(self) -> list[Column]:
        """Return the columns that have any text."""
        return [c for c in self.columns if any(c.show(value) for value in self.data[c.key])]

    def _cells(self, bold: str, clean: Callable[[str], str]) -> list[list[str]]:
        """Return the text of every cell.

        Args:
            bold: What the best is put into, with ``{}`` in its place.
            clean: What is done to text before.
        """
        lines, shown = [], self.shown()
        for _, row in self.data.iterrows():
            cells = [clean(column.show(row[column.key])) for column in shown]
            if self.best and row[self.best] == self.data[self.best].min():
                k = [column.key for column in shown].index(self.best)
                cells[k] = bold.replace("{}", cells[k])
            lines.append(cells)
        return lines

    def _headline(self, i: int) -> str | None:
        """Return the headline before a line, if a part begins there."""
        if self.sections is None:
            return None
        names = self.data[self.sections].tolist()
        return str(names[i]) if i == 0 or names[i] != names[i - 1] else None

    def markdown(self) -> str:
        """Return the table as Markdown."""
        titles = [f"{c.group}: {c.title}" if c.group else c.title for c in self.shown()]
        rules = ["---" if c.show is text else "--:" for c in self.shown()]
        lines = [titles, rules]
        for i, cells in enumerate(self._cells("**{}**", lambda words: words.replace("|", "\\|"))):
            if (headline := self._headline(i)) is not None:
                lines.append([f"*{headline}*", *("" for _ in cells[1:])])
            lines.append(cells)
        return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)

    def latex(self) -> str:
        """Return the table as LaTeX, with booktabs."""
        kinds = "".join("l" if c.show is text else "r" for c in self.shown())
        lines = [f"\\begin{{tabular}}{{@{{}}{kinds}@{{}}}}", "\\toprule", *self._groups()]
        lines += [_line([latex(c.title) for c in self.shown()]), "\\midrule"]
        for i, cells in enumerate(self._cells("\\textbf{{}}", latex)):
            if (headline := self._headline(i)) is not None:
                lines += ["\\addlinespace"] if i else []
                words = f"\\emph{{{latex(headline)}}}"
                lines.append(f"\\multicolumn{{{len(kinds)}}}{{@{{}}l}}{{{words}}} \\\\")
            lines.append(_line(cells))
        return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])

    def _groups(self) -> list[str]:
        """Return the lines of the titles above the titles."""
        groups = [column.group for column in self.shown()]
        if not any(groups):
            return []
        cells, rules, start = [], [], 0
        for k in range(1, len(groups) + 1):
            if k < len(groups) and groups[k] == groups[start]:
                continue
            cells.append(f"\\multicolumn{{{k - start}}}{{c}}{{{latex(groups[start])}}}")
            if groups[start]:
                rules.append(f"\\cmidrule(lr){{{start + 1}-{k}}}")
            start = k
        return [_line(cells), " ".join(rules)]


def _line(cells: Sequence[str]) -> str:
    return f"{' & '.join(cells)} \\\\"
