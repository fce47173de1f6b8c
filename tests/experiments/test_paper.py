"""The paper's program: what it trains, goes on with and refuses, and what the store keeps."""

import argparse
import json
import os
import re
import resource
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from experiments import paper, smoke
from experiments.ablations import ABLATIONS, DEFAULT
from experiments.command import ExitCode, Interruption, run_program
from experiments.folder import RunFolder, read_json, write_json
from experiments.objects import UserError
from experiments.presets import PRESETS, ROWS
from experiments.reporting.published import ENDS
from experiments.results import run_folders
from experiments.store import KEY, Store, collect, origin, thinned
from tests.experiments.runs import column


def program(*arguments):
    return run_program(lambda: paper.main([str(argument) for argument in arguments]))


@pytest.mark.slow
def test_a_study_is_trained_kept_and_continued(tmp_path, capsys):
    common = ["poisson2d_257", "--runs", tmp_path / "runs", "--store", tmp_path / "store"]
    assert program(*common, "--optimizers", "kfac_star", "adam", "--seeds", 1, 2, "--steps", 3) == 0
    store = Store.read(tmp_path / "store")
    assert store.trainings["optimizer"].tolist() == ["adam"] * 2 + ["kfac_star"] * 2
    assert set(store.trainings["budget"]) == {"3 steps"}
    assert (store.trainings["memory_mb"] > 100).all()
    assert set(store.trainings["outcome"]) == {"finished"}
    folder = tmp_path / "runs/poisson2d_257/kfac_star"
    assert store.trainings["rmse"].iloc[-1] == pytest.approx(
        column(folder, "kfac_star", "rmse", 2)[-1], rel=1e-3
    )
    assert program(*common, "--optimizers", "kfac_star", "--seeds", 1, 2, "--steps", 5) == 0
    budgets = Store.read(tmp_path / "store").trainings.groupby("optimizer")["budget"].unique()
    assert sorted(budgets["kfac_star"]) == ["3 steps", "5 steps"]
    assert "2/2" in capsys.readouterr().out


def stored(**changes):
    row = {"study": "a", "optimizer": "b", "budget": "1 s", "seed": 1, "rmse": 0.5}
    row |= {"step": 2, "seconds": 1.5, "relative_error": 0.5, "ms_per_step": 750.5}
    row |= {"memory_mb": 300.5, "outcome": "finished", "commit": "1234e567", **changes}
    curve = [
        {**{k: row[k] for k in KEY}, "step": s, "seconds": s, "loss": 1.0, "rmse": 1.0 / (s + 1)}
        for s in range(3)
    ]
    return Store(pd.DataFrame([row]), pd.DataFrame(curve))


def test_newer_trainings_take_the_place_of_those_of_the_same_key(tmp_path):
    store = stored().merged(stored(seed=2)).merged(stored(rmse=0.25))
    assert store.trainings[["seed", "rmse"]].to_numpy().tolist() == [[1, 0.25], [2, 0.5]]
    assert len(store.curves) == 6
    store.write(tmp_path)
    again = Store.read(tmp_path)
    pd.testing.assert_frame_equal(again.trainings, store.trainings)
    again.merged(store).write(tmp_path / "once more")
    assert (tmp_path / "once more/curves.csv").read_text() == (tmp_path / "curves.csv").read_text()


def test_what_was_interrupted_takes_the_place_of_nothing_else():
    whole, cut = stored(), stored(rmse=0.9, outcome="interrupted")
    assert whole.merged(cut).trainings["rmse"].tolist() == [0.5]
    assert len(whole.merged(cut).curves) == 3
    assert cut.merged(whole).trainings["rmse"].tolist() == [0.5]
    assert cut.merged(stored(rmse=0.8, outcome="interrupted")).trainings["rmse"].tolist() == [0.8]
    assert len(whole.merged(stored(seed=2, outcome="interrupted")).trainings) == 2


