"""What a run leaves behind, and how it ends when something fails."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments import figures, results, tracking, training
from experiments.command import Interruption, run_program
from experiments.folder import RunFolder, describe_environment
from experiments.training import Trainer, is_recorded
from pinncurv.machine import memory
from tests.devices import DEVICES
from tests.experiments.runs import (
    ALL,
    EVERY,
    TINY,
    column,
    program,
    resume,
    rows,
    same,
    start,
    state,
)

ROOT = Path(__file__).parents[2]


def test_every_optimizer_runs_and_leaves_a_readable_folder(tmp_path, capsys):
    folder = tmp_path / "run"
    assert start(folder, "--steps", "3", *EVERY) == 0
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "environment.json", "summary.csv", "figure.png", *ALL} <= names
    settings = json.loads((folder / "config.json").read_text())
    assert (settings["settings"]["problem.n_interior"], settings["threads"]) == ("12", 1)
    (environment,) = json.loads((folder / "environment.json").read_text())
    # the distribution's version may lack the build that torch.__version__ ends with (+cu130)
    recorded = environment["packages"]["torch"]
    assert recorded.partition("+")[0] == torch.__version__.partition("+")[0]
    assert {"commit", "uncommitted_changes", "device", "python", "started"} <= environment.keys()
    for name in ALL:
        assert column(folder, name, "step") == [0, 1, 2, 3]
        assert all(map(math.isfinite, column(folder, name, "rmse")))
        terms = zip(
            column(folder, name, "loss_interior"),
            column(folder, name, "loss_boundary"),
            strict=True,
        )
        assert [sum(parts) for parts in terms] == pytest.approx(column(folder, name, "loss"))
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("RMSE", "relative error", str(folder / "figure.png")))


@pytest.mark.parametrize(
    "arguments",
    [
        [
            "--problem",
            "heat1d",
            "--dtype",
            "float32",
            "--chunk-size",
            "5",
            "--set",
            "network.activation=sin",
        ],
        ["--problem", "heat4d", "--set", "network.widths=(3, 4)"],
    ],
    ids=["heat1d", "heat4d"],
)
def test_other_problems_and_networks_run(arguments, tmp_path):
    run = tmp_path / "run"
    assert start(run, "--steps", "2", "--optimizers", "kfac-star", *arguments) == 0
    assert (run / "figure.png").stat().st_size > 10_000


@pytest.mark.usefixtures("_no_figure")
def test_a_system_has_the_mean_of_its_errors(tmp_path, capsys):
    run, network = tmp_path / "run", ["--network", "periodic_mlp", "--set", "network.modes=2"]
    periods = ["--problem", "nls", *network, "network.periods=(None, 30)"]
    assert start(run, "--steps", "1", "--optimizers", "kfac_star", *periods) == 0
    assert "mean_error" in capsys.readouterr().out
    single, mean = (column(run, "kfac_star", f"{kind}_error") for kind in ("relative", "mean"))
    assert all(map(math.isfinite, mean))
    assert mean != single
    assert start(tmp_path / "other", *periods[:-1], "network.periods=(30,)") == 2
    assert "periods must have 2 entries, one per coordinate, got (30,)" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_figure")
@pytest.mark.parametrize("device", DEVICES)
def test_a_network_in_a_residual_moves_along(device, tmp_path):
    run, where = tmp_path / "run", ("--device", device, "--dtype", "float32")
    problem = ("--problem", "poisson-source", "--set", "problem.n_data=8")
    assert start(run, "--steps", "1", "--optimizers", "kfac_star", *problem, *where) == 0
    assert resume(run, "--steps", "2") == 0
    assert all(map(math.isfinite, column(run, "kfac_star", "loss")))
    (environment, _) = json.loads((run / "environment.json").read_text())
    assert environment["device"] == device


def test_several_seeds_are_several_trainings_in_one_table(tmp_path):
    run = tmp_path / "run"
    assert (
        start(
            run,
            "--steps",
            "2",
            "--optimizers",
            "adam",
            "low=adam",
            "--seeds",
            "1",
            "2",
            "--set",
            "low.lr=1e-4",
        )
        == 0
    )
    alone = tmp_path / "alone"
    start(alone, "--steps", "2", "--optimizers", "adam", "--seeds", "2")
    assert same(state(run, "adam", 2), state(alone, "adam", 2))
    table = results.gather([tmp_path])
    assert len(table) == 5 * 3
    assert set(table["optimizer"]) == {"adam", "low"}
    assert '"low.lr": "1e-4"' in table[table["optimizer"] == "low"]["settings"].iloc[0]
    written = pd.read_csv(run / "summary.csv")
    assert list(zip(written["optimizer"], written["seed"], strict=True)) == [
        ("adam", 1),
        ("adam", 2),
        ("low", 1),
        ("low", 2),
    ]


def test_the_index_draws_medians_and_published_curves(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert start(run, "--steps", "12", "--optimizers", "adam", "--seeds", "1", "2") == 0
    curves = tmp_path / "curves.csv"
    curves.write_text(
        "run,step,time,loss,l2_error\npoisson2d/2-64-1/Adam/random,1,1,1,1\npoisson2d/2-64-1/Adam/random,9,2,1,.5\n"
    )
    monkeypatch.setattr(results, "PUBLISHED", curves)
    arguments = [
        str(tmp_path),
        "--csv",
        str(tmp_path / "all.csv"),
        "--figure",
        str(tmp_path / "f.png"),
        "--network",
        "2-64-1",
    ]
    assert run_program(lambda: results.main(arguments)) == 0
    assert (tmp_path / "f.png").stat().st_size > 10_000
    assert len(pd.read_csv(tmp_path / "all.csv")) == 26


def test_published_steps_are_updates_and_the_second_run_of_a_name_is_left_out(
    tmp_path, monkeypatch
):
    """The reference counts from zero, and holds two Hessian-free runs on heat4d under one name."""
    curves = tmp_path / "curves.csv"
    rows = ["a,0,1,1,1", "b,0,1,9,9", "a,2,2,.5,.5", "b,2,2,8,8", "a,0,1,7,7", "a,4,3,7,7"]
    text = "\n".join(["run,step,time,loss,l2_error", *rows])
    for name, run in (("a", "heat4d/5-64-1/HessianFree/random"), ("b", "heat1d/2-64-1/SGD/random")):
        text = text.replace(f"\n{name},", f"\n{run},")
    curves.write_text(text)
    monkeypatch.setattr(results, "PUBLISHED", curves)
    found = results.published_curves("heat4d", "5-64-1")
    assert found[["step", "rmse"]].to_numpy().tolist() == [[1, 1], [3, 0.5]]
    assert len(results.published_curves("heat1d", "2-64-1")) == 2
    assert results.published_curves("heat1d", "2-64-64-1") is None


def test_two_runs_are_two_curves_and_half_a_number_is_none(tmp_path, monkeypatch):
    for name, lr in (("a", "1e-3"), ("b", "1e-2")):
        run = tmp_path / name
        start(run, "--steps", "3", "--optimizers", "adam", "--set", f"adam.lr={lr}")
    with (tmp_path / "a/adam/seed1/metrics.csv").open("a") as file:
        file.write("4,0.1,2")  # of 2e-5, say, when the disk was full
    (tmp_path / "again").symlink_to(tmp_path)
    junk = {**json.loads((run / "config.json").read_text()), "settings": {"adam.steps": "KFAC("}}
    (tmp_path / "b/config.json").write_text(json.dumps(junk))
    table = results.gather([tmp_path, tmp_path / "a"])
    assert table.groupby("run")["step"].max().tolist() == [3, 3]
    assert len(table) == 8
    curves, draw = [], figures._draw_bundle

    def drawn(axis, bundle, *rest):
        curves.append(len(bundle))
        draw(axis, bundle, *rest)

    monkeypatch.setattr(figures, "_draw_bundle", drawn)
    arguments = [str(tmp_path), "--csv", str(tmp_path / "x"), "--figure", str(tmp_path / "f.png")]
    assert run_program(lambda: results.main(arguments)) == 0
    assert curves == [1, 1, 1, 1]  # of other settings, so no median


def test_a_password_on_the_command_line_is_not_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--storage", "postgresql://me:secret@host/db"])
    command = describe_environment(torch.device("cpu"))["command"]
    assert command[2] == "postgresql://me:***@host/db"


def test_nothing_in_a_results_folder_is_run(tmp_path, capsys):
    trap, run = tmp_path / "trap.py", tmp_path / "run"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    start(run, "--steps", "1", "--optimizers", "adam")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "problem": f"{trap}:pde"}))
    assert resume(run) == 2
    assert f"give --problem {trap}:pde again" in capsys.readouterr().err
    assert results.gather([run])["problem"].unique().tolist() == ["pde"]
    assert not (tmp_path / "sprung").exists()


@pytest.mark.usefixtures("_no_figure")
def test_a_budget_of_seconds_ends_the_run(tmp_path):
    assert start(tmp_path / "run", "--seconds", "0.05", "--optimizers", "adam") == 0
    assert column(tmp_path / "run", "adam", "seconds")[-1] >= 0.05


@pytest.mark.usefixtures("_no_figure")
def test_the_settings_of_a_run_can_be_fed_back(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    start(first, "--steps", "3", "--optimizers", "kfac", "--set", "kfac.momentum=0.3")
    assert program("--run-folder", str(second), "--config", str(first / "config.json")) == 0
    assert same(state(first, "kfac"), state(second, "kfac"))


def test_records_are_ever_sparser_or_regular():
    recorded = [step for step in range(1, 1025) if is_recorded(step, 0)]
    assert recorded[:40] == list(range(1, 41))
    assert len([step for step in recorded if 256 <= step < 512]) == 32
    assert [step for step in range(20) if is_recorded(step, 7)] == [0, 7, 14]


@pytest.mark.usefixtures("_no_figure")
def test_trackers_get_every_row(tmp_path, monkeypatch):
    seen = []

    class Tracker:
        def __init__(self, folder, settings):
            seen.append(settings["problem"])

        def log(self, training, step, numbers):
            seen.append((training, step, numbers["loss"] > 0))

        def close(self):
            seen.append("closed")

    monkeypatch.setitem(tracking.TRACKERS, "mine", Tracker)
    run = tmp_path / "run"
    assert start(run, "--steps", "2", "--optimizers", "adam", "--track", "mine") == 0
    rows = [("adam/seed1", step, True) for step in (1, 2)]
    assert seen == ["poisson2d", *rows, "closed"]


# --- faults ---------------------------------------------------------------------------------------


def script(*arguments, **options):
    """Start the script in a process of its own."""
    command = [
        sys.executable,
        "experiments/train.py",
        *TINY,
        "problem.n_boundary=6",
        *map(str, arguments),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), **options.pop("env", {})}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # which nohup would have the script ignore
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **options)


def test_a_reader_that_goes_away_does_not_end_the_run(tmp_path):
    run = tmp_path / "run"
    process = script(
        "--run-folder",
        run,
        "--steps",
        "30",
        "--optimizers",
        "adam",
        "sgd",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stderr.close()
    assert process.wait() == 0
    assert (state(run, "adam")["step"], state(run, "sgd")["step"]) == (30, 30)


@pytest.mark.parametrize("closed", [pytest.param({0, 1, 2}, marks=pytest.mark.slow), {2}])
def test_closed_streams_do_not_reach_the_files(closed, tmp_path):
    run = tmp_path / "run"
    redirections = " ".join(f"{stream}>&-" for stream in closed)
    command = [sys.executable, "experiments/train.py", *TINY, "--run-folder", str(run)]
    command += ["--steps", "2", "--optimizers", "adam"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        ["sh", "-c", f'"$@" {redirections}', "sh", *command],
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert done.returncode == 0
    assert column(run, "adam", "step") == [0, 1, 2]


def test_nohup_keeps_its_promise():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGHUP)
            assert not interruption.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_ends_with_a_checkpoint(tmp_path):
    run = tmp_path / "run"
    options = ["--steps", "1000000", "--checkpoint-steps", "3", "--optimizers", "adam", "sgd"]
    process = script("--run-folder", run, *options, stdout=subprocess.PIPE, env={"COLUMNS": "0"})
    while not (run / "adam/seed1/checkpoint.pt").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    printed = process.communicate()[0]
    assert process.returncode == 130
    assert f"--resume {run}" in printed
    assert rows(run, "adam")[-1]["step"] == str(state(run, "adam")["step"])


@pytest.mark.usefixtures("_no_figure")
@pytest.mark.parametrize("name", ["[red]x", "[/x]", "a b", "ü{0}%s"])
def test_odd_folder_names(name, tmp_path, capsys):
    run = tmp_path / name
    assert start(run, "--steps", "1", "--optimizers", "adam") == 0
    assert f"run folder: {run}\n" in capsys.readouterr().out
    assert resume(run, "--steps", "2") == 0


@pytest.mark.usefixtures("_no_figure")
def test_a_full_disk_loses_no_later_optimizer(tmp_path, monkeypatch, capsys):
    advance = Trainer.advance

    def fill(trainer):
        if trainer.label == "sgd" and trainer.step == 2:
            raise OSError(28, "No space left on device")
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", fill)
    run = tmp_path / "run"
    options = ["--steps", "4", "--checkpoint-steps", "1"]
    assert start(run, "--optimizers", "sgd", "adam", *options) == 1
    assert (
        f"sgd/seed1 stopped: cannot write to {run}/sgd/seed1 (No space left on device)"
        in capsys.readouterr().out
    )
    assert (state(run, "sgd")["step"], state(run, "adam")["step"]) == (2, 4)


@pytest.mark.usefixtures("_no_figure")
def test_a_folder_that_vanishes_loses_no_later_optimizer(tmp_path, monkeypatch, capsys):
    advance, run = Trainer.advance, tmp_path / "run"

    def vanish(trainer):
        if trainer.label == "sgd" and trainer.step == 2:
            shutil.rmtree(run)
        return advance(trainer)

    monkeypatch.setattr(Trainer, "advance", vanish)
    assert start(run, "--optimizers", "sgd", "adam", "--steps", "4", "--checkpoint-steps", "1") == 1
    assert "sgd/seed1 stopped: cannot write to" in capsys.readouterr().out
    assert state(run, "adam")["step"] == 4


@pytest.mark.usefixtures("_no_figure")
@pytest.mark.parametrize("content", ["null", "5", "{}", "[3]", "no json"])
def test_an_environment_that_is_no_list_is_begun_again(content, tmp_path):
    run = tmp_path / "run"
    start(run, "--steps", "1", "--optimizers", "adam")
    (run / "environment.json").write_text(content)
    assert resume(run, "--steps", "2") == 0
    assert results.gather([run])["step"].max() == 2


def test_an_unwritable_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert start(tmp_path / "file" / "run", "--steps", "1") == 2
    assert "Cannot create the run folder" in capsys.readouterr().err


def test_a_used_folder_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert start(tmp_path, "--steps", "1") == 2
    assert f"Continue that run with --resume {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_folder_of_a_run_killed_before_it_began_is_unused(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "config.json.partial").touch()
    RunFolder.create(tmp_path, "poisson2d").close()


@pytest.mark.usefixtures("_no_figure")
def test_a_folder_that_another_run_writes_to_is_refused(tmp_path, capsys):
    start(tmp_path / "run", "--steps", "1", "--optimizers", "adam")
    holder = RunFolder(tmp_path / "run")
    assert resume(tmp_path / "run") == 2
    assert "Another process is writing" in capsys.readouterr().err
    holder.close()


def test_ctrl_c_ends_with_a_checkpoint_and_a_hint(tmp_path, monkeypatch, capsys):
    advance = Trainer.advance

    def advance_and_press(trainer):
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


def test_a_diverging_run_stops_keeps_its_last_checkpoint_and_is_drawn(tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--steps", "30", "--checkpoint-steps", "1", "--set", "sgd.lr=1e30"]
    assert start(run, "--optimizers", "sgd", "adam", *options) == 1
    assert "sgd/seed1 stopped: " in capsys.readouterr().out
    assert all(weight.isfinite().all() for weight in state(run, "sgd")["model"].values())
    assert rows(run, "adam")[-1]["step"] == "30"
    assert (run / "figure.png").exists()


@pytest.mark.usefixtures("_no_figure")
@pytest.mark.parametrize("method", ["advance", "measure"])
def test_one_optimizer_out_of_memory_does_not_stop_the_others(
    method, tmp_path, monkeypatch, capsys
):
    working = getattr(Trainer, method)

    def fail(trainer, *arguments):
        if trainer.label == "sgd" and (method == "measure" or trainer.step == 2):
            raise RuntimeError("out of memory\ntrace of C++")
        return working(trainer, *arguments)

    monkeypatch.setattr(Trainer, method, fail)
    run = tmp_path / "run"
    assert start(run, "--optimizers", "sgd", "adam", "--steps", "3", "--checkpoint-steps", "1") == 1
    assert "sgd/seed1 stopped: RuntimeError: out of memory\n" in capsys.readouterr().out
    assert rows(run, "adam")[-1]["step"] == "3"


@pytest.mark.usefixtures("_no_figure")
def test_a_matrix_larger_than_the_memory_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "_ALWAYS", 0)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    assert start(tmp_path / "run", "--optimizers", "engd") == 1
    assert "engd/seed1 stopped: NotEnoughMemoryError: JᵀJ of 21 par" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_figure")
def test_a_chunk_size_that_is_picked_is_said(tmp_path, capsys):
    options = ["--optimizers", "sgd", "--steps", "1", "--chunk-size"]
    assert start(tmp_path / "run", *options, "auto") == 0
    assert "float64, all points at a time" in capsys.readouterr().out
    assert start(tmp_path / "other", *options, "some") == 2
    assert "--chunk-size" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_figure")
def test_trainings_that_differ_are_no_seeds_of_one_another(tmp_path):
    for name, lr, seed in (("a", "1e-3", "1"), ("b", "1e-3", "2"), ("c", "1e-2", "1")):
        options = [
            "--optimizers",
            "adam",
            "--seeds",
            seed,
            "--steps",
            "1",
            "--set",
            f"adam.lr={lr}",
        ]
        assert start(tmp_path / name, *options) == 0
    pair = results.curves_of(results.gather([tmp_path / "a", tmp_path / "b"]))
    assert pair["optimizer"].unique().tolist() == ["adam"]
    apart = results.curves_of(results.gather([tmp_path]))
    assert apart["optimizer"].unique().tolist() == ["a/adam", "b/adam", "c/adam"]


@pytest.mark.usefixtures("_no_figure")
def test_settings_of_the_quick_start_are_for_it_alone(tmp_path):
    assert start(tmp_path / "run", "--optimizers", "kfac_star", "--steps", "1") == 0
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert not any(key.startswith("kfac_star.") for key in settings)


@pytest.mark.usefixtures("_no_figure")
def test_points_that_are_exhausted_are_told_while_training_and_after(tmp_path, capsys):
    run = tmp_path / "run"
    few = ["problem.n_interior=3", "problem.n_boundary=2", "network.widths=(12,)"]
    start(run, "--steps", "60", "--optimizers", "gauss_newton", "--set", *few)
    out, err = capsys.readouterr()
    assert err.count("the network fits its points") == 1
    assert "gauss_newton seed 1, step" in err
    assert "warning: run/gauss_newton/seed1: The loss on points" in out
    (last,) = pd.read_csv(run / "summary.csv").itertuples()
    assert last.held_out_ratio == pytest.approx(last.held_out_loss / last.loss)
    assert last.held_out_ratio > 100
    arguments = [str(run), "--csv", str(tmp_path / "all.csv")]
    assert run_program(lambda: results.main(arguments)) == 0
    assert "more than 100 times" in capsys.readouterr().out


@pytest.mark.parametrize("shared", [training._EVALUATION, training._HELD_OUT])
def test_no_training_draws_the_points_that_it_is_judged_by(shared):
    """Generators on the CPU take the lower 32 bits of a seed alone."""
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(s)) for s in range(200)]
    judged = torch.rand(4, generator=torch.Generator().manual_seed(shared))
    assert not any(torch.equal(judged, drawn) for drawn in draws)
