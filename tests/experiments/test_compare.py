"""The comparison from the command line: what it measures, leaves behind, and refuses."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from experiments import compare
from experiments.command import run_program
from experiments.comparing import measure, pictures
from experiments.comparing.operators import OPERATORS, DampedBlocks, recipes
from experiments.experiment import Experiment
from experiments.training import Trainer
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    PreconditionedCG,
    reduce,
)
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer
from tests.experiments.runs import column, start

_SETTINGS = {
    **{"network.widths": "(4,)", "problem.n_interior": "12", "problem.n_boundary": "6"},
    **{"kfac_star.damping": "1.2e-10", "kfac_star.decay": "0.926"},
}
_TINY = [*("--threads", "1", "--seeds", "1", "--set"), *(f"{k}={v}" for k, v in _SETTINGS.items())]


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds that figures take."""
    monkeypatch.setattr(pictures, "draw", lambda *_: [])


def program(*arguments: str) -> int:
    return run_program(lambda: compare.main(arguments))


def compared(folder: Path, *arguments: str, code: int = 0) -> pd.DataFrame:
    """Compare into a folder, in this process, and return the table."""
    assert program("--run-folder", str(folder), *_TINY, *arguments) == code
    return pd.read_csv(folder / "table.csv", keep_default_na=False, na_values=[""])


def trainer_at(step: int) -> Trainer:
    """Return the training of the tests, after some steps."""
    experiment = Experiment(optimizers=("kfac_star",), settings=_SETTINGS).checked()
    trainer = Trainer(experiment, "kfac_star", 1, torch.device("cpu"))
    for _ in range(step):
        trainer.advance()
    return trainer


@pytest.mark.usefixtures("_no_figures")
def test_every_operator_is_measured(tmp_path: Path) -> None:
    dampings = ["--dampings", "1e-6", "1e-2"]
    table = compared(tmp_path / "run", "--steps", "2", "--operators", *OPERATORS, *dampings)
    assert list(table["operator"][::2]) == list(OPERATORS)
    assert table["note"].isna().all()
    assert table["decrease"].between(0, 1 + 1e-6).all()
    for row in table.itertuples():
        if isinstance(recipes([row.operator])[row.operator].template, PreconditionedCG):
            assert all(math.isnan(x) for x in (row.condition, row.cg_iterations, row.cosine))
        else:
            assert row.condition >= 1 - 1e-6
            assert row.cosine_se == row.error_se == 0 or row.operator == "nystroem"
    exact = table[table["operator"] == "exact"]
    assert exact[["decrease", "cosine", "step_cosine", "condition"]].to_numpy() == pytest.approx(1)
    blocks = table[table["operator"] == "exact_blocks"]
    assert (blocks["block_error"] < 1e-12).all()
    assert (blocks["error"] > 0.01).all()


