"""Search for good settings of one optimizer: ``python experiments/sweep.py --help``.

sweep.json                 the sweep, which --resume reads
sweep.db                   Optuna's study, unless --storage names another place
trial-NNNN/                the run folder of a trial; workerK.log says what a worker prints
sweep.csv, best.json       all trials, and the best one's experiment, for train.py --config
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import signal
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch

if __name__ == "__main__":  # `experiments` is not installed: the script sees the repository instead
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.command import (
    ExitCode,
    Interruption,
    Parser,
    again,
    check_positive,
    experiment_of,
    list_names,
    main_of,
    own_names,
    set_up_device,
)
from experiments.experiment import Experiment, from_json
from experiments.folder import BusyError, RunFolder, read_config, write_atomically, write_json
from experiments.objects import UserError, evaluate, first_line, near_misses, short
from experiments.spaces import SPACES, Space, parse, space_of
from experiments.training import (
    FINISHED,
    INTERRUPTED,
    PRUNED,
    Row,
    Trainer,
    Watch,
    last_row,
    restore,
    spent,
    train,
)

try:
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool  # workers rarely ask, and many share a server
except ImportError as missing:
    sys.exit(f"error: sweeps need Optuna ({missing}). Install it: pip install pinncurv[sweep].")

SWEEP, TABLE, BEST = "sweep.json", "sweep.csv", "best.json"
STORAGE = "PINNCURV_STORAGE"  # in the environment, stands for --storage, whose password ps shows

PARTS = 20  # of each seed's budget; after each, the error is reported and a trial may be pruned
DEATHS = 3  # of its workers, in one part, after which a trial counts as failed
POLL, BEAT, GRACE = 1.0, 30.0, 150.0  # seconds between looks, signs of life; without any: dead

_DESCRIPTION = (
    "Search for good settings of one optimizer with Optuna: each trial is a training with settings "
    "drawn from a space (spaces.py). The same command again goes on with what is missing."
)
_PRUNERS: dict[str, Callable[[int], optuna.pruners.BasePruner]] = {
    "median": lambda parts: optuna.pruners.MedianPruner(n_warmup_steps=PARTS // 10),
    "hyperband": lambda parts: optuna.pruners.HyperbandPruner(max_resource=parts),
    "none": lambda parts: optuna.pruners.NopPruner(),
}
_SAMPLERS: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}

End = tuple[TrialState, str, float | None]  # of a trial: how, why, with which error


@dataclass(frozen=True)
class Sweep:
    """All that defines a sweep.

    Args:
        experiment: What every trial trains, with one optimizer.
        space: What of its settings varies.
        trials: How many trials, by all workers together.
        objective: The column of the metrics to make small.
        sampler: A name of ``_SAMPLERS``.
        pruner: A name of ``_PRUNERS``.
        study: What Optuna calls it; workers of other folders join by this name.
        storage: Where Optuna keeps it: a URL, or a journal file; none for a file in the folder.
        files: Checksums of the user's own files.
    """

    experiment: Experiment
    space: Space
    trials: int = 30
    objective: str = "rmse"
    sampler: str = "tpe"
    pruner: str = "median"
    study: str = ""
    storage: str = ""
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def label(self) -> str:
        """The label of the optimizer."""
        return next(iter(self.experiment.labels))

    def of(self, drawn: Mapping[str, str]) -> Experiment:
        """Return the experiment of one trial."""
        settings = {**self.experiment.settings, **drawn}
        return dataclasses.replace(self.experiment, settings=settings).checked()

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it; a password is left out."""
        url = "://" in self.storage
        hidden = make_url(self.storage).render_as_string() if url else self.storage
        space = {key: str(found) for key, found in self.space.items()}
        tree = {**dataclasses.asdict(self), "space": space, "storage": hidden}
        return dict(json.loads(json.dumps(tree)))

    def agree(self, found: Mapping[str, Any], where: str) -> None:
        """Check that what is stored is the same sweep, but for what may change while it runs.

        Raises:
            UserError: If it is another; names the first difference.
        """
        was, now = ({**t, **t["experiment"], "experiment": 0} for t in (found, self.to_json()))
        for name in now:
            if name not in ("trials", "threads", "device") and was.get(name) != now[name]:
                raise UserError(
                    f"{where} is of another sweep: {name} was {was.get(name)} and now is "
                    f"{now[name]}. Give the settings it has, or another --run-folder and --study."
                )