def test_a_store_that_is_none_is_refused(tmp_path):
    (tmp_path / "trainings.csv").write_text("study,optimizer\n")
    with pytest.raises(UserError, match=r"must have the columns budget, .*rmse, seconds, seed"):
        Store.read(tmp_path)
    assert Store.read(tmp_path / "nothing").trainings.empty
    stored().write(tmp_path)
    lines = (tmp_path / "trainings.csv").read_text()
    (tmp_path / "trainings.csv").write_text(lines + lines.splitlines()[1] + "\n")
    with pytest.raises(UserError, match="every row once, got two of a, b, 1 s, 1"):
        Store.read(tmp_path)


def test_programs_add_to_a_store_beside_each_other(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: stored(seed=k).add_to(tmp_path), range(1, 9)))
    assert Store.read(tmp_path).trainings["seed"].tolist() == list(range(1, 9))


def test_a_curve_keeps_its_ends():
    rows = pd.DataFrame({"step": range(5000)})
    kept = thinned(rows)["step"].tolist()
    assert kept[0] == 0
    assert kept[-1] == 4999
    assert len(kept) <= 40
    assert thinned(rows[:2])["step"].tolist() == [0, 1]


def begun(job, ended="", **changes):
    """Have the run folder of a job, with what its seeds ended with."""
    experiment = PRESETS[job.study].checked()
    own = {
        k: v
        for k, v in experiment.settings.items()
        if k.partition(".")[0] in ("problem", "network", job.label)
    }
    optimizers = (f"{job.label}={experiment.labels[job.label]}",)
    budget = {"seconds": 1e6 if job.steps else job.seconds, "steps": job.steps, "seeds": job.seeds}
    changes = {"optimizers": optimizers, "settings": own, **budget, **changes}
    job.path.mkdir(parents=True, exist_ok=True)
    write_json(job.path / "config.json", asdict(replace(experiment, **changes)))
    (job.path / "summary.csv").write_text(f"seed,outcome\n{ended}")


def measured(job, seed, steps, rmse=0.5):
    """Have metrics of one seed of a job."""
    lines = [f"{s},{s},1.0,1.0,{rmse},1.0" for s in range(steps + 1)]
    folder = job.path / job.label / f"seed{seed}"
    folder.mkdir(parents=True)
    names = "step,seconds,loss,held_out_loss,rmse,relative_error"
    (folder / "metrics.csv").write_text("\n".join([names, *lines, ""]))


def test_what_a_job_runs(tmp_path):
    job = paper.Job("ablations", "reduce", tmp_path, (1, 2), 30.0, None)
    command = job.command()
    assert command[1:5] == ["--preset", "ablations", "--optimizers", "reduce=curvature_optimizer"]
    assert command[-7:] == ["--seconds", "30", "--seeds", "1", "2", "--threads", "1"]
    begun(job)
    assert job.command()[1:3] == ["--resume", str(job.path)]
    own = paper.Job("ablations", "unmerged", tmp_path, (1,), 30.0, 7)
    assert own.command()[4] == "unmerged=paper/channels.py:kfac_star_unmerged"
    assert "1000000" in own.command()
    assert "--compile" not in own.command()
    assert "--compile" in replace(own, compiled=True).command()


def test_what_is_done_is_not_begun_again(tmp_path, capsys):
    job = paper.Job("poisson2d_257", "adam", tmp_path, (1, 2), 60.0, 3)
    assert not job.is_done()
    begun(job, "1,finished\n2,interrupted\n")
    assert not job.is_done()
    begun(job, "1,finished\n2,not started\n")
    assert not job.is_done()
    begun(job, "1,finished\n2,MemoryError: too large\n")
    assert job.is_done()
    assert replace(job, seeds=(2,)).is_done()
    assert not replace(job, steps=4).is_done()
    assert not replace(job, seeds=(1, 2, 3)).is_done()
    options = ["--steps", "3", "--seeds", "1", "2", "--optimizers", "adam", "--runs", tmp_path]
    assert program("poisson2d_257", *options, "--store", tmp_path / "store") == 0
    assert "done before" in capsys.readouterr().out


