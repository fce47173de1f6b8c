"""A resumed run ends where the uninterrupted one does, bit for bit, or is refused."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import folder
from experiments.objects import UserError
from experiments.training import (
    CURRENT,
    METRICS,
    PREVIOUS,
    MetricsFile,
    Trainer,
    read_checkpoint,
)
from pinncurv.optim import StepRecord
from tests.experiments.runs import (
    ALL,
    BOUNDARY,
    EVERY,
    TINY,
    part,
    resume,
    rows,
    same,
    start,
    state,
)

ROOT = Path(__file__).parents[2]


pytestmark = pytest.mark.usefixtures("_no_figure")


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (ALL, [*EVERY, "--resample-every", "2"]),
        (["kfac_star", "adam"], ["--optimizers", "kfac_star", "adam"]),
        (["nadam"], ["--optimizers", "nadam"]),
        (["adam"], ["--optimizers", "adam", "--resample-every", "2", "--candidates", "3"]),
    ],
    ids=["every", "fixed-batch", "scalars-of-another-dtype", "points-chosen-by-residual"],
)
def test_every_preset_resumes_bit_for_bit(
    names: list[str], options: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    start(whole, "--steps", "5", *options)
    start(parts, "--steps", "3", *options)
    assert resume(parts, "--steps", "5") == 0
    for name in names:
        assert same(state(whole, name), state(parts, name)), name
        assert rows(whole, name) == rows(parts, name), name


def test_intervals_and_adaptive_damping_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ["--optimizers", "kept=curvature_optimizer", "levenberg_marquardt", "--set"]
    options += ["kept.curvature=KFAC()", "kept.inverse=FactorDamping(1e-8)"]
    options += ["kept.intervals=Intervals(2, 3)", "kept.average=ExponentialAverage(0.5)"]
    start(whole, "--steps", "8", *options)
    start(parts, "--steps", "5", *options)
    resume(parts, "--steps", "8")
    for name in ("kept", "levenberg_marquardt"):
        assert same(state(whole, name), state(parts, name)), name


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--optimizers", "kfac_star", "--resample-every", "10"]
    options += ["--checkpoint-steps", "3", "--record-every", "2"]
    arguments = ["--run-folder", str(killed), "--steps", "1000000", *TINY, *BOUNDARY, *options]
    process = subprocess.Popen(
        [sys.executable, "experiments/train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.DEVNULL,
    )
    checkpoint = part(killed, "kfac_star") / PREVIOUS
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.2))  # anywhere: in a step, between two renamings, in a row
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    last = max(int(row["step"]) for row in rows(killed, "kfac_star"))
    steps = str(last + 4)
    assert resume(killed, "--steps", steps) == 0
    assert start(whole, "--steps", steps, *options) == 0
    assert same(state(whole, "kfac_star"), state(killed, "kfac_star"))
    assert rows(whole, "kfac_star") == rows(killed, "kfac_star")


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    advance = Trainer.advance

    def die(trainer: Trainer) -> StepRecord:
        if trainer.step == 2:
            raise KeyboardInterrupt
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", die)
    assert start(run, "--steps", "4", "--optimizers", "adam") == 130
    monkeypatch.undo()
    assert resume(run) == 0
    start(whole, "--steps", "4", "--optimizers", "adam")
    assert same(state(whole, "adam"), state(run, "adam"))


def test_a_damaged_checkpoint_of_a_later_seed_does_not_stop_the_others(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, "--steps", "2", "--optimizers", "adam", "sgd", "--seeds", "1", "2")
    for name in (CURRENT, PREVIOUS):
        _damage(part(run, "adam", 2) / name, "flip")
    assert resume(run, "--steps", "3") == 1
    assert (state(run, "adam", 1)["step"], state(run, "sgd", 2)["step"]) == (3, 3)


def test_elapsed_time_is_counted_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, "--steps", "3", "--optimizers", "adam")
    before = state(run, "adam")["seconds"]
    resume(run, "--steps", "4")
    assert state(run, "adam")["seconds"] > before > 0


@pytest.mark.parametrize("torn", [b",", b"x1,", b"\xff,"])
def test_a_torn_row_counts_as_not_written(torn: bytes, tmp_path: Path) -> None:
    columns = ["step", "loss", "reason"]
    path = tmp_path / METRICS
    path.write_bytes(b"step,loss,reason\n0,1.0,\n" + torn + b"2.0,\n2,,why\n")
    metrics = MetricsFile(tmp_path, columns, 2)
    metrics.close()
    assert metrics.last_step == 2
    assert path.read_text().split() == ["step,loss,reason", "0,1.0,", "2,,why"]


def test_more_optimizers_can_join(tmp_path: Path) -> None:
    run = tmp_path / "run"
    start(run, "--steps", "3", "--optimizers", "adam")
    assert resume(run, "--optimizers", "adam", "sgd") == 0
    assert (state(run, "adam")["step"], state(run, "sgd")["step"]) == (3, 3)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    start(whole, "--steps", "5", "--optimizers", "kfac_star", "--checkpoint-steps", "3")
    for damage in ("cut", "flip", "missing"):
        run = shutil.copytree(whole, tmp_path / damage)
        _damage(part(run, "kfac_star") / CURRENT, damage)
        assert resume(run) == 0
        assert same(state(whole, "kfac_star"), state(run, "kfac_star"))
        assert rows(whole, "kfac_star") == rows(run, "kfac_star")


@pytest.mark.parametrize("how", ["gone", "folders"])
def test_metrics_without_checkpoints_are_not_overwritten(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(run, "--steps", "4", "--optimizers", "adam", "--checkpoint-steps", "1")
    for name in (CURRENT, PREVIOUS):
        (part(run, "adam") / name).unlink()
        if how == "folders":
            (part(run, "adam") / name).mkdir()
    metrics = (part(run, "adam") / METRICS).read_bytes()
    assert resume(run) == 2
    assert "No whole checkpoint is left" in capsys.readouterr().err
    assert (part(run, "adam") / METRICS).read_bytes() == metrics


def test_nothing_but_damaged_checkpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(run, "--steps", "4", "--optimizers", "adam", "--checkpoint-steps", "1")
    for name in (CURRENT, PREVIOUS):
        _damage(part(run, "adam") / name, "flip")
    metrics = (part(run, "adam") / "metrics.csv").read_bytes()
    assert resume(run) == 2
    assert "No whole checkpoint is left" in capsys.readouterr().err
    assert (part(run, "adam") / "metrics.csv").read_bytes() == metrics


def test_a_checkpoint_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    start(run, "--steps", "2", "--optimizers", "adam")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    for arguments, message in (
        (["--set", "network.widths=(5, 5)"], "network.widths was (5,) and now is (5, 5)"),
        (["--problem", "heat1d"], "problem was poisson2d and now is heat1d"),
        (["--set", "adam.lr=0.5"], "optimizer.lr was not set and now is 0.5"),
        (["--dtype", "float32"], "dtype was float64 and now is float32"),
    ):
        assert resume(run, *arguments) == 2
        assert message in capsys.readouterr().err
        assert {path: path.read_bytes() for path in before} == before


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(tmp_path) == 2
    assert "--resume: cannot read" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    folder.write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(folder.os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        folder.write_atomically(path, b"new", keep=tmp_path / "kept")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_file_that_was_never_a_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / CURRENT
    path.write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes do not have the checksum"):
        read_checkpoint(path)


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if how == "cut":
        del content[len(content) // 2 :]
    path.write_bytes(content)
    if how == "missing":
        path.unlink()