class Study:
    """A sweep, its folder, and the study that all its workers share.

    A trial belongs to who holds the lock of its run folder; one that runs without is taken up
    again, and so is one of another machine's folder that gives no sign of life any more.

    Args:
        folder: The folder.
        sweep: The sweep.
    """

    def __init__(self, folder: Path, sweep: Sweep) -> None:
        self.folder, self.sweep = folder, sweep
        self.place = f"{platform.node()}:{folder.resolve()}"
        self.storage = optuna.storages.get_storage(_open(folder, sweep.storage))
        self.study = self._study(0)
        self.id = self.storage.get_study_id_from_name(sweep.study)
        self._signs: dict[int, tuple[float, Any]] = {}

    def _study(self, seed: int) -> optuna.Study:
        """Return Optuna's study with a sampler of its own, lest all workers draw the same."""
        return optuna.create_study(
            study_name=self.sweep.study,
            storage=self.storage,
            sampler=_SAMPLERS[self.sweep.sampler](seed),
            pruner=_PRUNERS[self.sweep.pruner](PARTS * len(self.sweep.experiment.seeds)),
            load_if_exists=True,
        )

    def trials(self) -> list[FrozenTrial]:
        """Return the trials of the sweep that there are."""
        trials = self.study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.number < self.sweep.trials]

    def finished(self) -> list[FrozenTrial]:
        """Return those that came to an end."""
        return [trial for trial in self.trials() if trial.state.is_finished()]

    def claim(self) -> tuple[optuna.Trial, RunFolder] | None:
        """Return a trial that nobody works at, and its folder; nothing if there is none."""
        for frozen in self.trials():
            if frozen.state.is_finished() or self._lives_elsewhere(frozen):
                continue
            path = self.folder / f"trial-{frozen.number:04d}"
            path.mkdir(exist_ok=True)
            try:
                folder = RunFolder(path)
            except BusyError:
                continue
            number = self.storage.get_trial_id_from_study_id_trial_number(self.id, frozen.number)
            with suppress(optuna.exceptions.UpdateFinishedTrialError):
                again = self.storage.get_trial(number).state == TrialState.RUNNING
                if again or self.storage.set_trial_state_values(number, TrialState.RUNNING):
                    self.storage.set_trial_user_attr(number, "place", self.place)
                    return optuna.Trial(self._study(frozen.number), number), folder
            folder.close()
        with _locked(self.folder):
            if more := len(self.study.get_trials(deepcopy=False)) < self.sweep.trials:
                self.study.enqueue_trial({})  # a place in the queue, drawn by who claims it
        return self.claim() if more else None

    def _last(self, trial: optuna.Trial) -> int:
        """Return the last part of a trial that was reported."""
        return next(t for t in self.trials() if t.number == trial.number).last_step or 0

    def _lives_elsewhere(self, frozen: FrozenTrial) -> bool:
        """Whether a worker of another folder, whose locks say nothing here, is at work."""
        if frozen.state == TrialState.WAITING or frozen.user_attrs.get("place") == self.place:
            return False
        now, sign = time.monotonic(), frozen.user_attrs.get("beat")
        since, before = self._signs.get(frozen.number, (now, sign))
        self._signs[frozen.number] = (since if before == sign else now, sign)
        return before != sign or now - since < GRACE

    def run(self, trial: optuna.Trial, folder: RunFolder, interruption: Interruption) -> None:
        """Train, and tell the study how it went; what is interrupted stays to be taken up again."""
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # by who took it for dead
            part, deaths = trial.user_attrs.get("deaths", (0, -1))
            reported = self._last(trial)
            deaths = deaths + 1 if part == reported else 0
            trial.set_user_attr("deaths", (reported, deaths))
            end: End | None = (TrialState.FAIL, f"its worker died {deaths} times in a row", None)
            if deaths < DEATHS:
                with self._signs_of_life(trial):
                    end = self._train(trial, folder, interruption)
            if end is None:
                trial.set_user_attr("deaths", (0, -1))
                return
            state, reason, value = end
            trial.set_user_attr("reason", reason)
            trial.study.tell(trial, value, state)

    def _train(
        self, trial: optuna.Trial, folder: RunFolder, interruption: Interruption
    ) -> End | None:
        """Train from all seeds; return how that ended, why, and the median error, if it ended."""
        drawn = {key: found.suggest(trial, key) for key, found in self.sweep.space.items()}
        experiment, label = self.sweep.of(drawn), self.sweep.label
        device = set_up_device(experiment)
        folder.begin(experiment, device)
        errors: list[float] = []
        for k, seed in enumerate(experiment.seeds):
            place = folder.part(label, f"seed{seed}")
            try:
                trainer = Trainer(experiment, label, seed, device)
                restore(place, trainer)
                report = self._reporter(trial, trainer, k * PARTS)
                outcome = train(
                    trainer, place, Watch(interruption, folder.path.name, report, raises=True)
                )
            except (optuna.exceptions.OptunaError, SQLAlchemyError, OSError):
                raise
            except (Exception, SystemExit) as error:  # of the user's own code it may be any
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                return TrialState.FAIL, kind + first_line(error), None
            if outcome == INTERRUPTED:
                return None
            if outcome.startswith("cannot write"):
                raise OSError(outcome)
            errors.append(last_row(place).get(self.sweep.objective, math.nan))
            if outcome == FINISHED and not math.isfinite(errors[-1]):
                outcome = f"{self.sweep.objective} is {errors[-1]}"
            if outcome != FINISHED:
                reason = outcome.replace(PRUNED, f"pruned ({self.sweep.pruner})")
                return TrialState.PRUNED, reason, None
        return TrialState.COMPLETE, "", statistics.median(errors)

    def _reporter(self, trial: optuna.Trial, trainer: Trainer, first: int) -> Callable[[Row], bool]:
        """Return what reports errors to the study and says whether the trial is to be pruned."""
        done = max(first, self._last(trial))

        def report(row: Row) -> bool:
            nonlocal done
            reached = first + min(PARTS, int(PARTS * spent(trainer)))
            if reached <= done:
                return False
            try:
                for part in range(done + 1, reached + 1):
                    trial.report(float(row[self.sweep.objective]), part)
                done = reached
                return reached < first + PARTS and trial.should_prune()
            except optuna.exceptions.UpdateFinishedTrialError:  # by who took this one for dead
                return True

        return report

    @contextmanager
    def _signs_of_life(self, trial: optuna.Trial) -> Iterator[None]:
        """Let workers of other folders see that the trial is at work."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(BEAT):
                with suppress(Exception):  # the next one may get through
                    trial.set_user_attr("beat", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def table(self) -> pd.DataFrame:
        """Return a row for every trial."""
        return pd.DataFrame(
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                self.sweep.objective: trial.value,
                **trial.params,
                "seconds": trial.duration.total_seconds() if trial.duration else None,
                "reason": trial.user_attrs.get("reason", ""),
            }
            for trial in self.trials()
        )

    def show(self) -> None:
        """Print how many trials came to which end, and the best."""
        sweep, table = self.sweep, self.table()
        counts = ", ".join(f"{n} {state}" for state, n in Counter(table.get("state", ())).items())
        print(
            f"\n{sweep.label} on {short(sweep.experiment.problem)}, {sweep.trials} trials: {counts}"
        )
        best = table[table["state"] == "complete"] if counts else table
        if len(best):
            best = best.sort_values(sweep.objective).drop(columns=["state", "reason"]).head(10)
            print(best.to_string(index=False, float_format="{:.3g}".format))
            seeds = ", ".join(map(str, sweep.experiment.seeds))
            print(f"{sweep.objective}: median over seeds {seeds}; the best of a sweep is flattered")

    def save(self) -> None:
        """Write the table and the best experiment."""
        complete = [t for t in self.trials() if t.state == TrialState.COMPLETE]
        with _locked(self.folder):
            text = self.table().to_csv(index=False)
            write_atomically(self.folder / TABLE, text.encode())
            if complete:
                best = min(complete, key=lambda t: t.value or 0.0)
                drawn = {k: v if isinstance(v, str) else repr(v) for k, v in best.params.items()}
                write_json(self.folder / BEST, dataclasses.asdict(self.sweep.of(drawn)))


def _open(folder: Path, storage: str) -> optuna.storages.BaseStorage:
    """Open Optuna's storage.

    Raises:
        UserError: If it cannot be used.
    """
    try:
        if storage.endswith((".log", ".journal")):
            return JournalStorage(JournalFileBackend(storage))
        if storage:
            return RDBStorage(storage, engine_kwargs={"poolclass": NullPool})
        file = folder / "sweep.db"
        connect = partial(sqlite3.connect, file, timeout=60, check_same_thread=False)
        kwargs = {"poolclass": NullPool, "creator": connect}  # any path, which a URL may not hold
        return RDBStorage("sqlite:///sweep.db", engine_kwargs=kwargs)
    except (SQLAlchemyError, ImportError, ValueError, OSError) as error:
        raise UserError(
            f"--storage: {first_line(error)} It must be a URL such as postgresql+psycopg://HOST/DB "
            "whose server runs and driver is installed, or a path that ends in .journal or .log."
        ) from error


@contextmanager
def _locked(path: Path | None, stem: str = "") -> Iterator[Path]:
    """Hold the lock of the sweep's folder, which is created if need be."""
    while True:
        try:
            old = path is not None and (path / SWEEP).is_file()
            folder = RunFolder(path) if path and old else RunFolder.create(path, stem)
            break
        except UserError as error:
            if not isinstance(error, BusyError) and (
                old or not path or not (path / SWEEP).is_file()
            ):
                raise
            time.sleep(POLL / 20)  # another worker is at it, or has just set it up
    try:
        yield folder.path
    finally:
        folder.close()