def test_a_run_folder_is_no_other_training(tmp_path):
    job = paper.Job("poisson2d_257", "adam", tmp_path, (1,), 60.0, None)
    begun(job)
    job.check()
    replace(job, seconds=61.0).check()
    with pytest.raises(UserError, match=r"was trained for 60 seconds\. Ask for more"):
        replace(job, seconds=30.0).check()
    with pytest.raises(UserError, match="was trained for 60 seconds"):
        replace(job, steps=3).check()
    begun(replace(job, steps=3))
    with pytest.raises(UserError, match="was trained for 3 steps"):
        job.check()
    begun(job, settings={"adam.lr": "0.5"})
    with pytest.raises(UserError, match=r"settings\.adam\.lr was 0.5 and now is "):
        job.check()


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    job = paper.Job("poisson2d_257", "adam", tmp_path, (1,), 60.0, None)
    begun(job, "1,finished\n")
    assert job.is_done()
    folder = RunFolder(job.path)
    folder.begin(origin(job.path), torch.device("cpu"))
    folder.close()  # as if it was killed
    assert not job.is_done()
    measured(job, 1, steps=2)
    assert collect([job.path]).trainings["outcome"].tolist() == ["interrupted"]


def test_only_trainings_of_a_study_are_collected(tmp_path, capsys):
    job = paper.Job("poisson2d_257", "adam", tmp_path, (1, 2, 3), 60.0, None)
    begun(job, "1,finished\n2,not started\n")
    for seed in job.seeds:
        measured(job, seed, steps=12345 if seed == 1 else 5)
    mine = replace(job, label="sgd")
    begun(mine, settings={"sgd.lr": "0.5"})
    measured(mine, 1, steps=5)
    others = replace(job, label="lbfgs")
    begun(others, optimizers=("lbfgs", "adam"))
    (tmp_path / "gallery/heat").mkdir(parents=True)
    shutil.copy(job.path / "config.json", tmp_path / "gallery/heat")
    collect(run_folders([tmp_path])).write(tmp_path / "store")
    table = Store.read(tmp_path / "store").trainings
    assert table["optimizer"].tolist() == ["adam"] * 3
    assert table["step"].tolist() == [12345, 5, 5]
    assert table["outcome"].tolist() == ["finished", "interrupted", "interrupted"]
    told = capsys.readouterr().err
    assert re.search("left out: .*lbfgs/config.json must be of the one optimizer lbfgs", told)
    assert re.search("left out: .*sgd/config.json belongs to another run", told)
    assert re.search("left out: .*heat/config.json must be of .* heat of a preset gallery", told)


class Asked:
    requested = True


@pytest.mark.parametrize("system", ["linux", "darwin", "win32"])
def test_what_a_process_needed(system, tmp_path, monkeypatch):
    """Children are short; on Windows nothing is known of their memory."""
    job = paper.Job("poisson2d_257", "adam", tmp_path, (1,), 60.0, None)
    begun(job)
    monkeypatch.setattr(sys, "platform", system)
    if system == "win32":
        monkeypatch.delattr(os, "wait4")
    monkeypatch.setattr(paper.Job, "command", lambda _: ["-c", "raise SystemExit(3)"])
    assert job.run(Interruption()) == 3
    kept = read_json(job.path / "resources.json")
    if system == "win32":
        assert kept is None
        return
    unit = 1 if system == "linux" else 1024
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # which a child begins with
    assert 3 < kept["peak_memory_mb"] * unit < own + 1000
    write_json(job.path / "resources.json", {"peak_memory_mb": 5e6})
    assert job.run(Interruption()) == 3
    assert read_json(job.path / "resources.json") == {"peak_memory_mb": 5e6}
    monkeypatch.setattr(paper.Job, "command", lambda _: ["-c", "import time; time.sleep(9)"])
    assert job.run(Asked()) == 130