def test_a_comparison_along_training_leaves_tables_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, names = tmp_path / "run", ["exact", "kfac_expand", "small=KFAC(sharing=reduce)", "cg_5"]
    options = ["--steps", "2", "0", "--operators", *names, "--dampings", "1e-6", "1e-2"]
    table = compared(run, *options, "--seeds", "3", "4", "--continued-steps", "1")
    labels = ["exact", "kfac_expand", "small", "cg_5"]
    keys = ["training", "step", "operator", "damping"]
    assert table[keys].to_numpy().tolist() == [
        [f"seed{seed}", step, name, damping]
        for seed in (3, 4)
        for step in (0, 2)
        for name in labels
        for damping in (1e-2, 1e-6)
    ]
    for name in ("spectra", "layers", "training", "damping", "overview", "pairs", "prediction"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(pd.read_csv(run / "spectra.csv")) == 4 * 3 * 17
    assert len(pd.read_csv(run / "layers.csv")) == 4 * 3 * 4
    assert {"commit", "device"} <= json.loads((run / "environment.json").read_text())[0].keys()
    printed = capsys.readouterr()
    assert all(name in printed.out and name in (run / "table.md").read_text() for name in labels)
    assert "seed4, step 2, cg_5" in printed.err


@pytest.mark.usefixtures("_no_figures")
def test_the_tables_say_what_dense_linear_algebra_says(tmp_path: Path) -> None:
    run, damping = tmp_path / "run", 1e-3
    names = ["--operators", "exact_diagonal", "kfac_expand", "--dampings", str(damping)]
    table = compared(run, "--steps", "0", "2", *names)
    pairs = pd.read_csv(run / "pairs.csv")
    for step in (0, 2):
        linearized = trainer_at(step).objective.linearize()
        G = GaussNewton()(linearized).matrix
        D, P = (recipe(linearized).to_dense() for recipe in (DiagonalGaussNewton(), KFAC()))
        g = torch.cat([part.flatten() for part in linearized.gradient()])
        eye = damping * torch.eye(len(g)).double()
        inverse, damped = torch.linalg.inv(P + eye), G + eye
        s, best, other = inverse @ g, torch.linalg.solve(damped, g), torch.linalg.solve(D + eye, g)
        values = torch.linalg.eigvals(inverse @ damped).real
        expected = {
            "loss": linearized.term_losses["interior"] + linearized.term_losses["boundary"],
            "cosine": (P * G).sum() / (P.norm() * G.norm()),
            "error": (P - G).norm() / G.norm(),
            "step_length": (g @ s) / (s @ damped @ s) * s.norm() / best.norm(),
            "step_cosine": torch.cosine_similarity(s, best, dim=0),
            "decrease": (g @ s) ** 2 / (s @ damped @ s) / (g @ best),
            "condition": values.max() / values.min(),
        }
        (row,) = table[(table["step"] == step) & (table["operator"] == "kfac_expand")].iloc
        for name, value in expected.items():
            assert row[name] == pytest.approx(float(value), rel=1e-5), name
        (pair,) = pairs[pairs["step"] == step].iloc
        assert (pair["first"], pair["second"]) == ("exact_diagonal", "kfac_expand")
        assert pair["cosine"] == pytest.approx(float((P * D).sum() / (P.norm() * D.norm())))
        assert pair["step_cosine"] == pytest.approx(float(torch.cosine_similarity(s, other, 0)))


@pytest.mark.usefixtures("_no_figures")
def test_without_matrices_estimates_agree_within_their_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["exact", "exact_diagonal", "kfac_expand", "ekfac", "subspace"]
    options = ["--steps", "2", "--dampings", "1e-2", "--operators", *names]
    estimated = ["--dense-limit", "1", "--probes", "12"]
    dense = compared(tmp_path / "dense", *options)
    blocks = compared(tmp_path / "blocks", *options, *estimated)
    monkeypatch.setattr(measure, "_BLOCK_LIMIT", 1)
    free = compared(tmp_path / "free", *options, *estimated)
    for name in ("cosine", "error", "block_cosine", "block_error"):
        assert ((free[name] - dense[name]).abs() <= 5 * free[f"{name}_se"] + 1e-6).all()
    assert (free["error_se"][1:4] > 0).all()
    assert (blocks["block_error_se"][2:4] == 0).all()
    assert blocks["block_error"][2:4].to_numpy() == pytest.approx(dense["block_error"][2:4])
    for name in ("decrease", "step_cosine"):
        assert free[name].to_numpy() == pytest.approx(dense[name].to_numpy(), rel=1e-4)
    assert free["condition_is_bound"][:4].all()
    assert (free["condition"] <= dense["condition"] * (1 + 1e-6)).all()
    text = (tmp_path / "free" / "table.md").read_text()
    assert f"{free['cosine'][2]:.3g} ± {free['cosine_se'][2]:.0e}" in text
    assert f"≥{free['condition'][2]:.3g}" in text
    assert "≥inf" not in text
    pairs = [
        pd.read_csv(tmp_path / name / "pairs.csv").set_index(["first", "second"])["cosine"]
        for name in ("dense", "free")
    ]
    assert pairs[1].to_numpy() == pytest.approx(pairs[0].to_numpy(), abs=0.05)


@pytest.mark.usefixtures("_no_figures")
def test_further_training_is_that_of_an_optimizer_and_leaves_the_point_alone(
    tmp_path: Path,
) -> None:
    damping, names = 1e-3, ["exact", "exact_diagonal", "kfac_expand", "identity"]
    options = ["--steps", "0", "2", "--operators", *names, "--dampings", str(damping)]
    plain = compared(tmp_path / "plain", *options)
    further = ["--continued-steps", "3", "--continued-rule", "ConstantDamping()"]
    table = compared(tmp_path / "further", *options, *further)
    same = [name for name in plain if not name.endswith("seconds") and name != "continued_loss"]
    pd.testing.assert_frame_equal(plain[same], table[same])
    for step in (0, 2):
        objective = trainer_at(step).objective
        optimizer = CurvatureOptimizer(objective.parameters(), KFAC(), Damped(damping))
        loss = [optimizer.step(objective).new_loss for _ in range(3)][-1]
        (row,) = table[(table["step"] == step) & (table["operator"] == "kfac_expand")].iloc
        assert row["continued_loss"] == pytest.approx(loss, rel=1e-6)
    found = pd.read_csv(tmp_path / "further" / "predictors.csv")
    assert (found["operators"] == 4).all()
    for row in found.itertuples():
        here = table[table["step"] == row.step]
        ranks = here[[row.measure, "continued_loss"]].rank().to_numpy()
        ranks = ranks - ranks.mean(0)
        correlation = (ranks[:, 0] @ ranks[:, 1]) / math.prod((ranks**2).sum(0)) ** 0.5
        sign = -1 if row.measure in ("decrease", "step_cosine", "cosine", "block_cosine") else 1
        assert row.correlation == pytest.approx(sign * correlation), row.measure
    assert "What predicts" in (tmp_path / "further" / "table.md").read_text()


_OWN = """
from dataclasses import dataclass, replace

from torch import nn

from pinncurv import presets, problems
from pinncurv.curvature import DiagonalGaussNewton
from pinncurv.linops import Damped, FactorizationError


def pde(n: int = 12):
    return replace(problems.poisson2d(n_interior=n, n_boundary=6), solution=None)


def net(d_in, d_out):
    return nn.Sequential(nn.Linear(d_in, 4), nn.Tanh(), nn.Linear(4, d_out))


def optimizer(params):
    return presets.kfac(params)


def diagonal(linearizations):
    return DiagonalGaussNewton()(linearizations)


def refuse(linearizations):
    raise MemoryError("too large")


@dataclass(frozen=True)
class Singular:
    damping: float

    def __call__(self, operator):
        if self.damping < 1e-3:
            raise FactorizationError("the matrix is singular\\nin detail")
        return Damped(self.damping)(operator)


pair = (diagonal, Singular(1.0))
"""


@pytest.mark.usefixtures("_no_figures")
def test_own_operators_are_compared_and_what_fails_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.py"
    own.write_text(_OWN)
    names = [f"{own}:refuse", f"{own}:diagonal", f"again={own}:pair", "exact_diagonal", "kfac_star"]
    options = ["--steps", "0", "--dampings", "1e-2", "1e-5", "--operators", *names]
    table = compared(tmp_path / "run", *options, "--continued-steps", "1", code=1)
    rows = {(row.operator, row.damping): row for row in table.itertuples()}
    assert rows["refuse", 1e-2].note == rows["refuse", 1e-5].note == "MemoryError: too large"
    assert "refuse: MemoryError: too large" in capsys.readouterr().out
    assert rows["again", 1e-5].note == "FactorizationError: the matrix is singular"
    assert math.isnan(rows["again", 1e-5].decrease)
    for label, damping in (("diagonal", 1e-2), ("diagonal", 1e-5), ("again", 1e-2)):
        mine, theirs = rows[label, damping], rows["exact_diagonal", damping]
        for name in ("cosine", "decrease", "condition", "continued_loss"):
            assert getattr(mine, name) == pytest.approx(getattr(theirs, name)), name
    assert rows["kfac_star", 1e-2].decrease > 0  # with the inverse of the preset


@pytest.mark.usefixtures("_no_figures")
def test_own_problem_network_and_optimizer_train(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(_OWN)
    options = ["--problem", f"{own}:pde", "--network", f"{own}:net", "--set", "pde.n=10"]
    options += ["--optimizers", f"{own}:optimizer", "--steps", "1", "--operators", "cg_5"]
    run = ["--run-folder", str(tmp_path / "run"), "--threads", "1", "--dampings", "1e-3"]
    assert program(*options, *run) == 0
    table = pd.read_csv(tmp_path / "run" / "table.csv")
    assert list(table["training"]) == ["seed1", "seed2", "seed3"]
    assert table["rmse"].isna().all()


@pytest.mark.slow
def test_pictures_need_no_matrix(tmp_path: Path) -> None:
    compared(tmp_path / "run", "--steps", "0", "--operators", "cg_5", "--continued-steps", "1")
    assert (tmp_path / "run" / "prediction.png").is_file()
    assert not (tmp_path / "run" / "layers.png").exists()


@pytest.mark.usefixtures("_no_figures")
def test_a_further_training_that_fails_is_the_last_in_the_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = measure.Point._continued_loss

    def fail(point: measure.Point, recipe: Any, damping: float) -> float:
        if isinstance(recipe.curvature, DiagonalGaussNewton):
            raise RuntimeError("diverged")
        return original(point, recipe, damping)

    monkeypatch.setattr(measure.Point, "_continued_loss", fail)
    names = ["exact", "exact_diagonal", "kfac_expand", "identity"]
    options = ["--steps", "0", "--dampings", "1e-3", "--operators", *names]
    table = compared(tmp_path / "run", *options, "--continued-steps", "2", code=1)
    assert table["continued_loss"][1] == math.inf
    assert "diverged" in table["note"][1]
    assert table["decrease"].notna().all()
    assert (pd.read_csv(tmp_path / "run" / "predictors.csv")["operators"] == 4).all()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("KFAC(reduce)", ("KFAC(reduce)", KFAC(reduce), DampedBlocks(0.5))),
        ("kfac-merged", ("kfac_merged", KFAC(merge_terms=True), DampedBlocks(0.5))),
        ("a=(KFAC(), Damped(3.0))", ("a", KFAC(), Damped(0.5))),
        ("engd_diagonal", ("engd_diagonal", DiagonalGaussNewton(), Damped(0.5))),
        ("b=KFAC(sharing=reduce)", ("b", KFAC(reduce), DampedBlocks(0.5))),
    ],
)
def test_names_and_expressions_become_recipes(text: str, expected: tuple[str, Any, Any]) -> None:
    ((label, recipe),) = recipes([text]).items()
    assert (label, recipe.curvature, recipe.inverse(0.5)) == expected


