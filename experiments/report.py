"""Tables, figures and numbers of the report from the store; its page; and with --pdf the report.

``python experiments/report.py`` makes ``paper/report/generated`` and ``paper/rows.md`` anew, from
``paper/results`` and the published figures. Nothing is trained.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.ablations import ABLATIONS
from experiments.command import ExitCode, files_told, main_of
from experiments.folder import write_atomically
from experiments.objects import UserError, near_misses
from experiments.presets import ROWS
from experiments.reporting import followed
from experiments.reporting.macros import as_macros, numbers, used
from experiments.reporting.pictures import (
    Panel,
    draw_page,
    draw_panel,
    panel,
    row_panel,
    shown_names,
)
from experiments.reporting.quotes import QUOTES
from experiments.reporting.tables import (
    ABLATION,
    FIRST_ORDER,
    ROW,
    SUMMARY,
    ablation_tables,
    cost_table,
    made_with,
    other_tables,
    row_table,
    short_trainings,
    summary_table,
    time_budgets,
    title_of,
    what_made,
    with_published_at_equal,
)
from experiments.reporting.typeset import Table, latex
from experiments.store import STORE, Store
from experiments.training import FINISHED

PAPER = STORE.parent
SOURCE = PAPER / "report/report.tex"
GENERATED = "report/generated"

PACKAGES = "texlive-latex-recommended texlive-fonts-recommended latexmk"

_FAIR = (
    "Ours: fixed settings, the median over the seeds with the smallest and the largest; published: "
    "one seed, the best of a sweep of about 50 to 100 runs."
)
_EQUAL = (
    "At equal steps: the largest number of steps that every seed of ours and the published run "
    "took, and both errors there."
)
_FOLLOWED = """The last step up to which loss and error agree with the published run to two percent,
of how many were compared, from the same network on the same points (`tox run -e reproduce`). KFAC*
here withholds its first update and takes all later ones, as its published runs did. In {left} runs
they differ in the end; there the ratio of our error to the published one, at the last step, is
{left_ratio} in the median, and at most one in {left_met}.
"""
_COSTS = {
    "ms_per_step": "Milliseconds per step on the other rows",
    "memory_mb": "Peak memory in MB on the other rows",
}
_SHORT = "Trainings of a few seconds, a step at least; they say nothing about errors."
_PAGE = f"""# The experiments of the paper, ours beside the published ones

Made by `tox run -e report` from `paper/results`, and as CSV, with hardware and source, in
`{GENERATED}`. RMSE is the root mean square error of u on fresh points, not divided by that of u;
the relative error is. Seconds are those of the optimizer's steps alone, and do not transfer between
machines; steps do. MB is the peak memory of the whole process.

- {_FAIR}
- {_EQUAL}

"""


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if everything was made, or all but a PDF without TeX; 1 if LaTeX failed; 2
        if the request was wrong.
    """
    parser = argparse.ArgumentParser(
        prog="report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", metavar="F", type=Path, default=STORE, help="the results")
    parser.add_argument(
        "--output", metavar="F", type=Path, default=PAPER, help="where all goes: paper"
    )
    parser.add_argument(
        "--main", metavar="ROW", default="poisson2d_9873", help="the row of README's figure"
    )
    parser.add_argument("--pdf", action="store_true", help="build the report, too")
    options = parser.parse_args(arguments)
    if options.main not in ROWS:
        raise UserError(
            f"--main must be one of {', '.join(ROWS)}, got {options.main!r}."
            f"{near_misses(options.main, ROWS)}"
        )
    store, others = Store.read(options.store).current()
    if others:
        print(f"left out, their settings have changed: {', '.join(others)}", file=sys.stderr)
    if store.trainings.empty:
        raise UserError(
            f"{options.store} has no results of today's presets. Train first: python "
            "experiments/paper.py --help"
        )
    runs = followed.read(options.store)
    with files_told():
        make(store, runs, options.store, options.output, options.main)
        return _pdf(options.output) if options.pdf else ExitCode.SUCCESS