def test_published_steps():
    assert paper.published_steps("heat1d_257", "kfac_star") == 33985
    assert paper.published_steps("heat1d_257", "auto") is None


def test_published_numbers_of_steps_are_compiled(tmp_path):
    asked = {"studies": ["heat1d_257"], "optimizers": ["kfac_star"], "seeds": [1], "runs": tmp_path}
    options = argparse.Namespace(**asked, seconds=60.0, steps=None, published_steps=True)
    (job,) = paper.jobs(options)
    assert (job.steps, job.compiled) == (33985, True)
    options.steps, options.published_steps = 7, False
    (job,) = paper.jobs(options)
    assert (job.steps, job.compiled) == (7, False)


def test_smoke_runs_stop_when_one_is_interrupted(monkeypatch):
    codes = iter([ExitCode.FAILURE, ExitCode.INTERRUPTED])
    monkeypatch.setattr(smoke, "train", lambda options: next(codes))
    assert smoke.main(["quick", "ablations", "adaptive"]) == ExitCode.INTERRUPTED
    assert not list(codes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poisson2d_258"], "There is no study 'poisson2d_258'. Perhaps you meant poisson2d_257"),
        (["poisson2d_257", "--optimizers", "muon"], "must be some of kfac_star, .* got muon"),
        (["poisson2d_257", "--published-steps"], "published.csv has none of engd_w"),
        (["poisson2d_257", "--optimizers", "adam", "muon"], "must be some of .* got muon"),
        (["poisson2d_257", "--steps", "2", "--published-steps"], "two numbers of steps"),
        (["poisson2d_257", "--seeds", "1", "1"], "--seeds must be different numbers from 1 on"),
        (["poisson2d_257", "--steps", "0"], "--steps must be positive, got 0"),
        ([], "Name a study"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(arguments, message, tmp_path, capsys):
    assert program(*arguments, "--runs", tmp_path / "r", "--store", tmp_path / "s") == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "runs").mkdir()
    options = ["--collect", "--runs", tmp_path / "runs", "--store", tmp_path / "file"]
    assert program(*options) == 2
    assert re.search("cannot read or write .*file: File exists", capsys.readouterr().err)


def test_a_run_folder_without_results_is_left_out(tmp_path):
    folder = tmp_path / "study/label"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"problem": "poisson2d"}))
    assert collect([folder]).trainings.empty


def test_an_ablation_changes_what_it_says_and_nothing_else():
    for name, ablation in ABLATIONS.items():
        experiment = PRESETS[f"ablation_{name}"].checked()
        default = experiment.of(DEFAULT)
        for label, changes in ablation.variants.items():
            own = experiment.of(label)
            assert changes.items() <= own.items()
            if label not in ablation.optimizers:
                assert {k: v for k, v in own.items() if k not in changes} == {
                    k: v for k, v in default.items() if k not in changes
                }
    labels = [label for ablation in ABLATIONS.values() for label in ablation.variants]
    assert len(set(labels)) == len(labels)
    apart = set(ABLATIONS["pairs"].variants)  # on a network of its own
    assert list(PRESETS["ablations"].labels) == [DEFAULT, *(k for k in labels if k not in apart)]
    networks = {
        name: PRESETS[name].settings["network.widths"] for name in PRESETS if "abla" in name
    }
    assert networks.pop("ablation_pairs") == "(64,)"
    assert set(networks.values()) == {"(64, 64, 48, 48)"}


def test_every_row_has_every_optimizer_and_its_published_figures():
    published = pd.read_csv(ENDS)
    optimizers = set(PRESETS["poisson2d_257"].labels)
    assert len(optimizers) == 16
    assert set(published["row"]) <= set(PRESETS)
    for row in ROWS:
        assert set(PRESETS[row].labels) == optimizers
    assert set(published["optimizer"]) <= optimizers
