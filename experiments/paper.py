"""The experiments of the paper, and ours: trains what is asked for, and keeps the results.

``python experiments/paper.py poisson2d_257 --seconds 60`` trains every optimizer of a row, each in
a run folder and process of its own; ``rows`` stands for all of them. The same command again
goes on where it was. What was trained is added to the store, ``paper/results``; ``--collect`` adds
what run folders hold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.command import ExitCode, Interruption, check_positive, files_told, main_of
from experiments.folder import CONFIG, read_json, write_json
from experiments.objects import UserError, is_own, near_misses, short
from experiments.presets import PRESETS, ROWS
from experiments.reporting.published import ENDS, ends
from experiments.results import run_folders
from experiments.store import RESOURCES, STORE, Store, collect, origin, outcomes
from experiments.training import INTERRUPTED

# Beyond any budget: what ends a training that is asked for in steps.
_FOREVER = 1e6
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One optimizer of one study, in a process of its own.

    Args:
        study: The name of a preset.
        label: The label of one of its optimizers.
        folder: Where the run folders of all studies are.
        seeds: Its seeds.
        seconds: Its budget in seconds.
        steps: Its budget in steps instead, if it has one.
        compiled: Whether it is begun with compiled passes, for a long one.
    """

    study: str
    label: str
    folder: Path
    seeds: tuple[int, ...]
    seconds: float
    steps: int | None
    compiled: bool = False

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder / self.study / self.label

    @property
    def _begun(self) -> bool:
        return (self.path / CONFIG).is_file()

    def command(self) -> list[str]:
        """Return the command of the training, or of what is left of it."""
        target = PRESETS[self.study].labels[self.label]
        name = target if short(target) == self.label else f"{self.label}={target}"
        start = ["--resume", str(self.path), *(["--optimizers", name] if is_own(target) else [])]
        new = ["--preset", self.study, "--optimizers", name, "--run-folder", str(self.path)]
        new += ["--compile"] if self.compiled else []
        budget = ["--seconds", f"{_FOREVER if self.steps else self.seconds:.12g}"]
        budget += ["--steps", str(self.steps)] if self.steps else []
        seeds = ["--seeds", *map(str, self.seeds)]
        train = os.path.relpath(Path(__file__).with_name("train.py"))
        return [train, *(start if self._begun else new), *budget, *seeds, "--threads", "1"]

    def check(self) -> None:
        """Check that what there is can become what is asked for.

        Raises:
            UserError: If it was made with other settings, or with a larger or another budget.
        """
        if not self._begun:
            return
        was = origin(self.path)
        kind, has = ("steps", was.steps) if was.steps else ("seconds", was.seconds)
        wanted = getattr(self, kind)
        if bool(was.steps) != bool(self.steps) or (has or 0) > wanted:
            raise UserError(
                f"{self.path} was trained for {has:g} {kind}. Ask for more {kind}, or choose other "
                "--runs."
            )

    def is_done(self) -> bool:
        """Whether nothing is left to train, so that what it was made with stays as it was."""
        if not self._begun:
            return False
        was = origin(self.path)
        seconds = _FOREVER if self.steps else self.seconds
        if (was.steps, was.seconds) != (self.steps, seconds) or set(self.seeds) - set(was.seeds):
            return False
        ended = outcomes(self.path)
        return all(ended.get(seed, INTERRUPTED) != INTERRUPTED for seed in self.seeds)

    def run(self, interruption: Interruption) -> int:
        """Train, and note what the process needed; an interruption is passed on to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".log").open("a") as log:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [sys.executable, *self.command()],
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,  # so that Ctrl-C comes once, from here
            )
            asked = False
            while (ended := _ended(process)) is None:
                if interruption.requested and not asked:
                    process.terminate()
                    asked = True
                time.sleep(_POLL_SECONDS)
        process.returncode, peak = ended
        if self._begun and peak is not None:
            # a process that only ends what another one began needs less
            before = (read_json(self.path / RESOURCES) or {}).get("peak_memory_mb", 0.0)
            content = {"peak_memory_mb": round(max(before, peak), 1)}
            write_json(self.path / RESOURCES, content)
        # one that had not learned to stop yet when it was asked to was interrupted all the same
        return ExitCode.INTERRUPTED if asked and process.returncode < 0 else process.returncode


def _ended(process: subprocess.Popen[bytes]) -> tuple[int, float | None] | None:
    """Return code and peak memory in MB of a process that ended; None while it runs."""
    if not hasattr(os, "wait4"):  # Windows, where the memory of others is not known
        return None if process.poll() is None else (process.returncode, None)
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return (os.waitstatus_to_exitcode(status), usage.ru_maxrss / unit) if pid else None


def published_steps(study: str, label: str) -> int | None:
    """Return how many steps the paper's run of an optimizer took, if it has one."""
    steps = ends(study)["steps"].dropna()
    return int(steps[label]) if label in steps else None


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Yield what is asked for, study by study.

    Raises:
        UserError: If there is no such study, optimizer or seed, or what there is stands against it.
    """
    words = [n for word in options.studies for n in (ROWS if word == "rows" else (word,))]
    studies = list(dict.fromkeys(words))
    known = {label for n in studies if n in PRESETS for label in PRESETS[n].labels}
    unknown = set(options.optimizers or ()) - known
    for study in studies:
        if study not in PRESETS:
            raise UserError(
                f"There is no study {study!r}.{near_misses(study, PRESETS)} It must be rows, or "
                f"one of {', '.join(PRESETS)}."
            )
        budget = {"seconds": options.seconds, "steps": options.steps}
        asked = replace(PRESETS[study], seeds=tuple(options.seeds), **budget).checked()
        labels = list(asked.labels)
        chosen = [label for label in labels if label in (options.optimizers or labels)]
        if unknown or not chosen:
            raise UserError(
                f"--optimizers must be some of {', '.join(labels)} for {study}, got "
                f"{', '.join(sorted(unknown) or options.optimizers)}."
            )
        for label in chosen:
            steps = published_steps(study, label) if options.published_steps else options.steps
            if options.published_steps and steps is None:
                raise UserError(f"--published-steps: {ENDS.name} has none of {label} for {study}.")
            seeds, compiled = tuple(options.seeds), options.published_steps
            job = Job(study, label, options.runs, seeds, options.seconds, steps, compiled)
            job.check()
            yield job


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Args:
        arguments: The command line, without the program's name.

    Returns:
        The exit code: 0 if every training finished, 1 if one failed, 2 if the request was wrong,
        130 if interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="paper.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "studies", nargs="*", help="presets, or rows for all experiments of the paper"
    )
    parser.add_argument("--optimizers", metavar="O", nargs="+", help="only these; all by default")
    parser.add_argument(
        "--seconds", metavar="S", type=float, default=60.0, help="budget of each training"
    )
    parser.add_argument("--steps", metavar="K", type=int, help="the same in steps instead")
    parser.add_argument(
        "--published-steps", action="store_true", help="as many as the paper's own run, compiled"
    )
    parser.add_argument("--seeds", metavar="I", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", metavar="K", type=int, default=1, help="of one thread each")
    parser.add_argument(
        "--runs", metavar="F", type=Path, help="the run folders; runs/paper, or runs/paper_steps"
    )
    parser.add_argument(
        "--store", metavar="F", type=Path, default=STORE, help="the results that are kept"
    )
    parser.add_argument(
        "--collect", action="store_true", help="add what the run folders hold, without training"
    )
    options = parser.parse_args(arguments)
    if not options.studies and not options.collect:
        raise UserError("Name a study, or give --collect. See --help.")
    check_positive(options, "workers")
    if options.steps and options.published_steps:
        raise UserError("--steps and --published-steps are two numbers of steps; drop one.")
    by_steps = options.published_steps or options.steps
    options.runs = options.runs or Path("runs/paper_steps" if by_steps else "runs/paper")
    Store.read(options.store)  # what is no store is found out before anything is trained
    with files_told():
        code = ExitCode.SUCCESS if options.collect else _train(list(jobs(options)), options)
        added = collect(run_folders([options.runs]))
        added.add_to(options.store)
    print(f"store: {options.store}, {len(added.trainings)} trainings from {options.runs}")
    return code


def _train(work: Sequence[Job], options: argparse.Namespace) -> ExitCode:
    """Run the jobs, as many at a time as there are workers, and say how each ended."""
    codes = {0}
    with Interruption() as interruption, ThreadPoolExecutor(options.workers) as pool:

        def one(k: int) -> int:
            if interruption.requested:
                return ExitCode.INTERRUPTED
            job = work[k]
            if job.is_done():
                print(f"[{k + 1}/{len(work)}] {job.path}: done before", flush=True)
                return 0
            print(f"[{k + 1}/{len(work)}] {job.path}: started", flush=True)
            code = job.run(interruption)
            words = "done" if code == 0 else f"ended with {code}, see {job.path}.log"
            print(f"[{k + 1}/{len(work)}] {job.path}: {words}", flush=True)
            return code

        codes |= set(pool.map(one, range(len(work))))
    if ExitCode.INTERRUPTED in codes:
        return ExitCode.INTERRUPTED
    return ExitCode.SUCCESS if codes == {0} else ExitCode.FAILURE


if __name__ == "__main__":
    main_of(main)
