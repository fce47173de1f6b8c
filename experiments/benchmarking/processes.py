"""Processes that measure one figure each, in turns.

A process prints a line about itself, then one line of results for each line that it is sent.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import pinncurv
from experiments.benchmarking import floors
from experiments.benchmarking.clock import peak_megabytes, reset_peak, seconds
from experiments.benchmarking.counting import count
from experiments.benchmarking.figures import FIGURES, build
from experiments.benchmarking.sizes import SIZES

HERE = Path(__file__).resolve().parents[2]
Turn = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Args:
        kind: What a turn is, a key of ``TURNS``.
        figure: The figure, or the row of a table.
        size: The size.
        compiled: Whether the objective is compiled.
        device: Where.
        threads: Threads of the CPU.
    """

    kind: str
    figure: str
    size: str
    compiled: bool = False
    device: str = "cpu"
    threads: int = 2


class Worker:
    """A process that does one job with the package of one checkout.

    Raises:
        ChildProcessError: If it ends; has the last that it said.
        RuntimeError: If its package is another one.
    """

    def __init__(self, job: Job, root: Path = HERE) -> None:
        paths = os.pathsep.join(map(str, (root / "src", HERE)))
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=HERE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.about = self._read()
        package = Path(self.about["package"])
        if not package.is_relative_to(root / "src"):
            self.end()
            raise RuntimeError(f"The package must be that of {root}, got {package}.")

    def turn(self) -> dict[str, Any]:
        """Return the results of one turn."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # of a process that has ended, which is read next
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """End the process, if it has not ended yet."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()
        self.process.wait()  # not for those that it may have started to compile
        self._errors.close()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return dict(json.loads(line))
        status = self.process.wait()
        self._errors.seek(0)
        errors = self._errors.read().strip()
        self.end()
        raise ChildProcessError(errors or f"exit status {status}")


def last_line(error: ChildProcessError) -> str:
    """Return what a process said last, without the kind of its error."""
    line = str(error).splitlines()[-1]
    return re.sub(r"^\w+(Error|Exit): ", "", line)


def _time(job: Job) -> Turn:
    """Return what measures a turn's median seconds and the peak of a step's memory."""
    evaluate = build(job.figure, job.size, job.compiled, job.device)
    for _ in range(3):
        seconds(evaluate, job.device)
    iterations = SIZES[job.size].iterations
    reset_peak(job.device)

    def turn() -> dict[str, Any]:
        time.sleep(0.01)  # threads of whoever had the last turn wait busily for a while
        times = [seconds(evaluate, job.device) for _ in range(iterations)]
        return {"seconds": statistics.median(times), "megabytes": peak_megabytes(job.device)}

    return turn


def _machine(job: Job) -> Turn:
    """Return what measures the rates that floors are made of."""
    size = SIZES[job.size]
    shape = floors.product_shape(size, job.size in FIGURES["spring"])
    figures = [figure for figure, sizes in FIGURES.items() if job.size in sizes]
    works = [floors.needed(figure, size) for figure in figures]
    sizes = sorted({n for work in works if work is not None for n in work.eigen})

    def turn() -> dict[str, Any]:
        time.sleep(0.01)
        rate = floors.measure_product(shape, job.device)
        return {"rate": rate, "eigen": {n: floors.measure_eigen(n, job.device) for n in sizes}}

    return turn


def _count(job: Job) -> Turn:
    """Return what counts a step."""
    evaluate = build(job.figure, job.size, job.compiled, job.device)
    for _ in range(3):
        evaluate()
    return lambda: count(evaluate, job.device, job.compiled)


def _operator(job: Job) -> Turn:
    """Return what measures an operator and its inverse."""
    # names of operators are not in every commit that this file is run against
    from experiments.benchmarking.operators import measure  # noqa: PLC0415 - see above

    return lambda: measure(job.figure, job.size, job.device)


TURNS: dict[str, Callable[[Job], Turn]] = {
    "time": _time,
    "machine": _machine,
    "count": _count,
    "operator": _operator,
}


def check_compiled(caught: Sequence[warnings.WarningMessage]) -> None:
    """Check that what was to be compiled is.

    Raises:
        RuntimeError: If a warning says that it runs as it is written.
    """
    # compiled steps are not in every commit that this file is run against
    from pinncurv.machine import NotCompiled  # noqa: PLC0415 - see above

    for warning in caught:
        if issubclass(warning.category, NotCompiled):
            raise RuntimeError(str(warning.message))


def main(argument: str) -> None:
    """Do a job: one turn per line of standard input."""
    job = Job(**json.loads(argument))
    torch.set_num_threads(job.threads)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True, action="default") as caught:
        turn = TURNS[job.kind](job)
        if job.compiled:
            check_compiled(caught)
        about = {
            "package": pinncurv.__file__,
            "ready": time.perf_counter() - start,
            "warnings": sorted({str(w.message).splitlines()[0] for w in caught}),
        }
        print(json.dumps(about), flush=True)
        for _ in sys.stdin:
            print(json.dumps(turn()), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
