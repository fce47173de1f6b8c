"""The comparison from the command line: what it measures, leaves behind, and refuses."""

import copy
import csv
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from experiments.training.metrics import read_metrics
from scipy.stats import rankdata

from experiments.comparing import figures, main as comparing_main, measure
from experiments.comparing.command_line import parse
from experiments.comparing.main import main
from experiments.comparing.operators import OPERATORS, DampedBlocks, Entry
from experiments.comparing.panels import Range
from experiments.comparing.points import OwnTraining, Point
from experiments.comparing.settings import Settings
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    Objective,
)
from pinncurv.linops import Damped, FactorizationError
from pinncurv.optim import CurvatureOptimizer
from tests.experiments.runs import start

_NETWORK = ["--n-interior", "12", "--n-boundary", "6", "--hidden", "4"]
_ONCE = ["--threads", "1", "--repeats", "1"]
# More than fit into a row of the maps; one of each kind, but for those that are no matrix.
_KINDS = ["exact", "exact-blocks", "exact-diagonal", "kfac-expand", "ekfac", "subspace", "identity"]
_TINY = [*_NETWORK, *_ONCE, "--seeds", "1", "--steps", "0", "2"]

Rows = list[dict[str, str]]


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save the seconds that figures take."""
    monkeypatch.setattr(figures, "draw", lambda *_: [])


def compare(folder: Path, *arguments: str) -> int:
    """Compare into a folder, in this process."""
    return main(["--run-folder", str(folder), *arguments])


def read(folder: Path) -> Rows:
    with (folder / "table.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows: Rows) -> Rows:
    return [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in rows]


@pytest.mark.usefixtures("_no_figures")
def test_every_operator_is_measured(tmp_path: Path) -> None:
    options = ["--operators", *OPERATORS, "--seeds", "3", "--dampings", "1e-6", "1e-2"]
    assert compare(tmp_path / "run", *_NETWORK, *_ONCE, "--steps", "2", *options) == 0
    rows = read(tmp_path / "run")
    assert [row["operator"] for row in rows[::2]] == list(OPERATORS)
    for row in rows:
        share = float(row["decrease"])
        assert 0 <= share <= 1 + 1e-6, row
        if OPERATORS[row["operator"]].is_matrix:
            assert float(row["condition"]) >= 1 - 1e-6
        else:
            assert row["condition"] == row["cg_iterations"] == ""
        exactly = "0.0" if OPERATORS[row["operator"]].is_matrix else ""
        assert all(row[f"{name}_se"] == exactly for name in ("cosine", "error", "block_cosine"))
        assert not row["note"]
        if row["operator"] == "exact":
            assert share == pytest.approx(1)
            assert float(row["cosine"]) == pytest.approx(1)
            assert float(row["step_cosine"]) == pytest.approx(1)
            assert float(row["condition"]) == pytest.approx(1, rel=1e-4)
            assert row["cg_converged"] == "True"
        if row["operator"] == "exact-blocks":
            assert float(row["block_error"]) < 1e-12 < 0.01 < float(row["error"])


def test_a_comparison_along_training_leaves_table_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, names = tmp_path / "run", [*_KINDS, "cg-5"]
    options = ["--operators", *names, "--seeds", "3", "4", "--dampings", "1e-6", "1e-2"]
    assert compare(run, *_NETWORK, *_ONCE, "--steps", "2", "0", *options) == 0
    assert [(r["training"], r["step"], r["operator"], r["damping"]) for r in read(run)] == [
        (f"seed {seed}", str(step), name, damping)
        for seed in (3, 4)
        for step in (0, 2)
        for name in names
        for damping in ("0.01", "1e-06")
    ]
    assert {"config.json", "environment.json", "table.md", "spectra.csv", "layers.csv"} <= {
        path.name for path in run.iterdir()
    }
    for name in ("spectra", "layers", "training", "damping", "overview", "pairs"):
        assert (run / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len((run / "spectra.csv").read_text().splitlines()) == 1 + 4 * len(_KINDS) * 17
    environment = json.loads((run / "environment.json").read_text())[0]
    assert {"commit", "device", "packages", "started"} <= environment.keys()
    printed = capsys.readouterr()
    assert all(name in printed.out for name in names)
    assert "seed 3" in printed.err


@pytest.mark.usefixtures("_no_figures")
def test_the_table_says_what_dense_linear_algebra_says(tmp_path: Path) -> None:
    run, damping = tmp_path / "run", 1e-3
    options = ["--operators", "kfac-expand", "--dampings", str(damping)]
    assert compare(run, *_TINY, *options) == 0
    settings = Settings(n_interior=12, n_boundary=6, hidden=(4,), steps=(0, 2)).resolved()
    for row, point in zip(
        read(run), OwnTraining(1, settings, torch.device("cpu")).points(), strict=True
    ):
        linearized = point.trainer.objective.linearize()
        G = GaussNewton()(linearized.linearizations).matrix
        P = KFAC()(linearized.linearizations).to_dense()
        g = torch.cat([part.flatten() for part in linearized.gradient()])
        eye = torch.eye(len(g)).double()
        damped, inverse = G + damping * eye, torch.linalg.inv(P + damping * eye)
        step, best = inverse @ g, torch.linalg.solve(damped, g)
        values = torch.linalg.eigvals(inverse @ damped).real
        expected = {
            "loss": point.trainer.objective.loss().detach(),
            "cosine": (P * G).sum() / (P.norm() * G.norm()),
            "error": (P - G).norm() / G.norm(),
            "step_length": (g @ step) / (step @ damped @ step) * step.norm() / best.norm(),
            "step_cosine": torch.cosine_similarity(step, best, dim=0),
            "decrease": (g @ step) ** 2 / (step @ damped @ step) / (g @ best),
            "condition": values.max() / values.min(),
        }
        for name, value in expected.items():
            assert float(row[name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.usefixtures("_no_figures")
@pytest.mark.parametrize("free", [[], ["--dense-limit", "1", "--probes", "64"]])
def test_every_two_approximations_are_compared(tmp_path: Path, free: list[str]) -> None:
    run, damping = tmp_path / "run", 1e-3
    names = ["exact", "kfac-expand", "exact-diagonal", "cg-5"]
    options = ["--operators", *names, "--dampings", str(damping), *free]
    assert compare(run, *_NETWORK, *_ONCE, "--seeds", "1", "--steps", "0", *options) == 0
    with (run / "pairs.csv").open(newline="") as file:
        rows = {(row["first"], row["second"]): row for row in csv.DictReader(file)}
    assert list(rows) == [(a, b) for j, b in enumerate(names) for a in names[:j]]
    settings = Settings(n_interior=12, n_boundary=6, hidden=(4,), steps=(0,)).resolved()
    (point,) = OwnTraining(1, settings, torch.device("cpu")).points()
    linearized = point.trainer.objective.linearize()
    P, Q = (
        recipe(linearized.linearizations).to_dense() for recipe in (KFAC(), DiagonalGaussNewton())
    )
    g = torch.cat([part.flatten() for part in linearized.gradient()])
    eye = damping * torch.eye(len(g)).double()
    row = rows["kfac-expand", "exact-diagonal"]
    steps = [torch.linalg.solve(matrix + eye, g) for matrix in (P, Q)]
    cosine = torch.cosine_similarity(*steps, dim=0)
    assert float(row["step_cosine"]) == pytest.approx(float(cosine))
    assert float(row["cosine"]) == pytest.approx(float((P * Q).sum() / (P.norm() * Q.norm())))
    assert rows["exact", "cg-5"]["cosine"] == ""
    for other in names[1:3]:
        whole = next(r for r in read(run) if r["operator"] == other)
        assert float(rows["exact", other]["cosine"]) == pytest.approx(
            float(whole["cosine"]), abs=5 * float(whole["cosine_se"]) + 1e-9
        )


@pytest.mark.usefixtures("_no_figures")
def test_further_training_is_that_of_an_optimizer_and_leaves_the_point_alone(
    tmp_path: Path,
) -> None:
    damping, names = 1e-3, ["exact", "exact-diagonal", "kfac-expand", "identity"]
    options = [*_TINY, "--operators", *names, "--dampings", str(damping)]
    assert compare(tmp_path / "plain", *options) == 0
    further = ["--continued-steps", "3", "--continued-rule", "constant"]
    assert compare(tmp_path / "further", *options, *further) == 0
    rows = read(tmp_path / "further")
    for plain, row in zip(read(tmp_path / "plain"), rows, strict=True):
        assert plain.pop("continued_loss") == ""
        assert without_times([plain])[0].items() <= row.items()
    settings = Settings(n_interior=12, n_boundary=6, hidden=(4,), steps=(0, 2)).resolved()
    for point in OwnTraining(1, settings, torch.device("cpu")).points():
        objective = copy.deepcopy(point.trainer.objective)
        optimizer = CurvatureOptimizer(objective.model.parameters(), KFAC(), Damped(damping))
        loss = [optimizer.step(objective).new_loss for _ in range(3)][-1]
        (row,) = [r for r in rows if (r["operator"], r["step"]) == ("kfac-expand", str(point.step))]
        assert float(row["continued_loss"]) == pytest.approx(loss, rel=1e-6)
    with (tmp_path / "further" / "predictors.csv").open(newline="") as file:
        found = {(r["step"], r["measure"]): r for r in csv.DictReader(file)}
    better_if_larger = {"decrease", "step_cosine", "cosine", "block_cosine"}
    better_if_smaller = {"condition", "cg_iterations", "error", "block_error"}
    assert {name for _, name in found} == better_if_larger | better_if_smaller
    for (step, name), row in found.items():
        here = [row for row in rows if row["step"] == step]
        pair = (name, "continued_loss")
        ranks = [rankdata([float(r[column]) for r in here]) for column in pair]
        sign = -1 if name in better_if_larger else 1
        expected = sign * np.corrcoef(ranks)[0, 1]
        assert float(row["correlation"]) == pytest.approx(expected), name
        assert row["operators"] == "4"


@pytest.mark.usefixtures("_no_figures")
def test_an_approximation_that_fails_further_on_is_the_last_in_the_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = measure.continued_loss

    def fail(objective: Objective, entry: Entry, *rest: Any) -> float:
        if entry is OPERATORS["exact"]:
            raise RuntimeError("diverged")
        return original(objective, entry, *rest)

    names = ["exact", "exact-diagonal", "kfac-expand", "identity"]
    options = [*_NETWORK, *_ONCE, "--seeds", "1", "--steps", "0", "--dampings", "1e-3"]
    options += ["--operators", *names, "--continued-steps", "2", "--pairs", "False"]
    monkeypatch.setattr(measure, "continued_loss", fail)
    assert compare(tmp_path / "run", *options) == 0
    rows = read(tmp_path / "run")
    assert rows[0]["continued_loss"] == "inf"
    assert "further training failed: diverged" in rows[0]["note"]
    with (tmp_path / "run" / "predictors.csv").open(newline="") as file:
        assert {row["operators"] for row in csv.DictReader(file)} == {"4"}
    assert not (tmp_path / "run" / "pairs.csv").read_text().strip()


@pytest.mark.usefixtures("_no_figures")
def test_a_pair_that_cannot_be_compared_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> float:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(measure, "cosine", fail)
    options = [*_NETWORK, *_ONCE, "--seeds", "1", "--steps", "0", "--dampings", "1e-3"]
    assert compare(tmp_path / "run", *options, "--operators", "exact", "identity") == 0
    row = read(tmp_path / "run")[1]
    assert row["note"] == "cosine with exact failed: not enough memory"
    assert all(row[name] for name in ("decrease", "condition", "cosine"))


@pytest.mark.usefixtures("_no_figures")
def test_without_matrices_estimates_agree_within_their_errors(tmp_path: Path) -> None:
    names = ["exact", "exact-diagonal", "kfac-expand", "ekfac", "subspace"]
    options = [*_TINY, "--steps", "2", "--dampings", "1e-2", "--operators", *names]
    assert compare(tmp_path / "dense", *options) == 0
    free = ["--dense-limit", "1", "--probes", "12"]
    assert compare(tmp_path / "free", *options, *free, "--block-limit", "1") == 0
    assert compare(tmp_path / "blocks", *options, *free) == 0
    for dense, free, blocks in zip(
        *(read(tmp_path / name) for name in ("dense", "free", "blocks")), strict=True
    ):
        for name in ("cosine", "error", "block_cosine", "block_error"):
            bound = 5 * float(free[f"{name}_se"]) + 1e-6
            assert abs(float(free[name]) - float(dense[name])) <= bound, (name, dense["operator"])
        if dense["operator"] in ("kfac-expand", "ekfac"):
            assert float(blocks["block_error_se"]) == 0
            assert float(blocks["block_error"]) == pytest.approx(float(dense["block_error"]))
            assert float(free["error_se"]) > 0
        for name in ("decrease", "step_cosine"):
            assert float(free[name]) == pytest.approx(float(dense[name]), rel=1e-4)
        assert free["condition_is_bound"] == str(dense["operator"] != "subspace")
        assert float(free["condition"]) <= float(dense["condition"]) * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("names", [["exact"], ["cg-5"], ["cg-5", "cg-5-kfac"]])
def test_pictures_need_no_two_matrices(tmp_path: Path, names: list[str]) -> None:
    options = ["--operators", *names, "--dampings", "1e-3", "--continued-steps", "1"]
    assert compare(tmp_path / "run", *_TINY, *options) == 0
    assert (tmp_path / "run" / "prediction.png").read_bytes().startswith(b"\x89PNG")


def test_large_blocks_are_inverted_by_factorization(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(n_interior=12, n_boundary=6, hidden=(4,), steps=(0,)).resolved()
    (point,) = OwnTraining(1, settings, torch.device("cpu")).points()
    linearizations = point.trainer.objective.linearize().linearizations
    monkeypatch.setattr("experiments.comparing.operators._OWN_INVERSE", 1)
    for recipe in (BlockDiagonalGaussNewton(), KFAC(), KFAC(merge_terms=True)):
        operator = recipe(linearizations)
        expected = torch.linalg.inv(operator.to_dense() + 0.1 * torch.eye(17).double())
        torch.testing.assert_close(DampedBlocks(0.1)(operator).to_dense(), expected)


@pytest.mark.filterwarnings("ignore::pinncurv.linops.DampingBelowResolution")
@pytest.mark.usefixtures("_no_figure", "_no_figures")
def test_checkpoints_of_a_run_are_compared_where_they_are(tmp_path: Path) -> None:
    trained, run = tmp_path / "trained", tmp_path / "run"
    options = ["--steps", "5", "--checkpoint-steps", "3", "--record-every", "1"]
    start(trained, *options, "--optimizers", "adam", "gauss-newton", "--dtype", "float32")
    common = ["--runs", str(trained), *_ONCE, "--operators", "exact", "kfac-reduce"]
    for optimizer in ("adam", "gauss-newton"):
        chosen = [] if optimizer == "adam" else ["--optimizer", optimizer]
        assert compare(run / optimizer, *common, "--dampings", "1e-3", *chosen) == 0
        metrics = read_metrics(trained / optimizer)
        rows = read(run / optimizer)
        assert [row["step"] for row in rows[::2]] == ["0", "3", "5"]
        for row in rows:
            assert row["training"] == str(trained)
            loss, rmse = (metrics[name][int(row["step"])] for name in ("loss", "rmse"))
            assert float(row["loss"]) == pytest.approx(loss, rel=1e-6)
            assert float(row["rmse"]) == pytest.approx(rmse, rel=1e-6)


@pytest.mark.usefixtures("_no_figures")
def test_the_settings_of_a_comparison_can_be_fed_back(tmp_path: Path) -> None:
    options = ["--operators", "kfac-merged", "identity", "--optimizer", "kfac"]
    assert compare(tmp_path / "a", *_TINY, *options, "--kfac.damping", "1e-4") == 0
    assert compare(tmp_path / "b", "--config", str(tmp_path / "a" / "config.json")) == 0
    assert without_times(read(tmp_path / "a")) == without_times(read(tmp_path / "b"))
    assert (tmp_path / "a/config.json").read_text() == (tmp_path / "b/config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dampings", "1e-3", "0"], "--dampings must be finite numbers > 0, got 0.0"),
        (["--dampings", "nan"], "--dampings must be finite numbers > 0, got nan"),
        (["--steps", "-1"], "--steps must be 0 or more"),
        (["--steps", "3", "3"], "--steps must be one or more different values"),
        (["--operators"], "--operators must be one or more different values"),
        (["--probes", "1"], "--probes must be at least 2"),
        (["--dense-limit", "0"], "--dense-limit must be at least 1"),
        (["--hidden", "0"], "--hidden must be positive widths"),
        (["--kfac.damping", "1"], "--kfac has no effect for the optimizer kfac-star"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--runs", "nowhere"], "--runs: nowhere has no config.json"),
        (["--runs", "nowhere", "./nowhere"], "--runs must be different folders"),
        (["--continued-rule", "constant"], "has no effect without --continued-steps"),
        (["--continued-steps", "-1"], "--continued-steps must be 0 or more"),
        (["--runs", "nowhere", "--steps", "1"], "--steps has no effect with --runs"),
        (["--runs", "nowhere", "--problem", "heat1d"], "--problem has no effect with --runs"),
        (["--config", "nowhere"], "--config: cannot read nowhere"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path / "run", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--operators", "exact", "kfac-expnd"], "--operators kfac-expand"),
        (["--optimizer", "kfacstar"], "--optimizer kfac-star"),
        (["--problem=poison2d"], "--problem poisson2d"),
    ],
)
def test_near_misses_are_named(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    assert f"Perhaps you meant {near}" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_figure")
def test_runs_that_cannot_be_compared_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, width in (("one", "4"), ("two", "5")):
        start(tmp_path / name, "--steps", "1", "--optimizers", "sgd", "--hidden", width)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/config.json").write_text((tmp_path / "one/config.json").read_text())
    for arguments, message in (
        (["--runs", one, two], "--runs must agree in hidden"),
        (["--runs", one, "--optimizer", "adam"], "has no checkpoint of adam. It has some of: sgd"),
        (["--runs", str(tmp_path / "empty")], "has no checkpoint"),
    ):
        capsys.readouterr()
        assert compare(tmp_path / "run", *arguments) == 2
        assert message in capsys.readouterr().err
    assert main(["--run-folder", one, *_TINY]) == 2
    assert "exists and is not empty. Choose another one" in capsys.readouterr().err


@dataclass(frozen=True)
class _Singular:
    """An inverse that fails for small dampings."""

    damping: float

    def __call__(self, operator: object) -> object:
        if self.damping < 1e-3:
            raise FactorizationError("the matrix is singular\nin detail")
        return DampedBlocks(self.damping)(operator)


@pytest.mark.usefixtures("_no_figures")
def test_what_fails_is_noted_and_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(linearizations: object) -> object:
        raise MemoryError("too large")

    monkeypatch.setitem(OPERATORS, "kfac-expand", Entry(KFAC(), _Singular))
    monkeypatch.setitem(OPERATORS, "kfac-reduce", Entry(refuse))
    names = ["kfac-expand", "kfac-reduce", "identity"]
    options = ["--dampings", "1e-2", "1e-5", "--operators", *names]
    assert compare(tmp_path / "run", *_TINY, *options) == 1
    notes = {(row["operator"], row["damping"]): row["note"] for row in read(tmp_path / "run")}
    assert notes["kfac-expand", "0.01"] == notes["identity", "1e-05"] == ""
    assert notes["kfac-expand", "1e-05"] == "FactorizationError: the matrix is singular"
    assert notes["kfac-reduce", "0.01"] == "MemoryError: too large"
    assert "kfac-reduce: MemoryError: too large" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_figures")
def test_a_diverging_training_keeps_its_first_points(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--optimizer", "sgd", "--sgd.lr", "1e200", "--operators", "identity"]
    assert compare(tmp_path / "run", *_NETWORK, *_ONCE, *options) == 1
    assert {row["step"] for row in read(tmp_path / "run")} == {"0"}
    assert "seed 1 stopped: " in capsys.readouterr().out


def test_an_interruption_keeps_the_points_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(point: Point, settings: Settings) -> object:
        if point.step:
            raise KeyboardInterrupt
        return measure.measure(point, settings)

    monkeypatch.setattr(comparing_main, "measure", interrupt)
    assert compare(tmp_path / "run", *_TINY, "--operators", "identity") == 130
    assert {row["step"] for row in read(tmp_path / "run")} == {"0"}
    assert "results so far" in capsys.readouterr().err


def test_medians_and_ranges_leave_out_what_is_not_finite() -> None:
    line = Range.of({10: [3.0, math.inf, 1.0, 8.0], 0: [2.0], 5: [math.nan]})
    assert line == Range([0, 10], [2.0, 3.0], [2.0, 1.0], [2.0, 8.0])
