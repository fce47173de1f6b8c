"""Time and memory of a step, against the usual way to differentiate a PINN loss and a floor.

The baseline is one evaluation of loss and parameter gradient by nested ``torch.autograd.grad`` (a
loop over coordinates with ``create_graph=True``), the way most PINN code does it. At k1200 and
k3500, where kernels are measured, it is to form J densely and to multiply, J Jᵀ; that of extra is
the KFAC* step of m, which it does with 1 % more parameters, outside of linear layers. Sizes s to h
are second-order problems; kdv, biharmonic and laplace100 are there for derivatives of orders three
and four, and for many coordinates.

``gradient`` is loss and gradient by one linearization, eager and compiled the same call, the other
figures are steps of the presets; ``kfac_star_chunked`` in chunks of 500 points.

Every figure has a process of its own, and one more for compiled steps. The processes of one size
take turns of a fraction of a second, and ratios are medians of ratios within a turn, so that a busy
machine slows both sides. Each round has new ones. The floor is what the figure needs by counting,
at the rates that the machine shows in the same turns (``benchmarking/floors.py``), the share what
part of the time that is. Memory is the peak of the process after three steps, on a GPU of what is
allocated.

``--count`` counts torch calls, reads of values and, on a GPU, kernel launches of one step instead;
``--costs`` measures operators and their inverses, as Markdown tables. With ``--against PATH`` the
package of another checkout takes turns with this one, where it can. The baseline does not use the
package but at k1200 and k3500: its new / old is how far to trust the others.

Run it with ``tox run -e benchmark``, or ``python experiments/benchmark.py --sizes s m``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from experiments.benchmarking.figures import FIGURES
from experiments.benchmarking.floors import forward, needed
from experiments.benchmarking.operators import METHODS
from experiments.benchmarking.processes import Job, Worker, last_line
from experiments.benchmarking.sizes import DTYPE, SIZES
from experiments.benchmarking.turns import Row, Setting, measure_size
from experiments.command import ExitCode, main_of
from experiments.folder import describe_environment, write_json
from experiments.objects import UserError

MODES = {"eager": False, "compiled": True}
Results = list[dict[str, Any]]


def main(arguments: Sequence[str]) -> ExitCode:
    """Parse the command line, measure, print, and write."""
    options = _parse(arguments)
    print(f"torch {torch.__version__}, {options.device}, {options.threads} threads, {DTYPE}")
    program = _costs if options.costs else _counts if options.count else _times
    results: Results = []
    _write(options, results)  # before an hour has passed, to see whether it can be written
    for size in options.sizes:
        results += program(size, options)
        _write(options, results)
    return ExitCode.SUCCESS


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    shown = [name for name in SIZES if name != "tiny"]  # which is for a first look, and tests
    parser.add_argument("--sizes", nargs="+", choices=SIZES, metavar="S", help=", ".join(SIZES))
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=3, help="how often processes start anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write results there, as JSON")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--against", type=Path, help="another checkout, to take turns with")
    mode.add_argument("--count", action="store_true", help="count calls, reads and launches")
    mode.add_argument("--costs", action="store_true", help="operators and their inverses")
    options = parser.parse_args(arguments)
    if options.sizes is None:
        options.sizes = ["s", "m", "b"] if options.costs else shown
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: If there is something.
    """
    for name in ("rounds", "threads"):
        if (value := getattr(options, name)) < 1:
            raise UserError(f"--{name} must be at least 1, got {value}.")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device must be cpu where there is no GPU, got {options.device}.")
    if options.against is not None:
        options.against = options.against.resolve()
        if not (options.against / "src" / "pinncurv").is_dir():
            raise UserError(
                f"--against must be a checkout with src/pinncurv, got {options.against}. Make one "
                "with git worktree add PATH COMMIT."
            )
    if options.costs:
        known = {size for method in METHODS.values() for size in method.sizes}
        if unknown := [size for size in options.sizes if size not in known]:
            raise UserError(f"--costs needs sizes of {sorted(known)}, got {unknown}.")
    elif not any(_figures(size, options) for size in options.sizes):
        raise UserError(
            f"--figures must name one that is measured at --sizes, got {options.figures} and "
            f"{options.sizes}."
        )


def _figures(size: str, options: argparse.Namespace) -> list[str]:
    """Return the figures to measure at a size."""
    return [figure for figure in options.figures if size in FIGURES[figure]]


def _write(options: argparse.Namespace, results: Results) -> None:
    """Write what has been measured so far, if it is to be written.

    Raises:
        UserError: If it cannot be.
    """
    if options.output is None:
        return
    environment = describe_environment(torch.device(options.device))
    environment["threads"] = options.threads
    try:
        write_json(options.output, {"environment": environment, "results": results})
    except OSError as error:
        raise UserError(f"--output: cannot write {options.output} ({error.strerror}).") from error


# --- time and memory ------------------------------------------------------------------------------