def make(store: Store, runs: pd.DataFrame, folder: Path, output: Path, main_row: str) -> None:
    """Make tables, figures, numbers and the page.

    Args:
        store: The results.
        runs: The published runs that were followed.
        folder: Where they are kept.
        output: Where what is made goes.
        main_row: The row of README's figure.
    """
    generated = output / GENERATED
    generated.mkdir(parents=True, exist_ok=True)
    (output / "figures").mkdir(exist_ok=True)
    trained = [row for row in ROWS if time_budgets(store, row)]
    tables = [row_table(store, row, time_budgets(store, row)[0]) for row in trained]
    every = with_published_at_equal([*tables, *other_tables(store)], folder)
    tables, others = every[: len(tables)], every[len(tables) :]
    ablations = list(ablation_tables(store))
    text = _PAGE + _rows(store, tables, others, generated)
    found = {}
    if len(runs):
        lines = followed.summary(runs)
        found = followed.tallies(lines)
        text += _followed(lines, found, what_made(runs), generated)
    text += _ablations(store, ablations, generated)
    for quote in QUOTES:
        _write(generated / f"{quote.name}.tex", quote.table().latex())
    keys = used(SOURCE)
    found |= numbers(store, tables, others, ablations)
    _write(generated / "numbers.tex", as_macros({k: v for k, v in found.items() if k in keys}))
    for table in tables:
        if table["row"].iloc[0] == main_row:
            wanted = ("kfac_star", "auto", *FIRST_ORDER)
            names = {label: name for label, name in shown_names(table).items() if label in wanted}
            title = f"{title_of(main_row)} parameters; published: on an RTX 6000"
            shown = row_panel(title, store, table, names)
            draw_panel(output / "figures/main.png", shown)
    _write(output / "rows.md", text)
    print(f"page: {output / 'rows.md'}, {len(tables)} rows, {len(ablations)} ablations")
    print(f"tables, figures, numbers: {generated}")
    if missing := sorted(keys - set(found)):
        print(f"{SOURCE.name} names what the store does not have yet: {', '.join(missing)}")


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _rows(
    store: Store, tables: Sequence[pd.DataFrame], others: Sequence[pd.DataFrame], generated: Path
) -> str:
    """Write the tables and figures of the rows, and return their part of the page."""
    parts, floats, panels = [], [], []
    if tables:
        summary = Table("summary", "Best results of every row", summary_table(tables), SUMMARY)
        summary.write(generated)
        parts.append(f"## {summary.title}\n\n{summary.markdown()}")
    for data in tables:
        row, budget = data["row"].iloc[0], data["budget"].iloc[0]
        title, made = f"{title_of(row)} parameters, {budget}", made_with(store, row, budget)
        table = Table(f"row_{row}", title, data, ROW, best="rmse")
        table.write(generated)
        panels.append(row_panel(title_of(row), store, data, shown_names(data, kinds=True)))
        shown = row_panel(title, store, data, shown_names(data))
        draw_panel(generated / f"{table.name}.png", shown)
        picture = f"![Error against time and steps]({GENERATED}/{table.name}.png)"
        made_by = f"Ours: {made}. Published: {_sources(data)}."
        parts.append(f"## {title}\n\n{table.markdown()}\n{_ended(data)}{made_by}\n\n{picture}\n")
        floats.append(_table(table, f"{title}: {made}."))
    if others:
        data = pd.concat(others, ignore_index=True)
        data["title"] = data["row"].map(title_of) + ", " + data["budget"]
        table = Table("others", "Numbers of steps, and other times", data, ROW, sections="title")
        table.write(generated)
        parts.append(f"## {table.title}\n\n{table.markdown()}\n{_ended(data)}")
        floats.append(_table(table, f"Trained for numbers of steps, and for other times. {_FAIR}"))
    short = short_trainings(store)
    for key, title in _COSTS.items() if len(short) else ():
        table = Table(key, title, *cost_table(short, key))
        table.write(generated)
        parts.append(f"## {title}\n\n{_SHORT}\n\n{table.markdown()}\n{what_made(short)}.\n")
        floats.append(_table(table, f"{title}: {what_made(short)}. {_SHORT}"))
    if panels:
        draw_page(generated / "rows_time.png", panels, one_legend=True)
    missing = [row for row in ROWS if row not in {t["row"].iloc[0] for t in tables}]
    if missing:
        parts.append(f"Not trained for equal time yet: {', '.join(missing)}.\n")
    _write(generated / "rows.tex", "\n".join(floats) + "\n")
    return "\n".join(parts) + "\n"


