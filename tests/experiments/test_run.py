"""What a run leaves behind, and which runs are refused before any work."""

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from experiments.training.loop import is_recorded
from experiments.training.metrics import read_metrics
from experiments.training.run_folder import RunFolder
from experiments.training.trainer import Trainer
from pinncurv.optim import StepRecord
from tests.experiments.runs import ALL, EVERY, resume, rows, same, start, state


def test_every_preset_runs_and_leaves_a_readable_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert start(folder, "--steps", "3", *EVERY) == 0

    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "environment.json", "summary.csv", "figure.png", *ALL} <= names
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["n_interior"], settings["threads"], settings["steps"]) == (12, 1, 3)
    environment = json.loads((folder / "environment.json").read_text())[0]
    # the distribution's version may lack the build that torch.__version__ ends with (+cu130)
    recorded = environment["packages"]["torch"]
    assert recorded.partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"commit", "uncommitted_changes", "device", "python", "started"} <= environment.keys()

    for name in ALL:
        metrics = read_metrics(folder / name)
        assert metrics["step"] == [0, 1, 2, 3]
        assert all(math.isfinite(value) for value in metrics["rmse"] + metrics["loss"])
        terms = zip(metrics["loss_interior"], metrics["loss_boundary"], strict=True)
        assert [sum(parts) for parts in terms] == pytest.approx(metrics["loss"])
        assert metrics["seconds"] == sorted(metrics["seconds"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("RMSE", "relative error", str(folder / "figure.png")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--problem", "heat1d", "--dtype", "float32", "--activation", "sin", "--chunk-size", "5"],
        ["--problem", "heat4d", "--hidden", "3", "4"],
        ["--problem", "fokker-planck", "--resample-every", "1"],
        ["--problem", "anisotropic-log-fokker-planck", "--dimension", "3"],
    ],
    ids=["heat1d", "heat4d", "fokker-planck", "anisotropic"],
)
def test_other_problems_and_networks_run(arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(run, "--steps", "2", "--optimizers", "kfac-star", *arguments) == 0
    assert (run / "figure.png").stat().st_size > 10_000


@pytest.mark.usefixtures("_no_figure")
def test_a_budget_of_seconds_ends_the_run(tmp_path: Path) -> None:
    assert start(tmp_path / "run", "--seconds", "0.05", "--optimizers", "adam") == 0
    assert read_metrics(tmp_path / "run" / "adam")["seconds"][-1] >= 0.05


@pytest.mark.usefixtures("_no_figure")
def test_the_settings_of_a_run_can_be_fed_back(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    options = ["--kfac.momentum", "0.3", "--kfac.line-search-exponents", "-3", "0"]
    start(first, "--steps", "3", "--optimizers", "kfac", *options)
    assert start(second, "--config", str(first / "config.json")) == 0
    assert same(state(first, "kfac"), state(second, "kfac"))


def test_records_are_ever_sparser_or_regular() -> None:
    recorded = [step for step in range(1, 1025) if is_recorded(step, 0)]
    assert recorded[:40] == [*range(1, 32), *range(32, 64, 1)][:40]
    assert len([step for step in recorded if 256 <= step < 512]) == 32
    assert [step for step in range(20) if is_recorded(step, 7)] == [0, 7, 14]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kfac-star.damping", "nan"], "--kfac-star.damping must be a finite number, got nan"),
        (["--kfac-star.damping", "-1"], "kfac-star: damping must be a finite number >= 0"),
        (["--adam.lr", "-1"], "--adam.lr must be positive, got -1.0"),
        (["--seconds", "-3"], "--seconds must be positive or None, got -3.0"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--device", "meta"], "it is none of cpu, cuda, mps"),
        (["--threads", "1000000"], "--threads must be at most"),
        (["--hidden", "100000000000"], "kfac-star: the network 2-100000000000-1 cannot be built"),
        (["--n-interior", "100000000000000"], "kfac-star cannot be set up: "),
        (["--n-interior", "0"], "must be an int of at least 1"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start(tmp_path / "run", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert start(tmp_path / "run", "--device", "cuda") == 2
    assert "--device cuda cannot be used here" in capsys.readouterr().err


def test_an_unwritable_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert start(tmp_path / "file" / "run", "--steps", "1") == 2
    assert "Cannot create the run folder" in capsys.readouterr().err


def test_a_used_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert start(tmp_path, "--steps", "1") == 2
    assert f"Continue that run with --resume {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_of_a_run_killed_before_it_began_is_unused(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.partial").touch()
    RunFolder.create(tmp_path, "poisson2d").close()


@pytest.mark.usefixtures("_no_figure")
def test_a_folder_that_another_run_writes_to_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("fcntl")
    start(tmp_path / "run", "--steps", "1", "--optimizers", "adam")
    capsys.readouterr()
    holder = RunFolder(tmp_path / "run")
    assert resume(tmp_path / "run") == 2
    assert "Another process is writing" in capsys.readouterr().err
    holder.close()


def test_ctrl_c_ends_with_a_checkpoint_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    advance = Trainer.advance

    def advance_and_press(trainer: Trainer) -> StepRecord:
        record = advance(trainer)
        if trainer.step == 4:
            signal.raise_signal(signal.SIGINT)
        return record

    monkeypatch.setattr(Trainer, "advance", advance_and_press)
    run = tmp_path / "run"
    assert start(run, "--steps", "9", "--optimizers", "adam", "sgd") == 130
    assert state(run, "adam")["step"] == 4
    assert not (run / "sgd").exists()
    assert f"--resume {run}" in capsys.readouterr().out
    assert (run / "figure.png").exists()


def test_a_diverging_run_stops_and_keeps_its_last_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    options = ["--steps", "30", "--checkpoint-steps", "1", "--sgd.lr", "1e30"]
    assert start(run, "--optimizers", "sgd", "adam", *options) == 1
    assert "sgd stopped: " in capsys.readouterr().out
    weights = state(run, "sgd")["model"].values()
    assert all(weight.isfinite().all() for weight in weights)
    assert rows(run, "adam")[-1]["step"] == "30"


def test_errors_whose_squares_overflow_are_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--steps", "30", "--optimizers", "sgd", "--sgd.lr", "1e30"]
    assert start(tmp_path / "run", *options) == 1
    assert "sgd stopped: " in capsys.readouterr().out
    assert (tmp_path / "run" / "figure.png").exists()


@pytest.mark.usefixtures("_no_figure")
@pytest.mark.parametrize("method", ["advance", "measure"])
def test_one_optimizer_out_of_memory_does_not_stop_the_others(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    working = getattr(Trainer, method)

    def fail(trainer: Trainer, *arguments: object) -> object:
        if trainer.name == "sgd" and (method == "measure" or trainer.step == 2):
            raise RuntimeError("out of memory\ntrace of C++")
        return working(trainer, *arguments)

    monkeypatch.setattr(Trainer, method, fail)
    run = tmp_path / "run"
    options = ["--steps", "3", "--checkpoint-steps", "1"]
    assert start(run, "--optimizers", "sgd", "adam", *options) == 1
    printed = capsys.readouterr().out
    assert "sgd stopped: RuntimeError: out of memory\n" in printed
    assert "figure: " in printed
    assert rows(run, "adam")[-1]["step"] == "3"
    assert "sgd,RuntimeError: out of memory," in (run / "summary.csv").read_text()
    if method == "advance":
        assert state(run, "sgd")["step"] == 2
