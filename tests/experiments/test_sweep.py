"""A sweep loses no trial and counts none twice, whatever becomes of its workers."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="sweeps need Optuna")

from optuna.trial import TrialState

from experiments import sweep, train
from experiments.catalog import OPTIMIZERS
from experiments.command import Interruption, run_program
from experiments.experiment import Experiment
from experiments.objects import UserError
from experiments.results import gather
from experiments.spaces import SPACES, Choice, Float, Int, parse, space_of
from experiments.training import CURRENT, PREVIOUS, read_checkpoint

ROOT = Path(__file__).parents[2]

TINY = ["--optimizers", "adam", "--threads", "1", "--set", "network.widths=(5,)"]
TINY += ["problem.n_interior=12", "problem.n_boundary=6"]


def program(*arguments: str | Path) -> int:
    """Run the program in this process, as the script does."""
    return run_program(lambda: sweep.main([str(argument) for argument in arguments]))


def script(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start the script."""
    return subprocess.Popen(
        [sys.executable, "experiments/sweep.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def study(folder: Path) -> sweep.Study:
    """Return what a folder's sweep has come to."""
    return sweep.Study(folder, sweep.stored_in(folder, None))


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Return what a condition becomes, while a process lives."""
    while not (found := condition()):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    return found


# --- spaces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "real", "expected"),
    [
        ("1e-15:1e-2:log", False, Float(1e-15, 1e-2, log=True)),
        ("10:1000:log", False, Int(10, 1000, log=True)),
        ("0:1", False, Int(0, 1)),
        ("0:1", True, Float(0.0, 1.0)),
        ("expand,reduce", False, Choice(("expand", "reduce"))),
        ("(8,),(8, 8)", False, Choice(("(8,)", "(8, 8)"))),
        ("f(a=1,b=2),g", False, Choice(("f(a=1,b=2)", "g"))),
    ],
)
def test_a_range_is_what_its_text_says(text, real, expected):
    assert parse(text, real) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2:1", "LOW below HIGH, got 2:1"),
        ("0.0:1:log", "LOW must be positive, got 0.0:1.0:log"),
        ("nan:1", "finite"),
        ("1:2:3", "A,B,..., got '1:2:3'"),
        ("1e-3", "A,B,..., got '1e-3'"),
        ("a,,b", "got 'a,,b'"),
        ("a,a", "got 'a,a'"),
    ],
)
def test_what_is_no_range_is_refused(text, message):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        parse(text)


def test_a_space_is_a_name_and_ranges_without_what_is_set():
    experiment = Experiment(optimizers=("mine=kfac_star",)).checked()
    assert list(space_of(experiment, [], [])) == ["mine.damping", "mine.decay", "mine.start"]
    words = ["kfac_star", "points", "poisson2d.n_interior=5:9", "mine.decay=0:1"]
    space = space_of(experiment, words, ["mine.damping"])
    assert "mine.damping" not in space
    assert (space["problem.n_interior"], space["mine.decay"]) == (Int(5, 9), Float(0.0, 1.0))


@pytest.mark.parametrize("name", list(SPACES))
def test_every_declared_space_can_be_built(name):
    experiment = Experiment(optimizers=(name if name in OPTIMIZERS else "adam",)).checked()
    assert sweep.check(sweep.Sweep(experiment, space_of(experiment, [name], []))) == "rmse"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--space", "adm"], "there is no space 'adm'. Perhaps you meant adam"),
        (["--space", "adam.l=1:2"], "adam has no argument 'l'"),
        (["--space", "kfac.lr=1:2"], "--space kfac.lr has no effect"),
        (["--space", "adam.lr=1e-3"], "--space adam.lr: a range must be LOW:HIGH"),
        (["--space", "adam.lr=-1.0:1.0"], "--space holds what is not possible: adam: Invalid"),
        (["--set", "adam.lr=1", "--space", "adam.lr=1:2"], "fixed by --set and varied by --space"),
        (["--set", "adam.lr=1"], "leaves nothing to vary: it fixes adam.lr"),
        (["--optimizers", "adam", "sgd"], "name the one to sweep, got adam, sgd"),
        (["--device", "x"], "--device x cannot be used here"),
        (["--pruner", "medan"], "--pruner must be one of median, hyperband, none, got medan"),
        (["--trials", "0"], "--trials must be positive, got 0"),
        (["--storage", "postgres"], "--storage: "),
        (["--storage", "nothing+such://host/db"], "--storage: "),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_leaves_nothing(options, message, tmp_path, capsys):
    assert program("--optimizers", "adam", "--run-folder", tmp_path / "run", *options) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.rglob("trial*"))


# --- one worker -----------------------------------------------------------------------------------


def test_a_sweep_goes_on_where_it_was_and_its_best_can_be_trained(tmp_path, capsys):
    folder = tmp_path / "run"
    command = ["--run-folder", folder, *TINY, "--steps", "3", "--seeds", "1", "2"]
    command += ["--pruner", "none"]
    assert program(*command, "--trials", "2") == 0
    assert program(*command, "--trials", "3") == 0
    before = (folder / "sweep.db").read_bytes()
    assert program("--resume", folder) == 0
    assert [row["trial"] for row in table(folder)] == ["0", "1", "2"]
    assert {row["state"] for row in table(folder)} == {"complete"}
    assert len(gather([folder]).groupby(["run", "seed"])) == 6
    assert (folder / "sweep.db").read_bytes() == before

    capsys.readouterr()
    assert program("--show", folder) == 0
    assert "adam on poisson2d, 3 trials: 3 complete" in capsys.readouterr().out
    best = min(table(folder), key=lambda row: float(row["rmse"]))
    config = ["--config", str(folder / "best.json"), "--run-folder", str(tmp_path / "best")]
    assert run_program(lambda: train.main(config)) == 0
    finals = gather([tmp_path / "best"]).groupby("seed").tail(1)["rmse"]
    assert finals.median() == pytest.approx(float(best["rmse"]), rel=1e-12)

    for options, message in (
        ([*command, "--steps", "4"], "is of another sweep: steps was 3 and now is 4"),
        ([*command, "--space", "adam.lr=1:2"], "space was {'adam.lr': '1e-06:0.1:log'} and now is"),
        (["--resume", folder, "--pruner", "median"], "as it is; drop --pruner"),
    ):
        assert program(*options) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("pruner", ["median", pytest.param("hyperband", marks=pytest.mark.slow)])
def test_what_is_hopeless_is_pruned(pruner, tmp_path):
    command = ["--run-folder", tmp_path, *TINY, "--steps", "20", "--record-every", "4"]
    command += ["--trials", "10", "--sampler", "random", "--pruner", pruner]
    assert program(*command, "--space", "adam.lr=1e5,1e-3,1e-4") == 0
    pruned = [row for row in table(tmp_path) if row["state"] == "pruned"]
    assert {row["reason"] for row in pruned} == {f"pruned ({pruner})"}
    assert "1e5" in {row["adam.lr"] for row in pruned}
    assert json.loads((tmp_path / "best.json").read_text())["settings"]["adam.lr"] != "1e5"
    steps = gather([tmp_path]).groupby("run")["step"].max()
    for row in pruned:
        assert steps[str(tmp_path / f"trial-{int(row['trial']):04d}")] < 20


OWN = """
import torch

class Mine(torch.optim.SGD):
    def __init__(self, params, bad: float = 1.0):
        super().__init__(params, lr=1e300)
        self.bad = bad

    def step(self, closure):
        if self.bad > 0:
            raise KeyError("above zero")
        return super().step(closure)
"""


def test_trials_that_fail_say_why_and_do_not_end_the_sweep(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(OWN)
    folder = tmp_path / "run"
    name = ["--optimizers", f"{own}:Mine"]
    command = [*TINY, *name, "--steps", "5", "--trials", "6", "--sampler", "random"]
    assert program(*command, "--space", "Mine.bad=-1:1", "--run-folder", folder) == 1
    rows = table(folder)
    assert {row["state"] for row in rows} <= {"fail", "pruned"}
    for row in rows:
        above = float(row["Mine.bad"]) > 0
        assert ("KeyError: 'above zero'" if above else "must be finite") in row["reason"]
    assert not (folder / "best.json").exists()
    capsys.readouterr()
    assert program("--resume", folder) == 2
    assert "No code is run because a run folder names it" in capsys.readouterr().err
    own.write_text(OWN + "#")
    assert program("--resume", folder, *name) == 2
    assert "is of another sweep: files was" in capsys.readouterr().err


def test_a_trial_that_kills_its_workers_fails(tmp_path):
    command = ["--run-folder", tmp_path, *TINY, "--steps", "2", "--trials", "1"]
    sweep_ = sweep.set_up(*_options(*command))
    for _ in range(sweep.DEATHS):
        trial, folder = sweep_.claim()
        part, deaths = trial.user_attrs.get("deaths", (0, -1))
        trial.set_user_attr("deaths", (part, deaths + 1))
        folder.close()
    assert program(*command) == 1
    assert table(tmp_path)[0]["reason"] == "its worker died 3 times in a row"


def _options(*arguments):
    parser = sweep.make_parser()
    return parser, parser.parse_args([str(argument) for argument in arguments])


def test_a_worker_of_another_folder_is_left_alone_while_it_lives(tmp_path, monkeypatch):
    options = ["--storage", tmp_path / "study.journal", "--study", "s", "--trials", "1", *TINY]
    options += ["--steps", "2"]
    here, there = (
        sweep.set_up(*_options("--run-folder", tmp_path / name, *options)) for name in "ab"
    )
    trial, folder = here.claim()
    assert there.claim() is None
    monkeypatch.setattr(sweep, "GRACE", 0.0)
    trial.set_user_attr("beat", 1.0)
    assert there.claim() is None
    again, other = there.claim()
    assert again.number == trial.number == 0
    with Interruption() as interruption:
        there.run(again, other, interruption)
        value = study(tmp_path / "a").finished()[0].value
        here.run(trial, folder, interruption)  # it was not dead after all, but comes too late
    (trial,) = study(tmp_path / "b").trials()
    assert (trial.state, trial.value) == (TrialState.COMPLETE, value)
    folder.close()
    other.close()


# --- workers that die -----------------------------------------------------------------------------


def _held(worker: int, folder: Path) -> Path | None:
    """Return the trial that a process works at, if it has a checkpoint that can be lost."""
    for descriptor in Path(f"/proc/{worker}/fd").iterdir():
        try:
            path = Path(os.readlink(descriptor))
        except OSError:
            continue
        if path.name == ".lock" and path.parent.name.startswith("trial-"):
            place = path.parent / "adam/seed1"
            return place if (place / PREVIOUS).exists() else None
    return None


def _children(process: subprocess.Popen[str]) -> list[int]:
    return [
        int(pid)
        for task in Path(f"/proc/{process.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]


def _check_a_killed_worker(folder: Path, *options: str | Path) -> None:
    """Kill one of two workers in the middle of a trial, and check that all come to their end."""
    process = script(
        *("--run-folder", folder, *TINY, "--steps", "200", "--trials", "4", "--workers", "2"),
        *("--checkpoint-steps", "10", "--pruner", "none", *options),
    )
    until(lambda: len(_children(process)) == 2, process)
    victim = _children(process)[0]
    place = until(lambda: _held(victim, folder), process)
    os.kill(victim, signal.SIGKILL)
    killed = int(place.parents[1].name.removeprefix("trial-"))
    drawn = {trial.number: trial.params for trial in study(folder).trials()}
    reached = read_checkpoint(place / PREVIOUS)["state"]["step"]
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert "a worker ended with exit code -9" in output

    after = study(folder)
    assert [trial.number for trial in after.study.get_trials()] == [0, 1, 2, 3]
    assert {trial.state for trial in after.trials()} == {TrialState.COMPLETE}
    assert [t.number for t in after.trials() if t.user_attrs["deaths"][1] > 0] in ([], [killed])
    assert after.trials()[killed].params == drawn[killed]
    assert [row["trial"] for row in table(folder)] == list("0123")
    runs = gather([folder])
    assert runs["run"].nunique() == 4
    assert not runs.duplicated(["run", "step"]).any()
    steps = runs[runs["run"] == str(place.parents[1])]["step"]
    assert (steps <= reached).any()
    assert steps.max() > reached
    for trial in after.trials():
        rows = runs[runs["run"] == str(folder / f"trial-{trial.number:04d}")]
        assert trial.value == rows["rmse"].iloc[-1]
        assert json.loads((folder / f"trial-{trial.number:04d}/config.json").read_text())[
            "settings"
        ]["adam.lr"] == repr(trial.params["adam.lr"])


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path):
    _check_a_killed_worker(tmp_path / "run")


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_in_a_journal(tmp_path):
    _check_a_killed_worker(tmp_path / "run", "--storage", tmp_path / "study.journal")


@pytest.mark.slow
def test_sigterm_ends_all_workers_with_their_checkpoints(tmp_path):
    folder = tmp_path / "run"
    options = ["--seconds", "600", "--checkpoint-seconds", "600", "--record-every", "1"]
    process = script("--run-folder", folder, *TINY, *options, "--trials", "2", "--workers", "2")
    metrics = [folder / f"trial-000{k}/adam/seed1/metrics.csv" for k in range(2)]
    until(lambda: all(p.exists() and p.read_text().count("\n") > 3 for p in metrics), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert f"go on with: python experiments/sweep.py --resume {folder}" in output
    for trial, path in zip(study(folder).trials(), metrics, strict=True):
        assert (trial.state, trial.user_attrs["deaths"]) == (TrialState.RUNNING, [0, -1])
        assert read_checkpoint(path.with_name(CURRENT))["state"]["step"] > 1


@pytest.mark.slow
def test_workers_are_jobs_of_submitit(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="--submitit needs submitit")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    options = ["--steps", "3", "--trials", "2", "--pruner", "none"]
    jobs = ["--submitit", "local", "timeout_min=5"]
    assert program("--run-folder", tmp_path, *TINY, *options, *jobs) == 0
    assert [(row["trial"], row["state"]) for row in table(tmp_path)] == [
        (str(k), "complete") for k in range(2)
    ]
    assert len(list((tmp_path / "submitit").glob("*_0_result.pkl"))) == 1


def test_a_job_that_is_described_wrongly_is_refused(tmp_path, capsys):
    pytest.importorskip("submitit", reason="--submitit needs submitit")
    jobs = ["--submitit", "local", "timeout=5"]
    assert program("--run-folder", tmp_path, *TINY, "--steps", "1", *jobs) == 2
    assert "--submitit local timeout=5: " in capsys.readouterr().err


# --- a real server --------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Start a PostgreSQL server of its own, and return its URL, which has a password."""
    pytest.importorskip("psycopg", reason="the driver of PostgreSQL is not installed")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("Debian's package postgresql is not installed")
    home = Path(
        subprocess.check_output(["mktemp", "-d", "/tmp/postgres-XXXXXX"], text=True).strip()
    )
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    if os.getuid() != 0:  # PostgreSQL refuses root only
        user = []
    else:
        shutil.chown(home, "postgres", "postgres")
    tool = [*user, str(found[-1].with_name("pg_ctl")), "-D", str(home / "data"), "-w"]
    (home / "password").write_text("secret")
    (home / "password").chmod(0o644)
    initialize = ["--username=me", f"--pwfile={home}/password", "--auth=scram-sha-256"]
    subprocess.run(
        [*user, str(found[-1]), "-D", str(home / "data"), *initialize], cwd="/", check=True
    )
    listen = f"-c listen_addresses='' -c unix_socket_directories={home}"
    subprocess.run([*tool, "-o", listen, "-l", str(home / "log"), "start"], cwd="/", check=True)
    try:
        yield f"postgresql+psycopg://me:secret@/postgres?host={home}"
    finally:
        subprocess.run([*tool, "-m", "immediate", "stop"], cwd="/", check=True)
        shutil.rmtree(home)


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_on_a_real_server(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PINNCURV_STORAGE", server)  # for what reads the study in this process
    _check_a_killed_worker(tmp_path / "run", "--storage", server)
    assert "secret" not in (tmp_path / "run/sweep.json").read_text()
    monkeypatch.delenv("PINNCURV_STORAGE")
    assert program("--resume", tmp_path / "run") == 2
    assert "No password is stored. Give --storage postgresql" in capsys.readouterr().err
    assert program("--resume", tmp_path / "run", "--storage", server) == 0