# --- the program ----------------------------------------------------------------------------------


def make_parser() -> Parser:
    """Return the parser of the program's options."""
    parser = Parser(_DESCRIPTION)
    for flag, metavar, kind, text in (
        ("--trials", "N", int, "of all workers together; 30"),
        ("--workers", "K", int, "side by side; 1"),
        ("--sampler", "X", str, f"{' or '.join(_SAMPLERS)}; tpe"),
        ("--pruner", "X", str, f"ends hopeless trials: {', '.join(_PRUNERS)}; median"),
        ("--storage", "X", str, "for many machines: URL of a database, or a path in .journal"),
        ("--study", "X", str, "its name there, by which workers with other folders join"),
        ("--resume", "F", Path, "go on with the sweep of this folder"),
        ("--show", "F", Path, "print how far the sweep of this folder is, and the best trials"),
        ("--space", "X", str, "names in spaces.py, and X.A=LOW:HIGH, LOW:HIGH:log or A,B,..."),
        ("--submitit", "X", str, "workers as jobs: slurm timeout_min=600 slurm_partition=gpu"),
    ):
        several = "+" if flag in ("--space", "--submitit") else None
        parser.add_argument(flag, metavar=metavar, type=kind, nargs=several, help=text)
    parser.add_argument("--as-worker", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(arguments: Sequence[str]) -> ExitCode:
    """Run the program.

    Returns:
        The exit code: 0 if all trials are done, 1 if workers failed or no trial came to its end, 2
        if the request was wrong, 130 if interrupted.
    """
    parser = make_parser()
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if options.list is not None:
        if options.list not in ("points", "resampling"):  # which are spaces and nothing else
            list_names(options.list)
        for name in (options.list,) if options.list else SPACES:
            for key, found in SPACES.get(name, {}).items():
                print(f"  --space {name}.{key}={found}")
        return ExitCode.SUCCESS
    try:
        if options.show:
            Study(options.show, stored_in(options.show, options.storage)).show()
            return ExitCode.SUCCESS
        return _sweep(set_up(parser, options), options)
    except (optuna.exceptions.OptunaError, SQLAlchemyError, OSError) as error:
        raise UserError(
            f"the storage or the disk failed: {first_line(error)} Once it works again, the same "
            "command goes on."
        ) from error


def _sweep(study: Study, options: argparse.Namespace) -> ExitCode:
    """Work or let work, and close with the table."""
    sweep, folder = study.sweep, study.folder
    print(f"sweep folder: {folder}; study: {sweep.study}", flush=True)
    for key, found in sweep.space.items():
        print(f"  {key}: {found}")
    if options.as_worker or (options.workers in (None, 1) and not options.submitit):
        interrupted: bool | None = _work(study)
    else:
        interrupted = _employ(study, options)
    if interrupted is None:
        return ExitCode.SUCCESS
    study.save()
    study.show()
    done = study.finished()
    if len(done) < sweep.trials:
        rest = again("resume", folder, sweep.experiment)
        print(f"go on with: python experiments/sweep.py {rest}")
    if interrupted:
        return ExitCode.INTERRUPTED
    if not any(trial.state == TrialState.COMPLETE for trial in done):
        print(f"No trial came to its end; {folder / TABLE} says why.")
        return ExitCode.FAILURE
    best = again("config", folder / BEST, sweep.experiment)
    print(f"{folder / TABLE}; the best: python experiments/train.py {best}")
    return ExitCode.SUCCESS if len(done) == sweep.trials else ExitCode.FAILURE


def _work(study: Study) -> bool:
    """Train one trial after another until all are done; return whether that was interrupted."""
    with Interruption() as interruption:
        if hasattr(signal, "SIGUSR2"):  # what Slurm's jobs get before their time is over
            signal.signal(signal.SIGUSR2, signal.getsignal(signal.SIGTERM))
        while not interruption.requested:
            if (claimed := study.claim()) is not None:
                trial, folder = claimed
                try:
                    study.run(trial, folder, interruption)
                finally:
                    folder.close()
            elif len(study.finished()) == study.sweep.trials:
                break
            else:
                time.sleep(POLL)  # others are at work; what they leave behind is taken up
        return interruption.requested


def _employ(study: Study, options: argparse.Namespace) -> bool | None:
    """Start workers, and show what they do until they end.

    Returns:
        Whether that was interrupted; None if they are jobs that run on their own.
    """
    experiment, total = study.sweep.experiment, study.sweep.trials
    command = [sys.executable, str(Path(__file__).resolve()), "--as-worker"]
    command += ["--resume", str(study.folder.resolve())]
    command += chain(*own_names(experiment).values())
    if options.threads or not options.submitit:  # jobs count the cores that they are given
        command += ["--threads", str(experiment.threads)]
    os.environ[STORAGE] = study.sweep.storage
    jobs, processes = [], []
    if options.submitit:
        jobs = _submit(study.folder, command, options)
        print(f"jobs {', '.join(job.job_id for job in jobs)}; watch them by --show {study.folder}")
        if options.submitit[0] == "slurm":
            return None
    for k in range(0 if jobs else options.workers):
        # each in a session of its own, so that Ctrl-C reaches it once, and from here
        with (study.folder / f"worker{k}.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        processes.append(process)
    begun, first = time.monotonic(), len(study.finished())
    seen, asked = first, False
    with Interruption() as interruption:
        try:
            while any(p.poll() is None for p in processes) or not all(job.done() for job in jobs):
                if interruption.requested and not asked:
                    asked = True
                    for process in processes:
                        process.terminate()
                if interruption.requested and jobs:
                    break  # they go on
                if (now := len(study.finished())) > seen:
                    left = (time.monotonic() - begun) / (now - first) * (total - now)
                    print(f"{now} of {total} trials, {left:.0f} s left", flush=True)
                seen = now
                time.sleep(POLL / 4)
        except KeyboardInterrupt:
            for process in processes:
                process.kill()
            raise
    for k, process in enumerate(processes):
        if (code := process.returncode) not in (ExitCode.SUCCESS, ExitCode.INTERRUPTED):
            print(f"a worker ended with exit code {code}; see {study.folder / f'worker{k}.log'}")
    return interruption.requested


def _submit(folder: Path, command: list[str], options: argparse.Namespace) -> list[Any]:
    """Submit the workers as jobs that go on in a new one when their time is over."""
    import submitit  # noqa: PLC0415 - an extra

    cluster, *words = options.submitit
    try:
        pairs = {k: evaluate(v) for k, _, v in (w.partition("=") for w in words)}
        executor = submitit.AutoExecutor(folder / "submitit", cluster=cluster)
        executor.update_parameters(**{"timeout_min": 24 * 60, **pairs})
        worker = submitit.helpers.CommandFunction(command, cwd=Path.cwd())
        vars(worker)["checkpoint"] = partial(submitit.helpers.DelayedSubmission, worker)
        return [executor.submit(worker) for _ in range(options.workers or 1)]
    except (ValueError, NameError, AssertionError, RuntimeError, OSError) as error:
        raise UserError(f"--submitit {' '.join(options.submitit)}: {first_line(error)}") from error


# --- what is asked for ----------------------------------------------------------------------------


def set_up(parser: Parser, options: argparse.Namespace) -> Study:
    """Return the sweep that options ask for, new or to go on with.

    Raises:
        UserError: If it is not possible, or the folder or the study is of another one.
    """
    check_positive(options, "trials", "workers")
    stored = None
    if options.resume:
        stored = stored_in(options.resume, options.storage)
        for name in ("space", "sampler", "pruner", "study", "run_folder", "config"):
            if getattr(options, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"--resume goes on with the sweep as it is; drop {flag}.")
    experiment = experiment_of(parser, options, stored.experiment if stored else None)
    if len(experiment.labels) != 1:
        raise UserError(
            f"--optimizers must name the one to sweep, got {', '.join(experiment.optimizers)}."
        )
    if options.threads is None:
        threads = max(1, torch.get_num_threads() // (options.workers or 1))
        experiment = dataclasses.replace(experiment, threads=threads)
    sweep = stored or _declared(experiment, options)
    files = experiment.identity(sweep.label, experiment.seeds[0])["files"]
    trials = options.trials or sweep.trials
    sweep = dataclasses.replace(sweep, experiment=experiment, files=files, trials=trials)
    path = options.resume or options.run_folder
    with _locked(path, f"sweep-{short(experiment.problem)}") as folder:
        sweep = dataclasses.replace(sweep, study=sweep.study or folder.resolve().name)
        if old := (folder / SWEEP).is_file():
            sweep.agree(read_config(folder / SWEEP, "--resume"), str(folder / SWEEP))
        if not options.as_worker:  # first, for who is killed now to find the folder its own
            write_json(folder / SWEEP, sweep.to_json())
        try:
            study = Study(folder, sweep)
            known = study.study.user_attrs.get("sweep") or sweep.to_json()
            sweep.agree(
                {**known, "storage": sweep.to_json()["storage"]}, f"The study {sweep.study}"
            )
        except UserError:
            if not old:
                (folder / SWEEP).unlink()
            raise
        if not options.as_worker:
            study.study.set_user_attr("sweep", sweep.to_json())
    return study


def _declared(experiment: Experiment, options: argparse.Namespace) -> Sweep:
    """Return a new sweep, once the ends of its space were built."""
    named = {n: v for n in ("sampler", "pruner", "study") if (v := getattr(options, n)) is not None}
    for name, known in (("sampler", _SAMPLERS), ("pruner", _PRUNERS)):
        if (word := named.get(name)) is not None and word not in known:
            near = near_misses(word, known)
            raise UserError(f"--{name} must be one of {', '.join(known)}, got {word}.{near}")
    space = space_of(experiment, options.space or (), [s.partition("=")[0] for s in options.set])
    storage = _absolute(options.storage or os.environ.get(STORAGE, ""))
    sweep = Sweep(experiment, space, storage=storage, **named)
    return dataclasses.replace(sweep, objective=check(sweep))


def check(sweep: Sweep) -> str:
    """Build what is at the ends of the space, and return the column to make small.

    Raises:
        UserError: If something cannot be built.
    """
    set_up_device(sweep.experiment)
    ends = [found.ends() for found in sweep.space.values()]
    for k in range(max(map(len, ends))):
        drawn = {key: end[min(k, len(end) - 1)] for key, end in zip(sweep.space, ends, strict=True)}
        try:
            one = sweep.of(drawn).only(sweep.label)
            problem = one.build_problem()
            one.build_optimizer(sweep.label, one.build_network(problem, 1).parameters())
        except UserError as error:
            raise UserError(f"--space holds what is not possible: {error}") from error
    return "rmse" if problem.solution is not None else "held_out_loss"


def stored_in(folder: Path, storage: str | None) -> Sweep:
    """Return the sweep of a folder.

    Raises:
        UserError: If there is none, or its password is needed.
    """
    path = folder / SWEEP
    tree = read_config(path, "--resume")
    try:
        place = storage or tree["storage"]
        if "***" in place:
            place = os.environ.get(STORAGE) or place
        if "***" in place:
            raise UserError(f"No password is stored. Give --storage {place} again, with it.")
        parts = {
            "experiment": from_json(tree["experiment"], str(path)).checked(),
            "space": {key: parse(text) for key, text in tree["space"].items()},
            "storage": _absolute(place),
        }
        sweep = Sweep(**{**tree, **parts})
        for name, hint in {"trials": int, "objective": str, "study": str}.items():
            if not isinstance(getattr(sweep, name), hint):
                raise TypeError(f"{name} must be {hint.__name__}, got {getattr(sweep, name)!r}")
        _ = _SAMPLERS[sweep.sampler], _PRUNERS[sweep.pruner]
        return sweep
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} holds no sweep: {first_line(error)}.") from error


def _absolute(storage: str) -> str:
    return str(Path(storage).resolve()) if storage and "://" not in storage else storage


if __name__ == "__main__":
    main_of(main)