def _followed(lines: pd.DataFrame, tallies: Mapping[str, str], made: str, generated: Path) -> str:
    """Write the table of published runs that were followed, and return its part of the page."""
    table = followed.table(lines)
    table.write(generated)
    tallied = {key.partition("-")[2].replace("-", "_"): n for key, n in tallies.items()}
    words = _FOLLOWED.format(**tallied)
    return f"## {table.title}\n\n{words}\n{table.markdown()}\n{made}.\n\n"


def _ablations(store: Store, ablations: Sequence[pd.DataFrame], generated: Path) -> str:
    """Write the tables and figures of the ablations, and return their part of the page."""
    parts, panels = ["## Ablations\n"], list[Panel]()
    for data in ablations:
        first = data.iloc[0]
        names = dict(zip(data["optimizer"], data["variant"], strict=True))
        shown = panel(first["question"], store, first["study"], first["budget"], names)
        panels.append(dataclasses.replace(shown, title=str(first["ablation"])))
        name = f"ablation_{first['ablation']}"
        draw_panel(generated / f"{name}.png", shown)
        table = Table(name, str(first["question"]), data, ABLATION)
        changes = "".join(
            f"- *{line.variant}*: `{line.changes}`\n" for line in data.itertuples() if line.changes
        )
        picture = f"![Error against time and steps]({GENERATED}/{name}.png)"
        made = made_with(store, first["study"], first["budget"])
        apart = ABLATIONS[str(first["ablation"])].problem
        where = "".join(f" Here `{name}={value}`." for name, value in apart.items())
        text = f"{first['budget']}; {made}.{where}\n\n{changes}{_ended(data)}\n{picture}\n"
        parts.append(f"### {table.title}\n\n{table.markdown()}\n{text}")
    if not ablations:
        return ""
    every = pd.concat(ablations, ignore_index=True)
    Table("ablation", "Ablations", every, ABLATION, sections="question").write(generated)
    draw_page(generated / "ablations_time.png", panels)
    return "\n".join(parts)


def _table(table: Table, caption: str) -> str:
    return f"\\generatedtable{{{table.name}}}{{{latex(caption)}}}"


def _sources(data: pd.DataFrame) -> str:
    """Return where published figures are from, and on what they were measured."""
    groups = data.dropna(subset="source").groupby(["source", "hardware"], sort=False)["name"]
    return "; ".join(f"{', '.join(names)}: {' on '.join(where)}" for where, names in groups)


def _ended(data: pd.DataFrame) -> str:
    """Return a list of the trainings that did not end by their budget."""
    name = "name" if "name" in data else "variant"
    lines = data.loc[data["outcome"] != FINISHED, [name, "outcome"]].to_numpy()
    return "".join(f"- {who}: {what}\n" for who, what in lines) + ("\n" if len(lines) else "")


def _pdf(output: Path) -> ExitCode:
    """Build the report where TeX Live is, or say what to install."""
    if missing := [name for name in ("pdflatex", "latexmk") if shutil.which(name) is None]:
        print(f"no PDF: {' and '.join(missing)} not found. Install TeX Live, on Debian or Ubuntu:")
        print(f"    apt-get install --no-install-recommends {PACKAGES}")
        return ExitCode.SUCCESS
    folders = [output / GENERATED, output / "figures"]
    inputs = os.pathsep.join([*(str(folder.resolve()) for folder in folders), ""])
    with tempfile.TemporaryDirectory() as build:
        command = ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error"]
        done = subprocess.run(
            [*command, str(SOURCE)],
            cwd=build,  # where all goes that LaTeX leaves behind
            env={**os.environ, "TEXINPUTS": inputs},
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode:
            wrong = [line for line in done.stdout.splitlines() if line.startswith("!")]
            print(f"no PDF: LaTeX failed: {' '.join(wrong) or done.stdout[-2000:]}")
            return ExitCode.FAILURE
        target = output / "report/report.pdf"
        write_atomically(target, (Path(build) / "report.pdf").read_bytes())
    print(f"report: {target}")
    return ExitCode.SUCCESS


if __name__ == "__main__":
    main_of(main)
