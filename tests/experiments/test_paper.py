"""The paper's program: what it trains, goes on with and refuses, and what the store keeps."""

import json
import re
from dataclasses import replace

import pandas as pd
import pytest

from experiments import paper
from experiments.ablations import ABLATIONS, DEFAULT
from experiments.command import run_program
from experiments.objects import UserError
from experiments.presets import PRESETS
from experiments.reporting.published import ENDS
from experiments.store import KEY, Store, collect, thinned
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
    row = {"study": "a", "optimizer": "b", "budget": "1 s", "seed": 1, "rmse": 0.5, **changes}
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


def test_a_store_that_is_none_is_refused(tmp_path):
    (tmp_path / "trainings.csv").write_text("study,optimizer\n")
    with pytest.raises(UserError, match="must have the columns budget, seed"):
        Store.read(tmp_path)
    assert Store.read(tmp_path / "nothing").trainings.empty


def test_a_curve_keeps_its_ends():
    rows = pd.DataFrame({"step": range(5000)})
    kept = thinned(rows)["step"].tolist()
    assert kept[0] == 0
    assert kept[-1] == 4999
    assert len(kept) <= 40
    assert thinned(rows[:2])["step"].tolist() == [0, 1]


def test_what_a_job_runs(tmp_path):
    job = paper.Job("ablations", "reduce", tmp_path, (1, 2), 30.0, None)
    command = job.command()
    assert command[1:5] == ["--preset", "ablations", "--optimizers", "reduce=curvature_optimizer"]
    assert command[-7:] == ["--seconds", "30", "--seeds", "1", "2", "--threads", "1"]
    job.path.mkdir(parents=True)
    (job.path / "config.json").write_text("{}")
    assert job.command()[1:3] == ["--resume", str(job.path)]
    own = paper.Job("ablations", "unmerged", tmp_path, (1,), 30.0, 7)
    assert own.command()[4] == "unmerged=paper/channels.py:kfac_star_unmerged"
    assert "1e+06" in own.command()


def test_what_is_done_is_not_begun_again(tmp_path, capsys):
    folder = tmp_path / "poisson2d_257/adam"
    folder.mkdir(parents=True)
    config = {"steps": 3, "seconds": 1e6, "seeds": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config))
    job = paper.Job("poisson2d_257", "adam", tmp_path, (1, 2), 60.0, 3)
    assert not job.is_done()
    (folder / "summary.csv").write_text("seed,outcome\n1,finished\n2,interrupted\n")
    assert not job.is_done()
    (folder / "summary.csv").write_text("seed,outcome\n1,finished\n2,MemoryError: too large\n")
    assert job.is_done()
    assert not replace(job, steps=4).is_done()
    assert not replace(job, seeds=(1, 2, 3)).is_done()
    options = ["--steps", "3", "--seeds", "1", "2", "--optimizers", "adam", "--runs", tmp_path]
    assert program("poisson2d_257", *options, "--store", tmp_path / "store") == 0
    assert "done before" in capsys.readouterr().out


def test_published_steps():
    assert paper.published_steps("heat1d_257", "kfac_star") == 33984
    assert paper.published_steps("heat1d_257", "auto") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["poisson2d_258"], "There is no study 'poisson2d_258'. Perhaps you meant poisson2d_257"),
        (["poisson2d_257", "--optimizers", "muon"], "must be some of kfac_star, .* got muon"),
        (["poisson2d_257", "--published-steps"], "published.csv has none of engd_w"),
        (["poisson2d_257", "--steps", "0"], "--steps must be positive, got 0"),
        ([], "Name a study"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(arguments, message, tmp_path, capsys):
    assert program(*arguments, "--runs", tmp_path / "r", "--store", tmp_path / "s") == 2
    assert re.search(message, capsys.readouterr().err)


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
    assert list(PRESETS["ablations"].labels) == [DEFAULT, *labels]


def test_every_row_has_every_optimizer_and_its_published_figures():
    published = pd.read_csv(ENDS)
    optimizers = set(PRESETS["poisson2d_257"].labels)
    assert len(optimizers) == 16
    assert set(published["row"]) <= set(PRESETS)
    for row in paper.ROWS:
        assert set(PRESETS[row].labels) == optimizers
    assert set(published["optimizer"]) <= optimizers