def test_large_blocks_are_inverted_by_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    linearized = trainer_at(0).objective.linearize()
    monkeypatch.setattr("experiments.comparing.operators._OWN_INVERSE", 1)
    for recipe in (BlockDiagonalGaussNewton(), KFAC(), KFAC(merge_terms=True)):
        operator = recipe(linearized)
        expected = torch.linalg.inv(operator.to_dense() + 0.1 * torch.eye(17).double())
        torch.testing.assert_close(DampedBlocks(0.1)(operator).to_dense(), expected)


@pytest.mark.filterwarnings("ignore::pinncurv.linops.DampingBelowResolution")
@pytest.mark.usefixtures("_no_figure", "_no_figures")
def test_checkpoints_of_a_run_are_compared_where_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained, other = tmp_path / "trained", tmp_path / "other"
    options = [
        "--steps",
        "5",
        "--checkpoint-steps",
        "3",
        "--record-every",
        "1",
        "--seeds",
        "1",
        "2",
    ]
    start(trained, *options, "--optimizers", "adam", "last=gauss_newton", "--dtype", "float32")
    common = ["--runs", str(trained), "--threads", "1", "--operators", "exact", "kfac_reduce"]
    common += ["--dampings", "1e-3"]
    for label, chosen in (("adam", []), ("last", ["--optimizers", "last"])):
        run = tmp_path / label
        assert program("--run-folder", str(run), *common, *chosen) == 0
        table = pd.read_csv(run / "table.csv")
        assert list(table["step"][::2]) == 2 * [0, 3, 5]
        for seed, rows in ((1, table[:6]), (2, table[6:])):
            assert (rows["training"] == str(trained / label / f"seed{seed}")).all()
            for name in ("loss", "rmse"):
                metrics = column(trained, label, name, seed)
                expected = [metrics[step] for step in rows["step"]]
                assert rows[name].to_numpy() == pytest.approx(expected, rel=1e-5)
    again = ["--config", str(tmp_path / "last" / "config.json")]
    assert program("--run-folder", str(tmp_path / "again"), *again) == 0
    assert list(pd.read_csv(tmp_path / "again" / "table.csv")["loss"]) == list(table["loss"])

    start(other, "--steps", "1", "--optimizers", "sgd", "--set", "network.widths=(3,)")
    for arguments, message in (
        ([str(trained), str(other)], "--runs must be of one problem and network"),
        ([str(trained), "--optimizers", "sgd"], "no checkpoint of sgd. It has some of: adam, last"),
        ([str(trained), "--dtype", "float64"], "dtype was float32 and now is float64"),
        ([str(trained), "--steps", "3"], "--steps has no effect with --runs"),
        ([str(tmp_path / "nothing")], "--runs: cannot read"),
    ):
        capsys.readouterr()
        assert program("--runs", *arguments, "--run-folder", str(tmp_path / "refused")) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()