_NAMES = f"{'size':10} {'figure':17}"
_COLUMNS = f"{'ms':>9} {'ratio':>6} {'MB':>6} {'share':>6}"


def _times(size: str, options: argparse.Namespace) -> Results:
    """Measure the figures of a size, and print a line for each."""
    figures = [figure for figure in _figures(size, options) if figure != "baseline"]
    setting = Setting(options.rounds, options.threads, options.device, options.against)
    rows = measure_size(size, [(f, MODES[m]) for m in options.modes for f in figures], setting)
    print(f"\n{_NAMES} {'floor ms':>9} | eager {_COLUMNS[6:]} | compiled {_COLUMNS[9:]}")
    for figure in dict.fromkeys(row.figure for row in rows):
        of_modes = {row.mode: row for row in rows if row.figure == figure}
        floor = next((f"{row.floor:.2f}" for row in of_modes.values() if row.floor), "")
        cells = " | ".join(_cell(of_modes.get(mode)) for mode in MODES)
        print(f"{size:10} {figure:17} {floor:>9} | {cells}")
        for mode, row in of_modes.items():
            for note in _notes(row):
                print(f"{'':10} {mode}: {note}")
    sys.stdout.flush()
    return [asdict(row) for row in rows]


def _cell(row: Row | None) -> str:
    """Return time, ratio, memory and share."""
    if row is None:
        return f"{'':30}"
    if row.missing is not None:
        return f"{'not available':>30}"
    share = "" if row.share is None else f"{row.share:.0%}"
    return f"{row.milliseconds:9.2f} {row.ratio:6.2f} {row.megabytes:6.0f} {share:>6}"


def _notes(row: Row) -> Iterator[str]:
    """Yield what is to be said of a row besides its numbers."""
    if row.missing is not None:
        yield row.missing
    if row.missing_old is not None:
        yield f"not in old: {row.missing_old}"
    if row.old_milliseconds is not None:
        yield f"old {row.old_milliseconds:.2f} ms, {row.old_megabytes:.0f} MB"
    yield from row.verdicts


# --- counts ---------------------------------------------------------------------------------------


def _counts(size: str, options: argparse.Namespace) -> Results:
    """Count what a step of each figure makes, and print a line for each, and what it needs."""
    F, results = forward(SIZES[size]), []
    print(f"\nsize {size}: one forward pass F = {F:.3g} flops of matrix products")
    print(
        f"{'figure':17} {'':8} {'calls':>6} {'products':>8} {'launches':>8} {'syncs':>6} "
        f"{'reads':>6} {'made F':>7} {'needed':>7}"
    )
    for figure in _figures(size, options):
        work = needed(figure, SIZES[size])
        for mode in options.modes if figure != "baseline" else ("eager",):
            result: dict[str, Any] = {"size": size, "figure": figure, "mode": mode}
            job = Job("count", figure, size, MODES[mode], options.device, options.threads)
            counts = _one_turn(job)
            print(f"{figure:17} {mode:8} {_counted(counts, F)} ", end="")
            print("" if work is None else f"{work.total / F:7.2f}", flush=True)
            results.append({**result, **counts, "forward": F, "needed": work and work.flops})
        if work is not None:
            parts = ", ".join(f"{part} {flops / F:.2f}" for part, flops in work.flops.items())
            print(f"{'':17} needs {parts}")
    return results


def _counted(counts: dict[str, Any], F: float) -> str:
    if "missing" in counts:
        return f"{'not available':>46}"
    made = f"{counts['flops'] / F:.2f}" if "flops" in counts else ""
    return (
        f"{counts['calls']:6} {counts['products']:8} {counts['launches']:8} "
        f"{counts['synchronizations']:6} {counts['reads']:6} {made:>7}"
    )


def _one_turn(job: Job) -> dict[str, Any]:
    """Return the results of one turn, or why there are none of a compiled step."""
    try:
        worker = Worker(job)
    except ChildProcessError as error:
        if not job.compiled:
            raise
        return {"missing": last_line(error)}
    try:
        return worker.turn()
    finally:
        worker.end()


# --- operators ------------------------------------------------------------------------------------


def _costs(size: str, options: argparse.Namespace) -> Results:
    """Measure operators and their inverses, and print a Markdown table."""
    chosen, results = SIZES[size], []
    widths = "-".join(map(str, chosen.widths))
    print(f"\n| {widths}: D = {chosen.parameters:,} | build ms | solve ms | MB |")
    print("|:--|--:|--:|--:|", flush=True)
    for name in (name for name, method in METHODS.items() if size in method.sizes):
        row = _one_turn(Job("operator", name, size, False, options.device, options.threads))
        build, solve = row["build"] * 1e3, row["solve"] * 1e3
        print(f"| {name} | {build:.2f} | {solve:.2f} | {row['megabytes']:.0f} |", flush=True)
        results.append({"size": size, "method": name, **row})
    return results


if __name__ == "__main__":
    main_of(main)