@pytest.mark.usefixtures("_no_figures")
def test_the_settings_of_a_comparison_can_be_fed_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--operators", "kfac_merged", "a=KFAC(reduce)", "--optimizers", "kfac_star=kfac"]
    first = compared(
        tmp_path / "a", "--steps", "0", "1", *options, "--set", "kfac_star.heuristic=trace_norm"
    )
    again = ["--config", str(tmp_path / "a" / "config.json"), "--run-folder", str(tmp_path / "b")]
    assert program(*again) == 0
    second = pd.read_csv(tmp_path / "b" / "table.csv", keep_default_na=False, na_values=[""])
    columns = [name for name in first if not name.endswith("seconds")]
    pd.testing.assert_frame_equal(first[columns], second[columns])
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config == json.loads((tmp_path / "b" / "config.json").read_text())
    for change, message in (
        ({"operators": ["mine.py:own"]}, "No code is run because a run folder names it"),
        ({"dampings": ["a"]}, "dampings cannot be ('a',)"),
        ({"damping": 1.0}, "must have the settings of a comparison, got ['damping']"),
    ):
        changed = tmp_path / "changed.json"
        changed.write_text(json.dumps({**config, **change}))
        assert program("--config", str(changed), "--run-folder", str(tmp_path / "c")) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dampings", "1e-3", "0"], "--dampings must be finite numbers > 0, got (0.001, 0.0)"),
        (["--dampings", "nan"], "--dampings must be finite numbers > 0"),
        (["--steps", "-1"], "--steps must be 0 or more"),
        (["--steps", "3", "3"], "--steps must be one or more, different"),
        (["--probes", "1"], "--probes must be at least 2"),
        (["--dense-limit", "0"], "--dense-limit must be positive"),
        (["--continued-rule", "Damped(1.0)"], "--continued-rule must be a rule such as"),
        (["--operators", "kfac_expnd"], "Perhaps you meant kfac_expand"),
        (["--operators", "KFCA()"], "Perhaps you meant KFAC"),
        (["--operators", "KFAC(sharin=reduce)"], "unexpected keyword argument 'sharin'"),
        (["--operators", "exact", "exact=KFAC()"], "--operators must be different, got exact"),
        (["--operators", "a=(KFAC(), 3)"], "must be a function of linearizations, such as KFAC()"),
        (["--operators", "nowhere.py:mine"], "There is no file"),
        (["--optimizers", "adam", "kfac"], "--optimizers must be one, which trains"),
        (["--set", "kfac.damping=1"], "--set kfac.damping has no effect"),
        (["--dense-limt", "3"], "Perhaps you meant --dense-limit"),
        (["--config", "nowhere"], "--config: cannot read nowhere"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program("--run-folder", str(tmp_path / "run"), *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("_no_figures")
def test_a_diverging_training_keeps_its_first_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--optimizers", "sgd", "--set", "sgd.lr=1e200", "network.widths=(4,)"]
    arguments = [*options, "--threads", "1", "--seeds", "1", "--operators", "identity"]
    assert program("--run-folder", str(tmp_path / "run"), *arguments) == 1
    assert set(pd.read_csv(tmp_path / "run" / "table.csv")["step"]) == {0}
    assert "seed1 stopped: " in capsys.readouterr().out


@pytest.mark.usefixtures("_no_figures")
def test_an_interruption_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = measure.Point.measure

    def interrupted(point: measure.Point, label: str, recipe: Any) -> None:
        original(point, label, recipe)
        if point._where["step"] == 2 and label == "exact":
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(measure.Point, "measure", interrupted)
    options = ["--steps", "0", "2", "9", "--dampings", "1e-3", "--operators", "exact", "identity"]
    table = compared(tmp_path / "run", *options, code=130)
    assert [*zip(table["step"], table["operator"], strict=True)] == [
        *((0, "exact"), (0, "identity"), (2, "exact"))
    ]
