"""Names are objects of the library, their arguments its signatures; what is wrong is answered."""

import argparse
import inspect
import json
from pathlib import Path

import pytest

from experiments import catalog
from experiments.command import number_or_auto
from experiments.experiment import Experiment, from_json
from experiments.objects import UserError, bind, evaluate, resolve
from experiments.presets import PRESETS
from pinncurv import presets
from pinncurv.curvature import KFAC, reduce
from pinncurv.optim import CurvatureOptimizer, FirstOrder, GridLineSearch, LevenbergMarquardt
from tests.experiments.runs import program, start


def test_a_value_is_a_literal_or_a_call_of_the_library():
    assert evaluate("1e-10") == 1e-10
    assert evaluate("(-1, [2.5, None])") == (-1, [2.5, None])
    assert evaluate("KFAC(sharing=reduce)") == KFAC(sharing=reduce)
    assert evaluate("LevenbergMarquardt(max_retries=0)") == LevenbergMarquardt(max_retries=0)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('x')",
        "(lambda: 1)()",
        "KFAC.__init__",
        "[x for x in (1, 2)]",
        "9**9**9",
        "exec('1')",
        "1 +",
        "-" * 3000 + "1",
        "{[1]: 2}",
        "{**KFAC}",
        "KFAC(**{'sharing': reduce})",
        "'\ud800'",
    ],
)
def test_nothing_else_is_evaluated(text):
    with pytest.raises(UserError):
        evaluate(text)


@pytest.mark.parametrize("label", catalog.OPTIMIZERS)
def test_every_optimizer_is_built_from_its_own_signature(label):
    if label == "soap":
        pytest.importorskip("pytorch_optimizer")
    experiment = Experiment(optimizers=(label,)).checked()
    if label == "curvature_optimizer":
        given = {f"{label}.curvature": "KFAC()", f"{label}.inverse": "FactorDamping(1e-8)"}
        experiment = Experiment(optimizers=(label,), settings=given).checked()
    model = experiment.build_network(experiment.build_problem(), 1)
    optimizer = experiment.build_optimizer(label, model.parameters())
    kind = (
        CurvatureOptimizer
        if label == "curvature_optimizer" or hasattr(presets, label)
        else FirstOrder
    )
    assert isinstance(optimizer, kind)


def test_settings_reach_the_optimizer():
    settings = {
        "mine.damping": "1e-3",
        "mine.sharing": "reduce",
        "other.step_size": "GridLineSearch(-3, 0)",
    }
    experiment = Experiment(
        optimizers=("mine=kfac_star", "other=engd"), settings=settings
    ).checked()
    model = experiment.build_network(experiment.build_problem(), 1)
    mine = experiment.build_optimizer("mine", model.parameters())
    assert mine.preconditioner.curvature == KFAC(sharing=reduce)
    assert mine.preconditioner.inverse.damping == 1e-3
    other = experiment.build_optimizer("other", model.parameters())
    assert other.step_size == GridLineSearch(-3, 0)


def test_what_is_set_for_one_optimizer_is_for_it_alone():
    settings = {"adam.problem.n_interior": "7", "adam.steps": "3", "problem.n_interior": "9"}
    experiment = Experiment(optimizers=("adam", "sgd"), settings=settings, steps=5).checked()
    adam, sgd = experiment.only("adam"), experiment.only("sgd")
    assert (adam.steps, sgd.steps) == (3, 5)
    assert (adam.of("problem"), sgd.of("problem")) == ({"n_interior": "7"}, {"n_interior": "9"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "kfac_tar"], "no optimizer 'kfac_tar'. Perhaps you meant kfac_star"),
        (["--problem", "poison2d"], "no problem 'poison2d'. Perhaps you meant poisson2d"),
        (["--preset", "poisson2d_258"], "no experiment 'poisson2d_258'. Perhaps you meant"),
        (
            ["--set", "kfac_star.dampin=1"],
            "it has damping, decay, start, sharing, heuristic, single.",
        ),
        (["--set", "kfac_star.damping=high"], "kfac_star.damping must be float"),
        (["--set", "kfac_star.damping=-1"], "damping must be a finite number >= 0, got -1"),
        (["--set", "kfac_star.sharing=reduse"], "Perhaps you meant reduce"),
        (["--set", "network.activation=tan"], "one of tanh, sigmoid, sin, gelu, silu, softplus"),
        (["--set", "spring.damping=1"], "--set spring.damping has no effect"),
        (["--set", "kfac_star"], "--set must be X.A=VALUE, got 'kfac_star'"),
        (["--optimizers", "adam", "adam"], "LABEL=NAME gives one a name of its own"),
        (["--second", "3"], "Perhaps you meant --seconds"),
        (["--seconds", "nan"], "--seconds must be finite, got nan"),
        (["--seconds", "-3"], "--seconds must be positive, got -3.0"),
        (["--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["--seeds", "0"], "--seeds must be different numbers from 1 on, got [0]"),
        (["--dtype", "float16"], "--dtype must be one of float64, float32"),
        (["--device", "gpu"], "--device gpu cannot be used here"),
        (["--threads", "1000000"], "--threads must be at most"),
        (["--set", "network.widths=(100000000000,)"], "error: mlp: "),
        (["--set", "network.frequency=0"], "error: mlp: frequency must be positive and finite"),
        (["--set", "problem.n_interior=0"], "must be an int of at least 1"),
        (["--problem", "nowhere.py:pde"], "There is no file"),
        (["--network", "nowhere.py:net"], "There is no file"),
        (["--track", "tensorbord"], "--track must be of tensorboard, wandb"),
    ],
)
def test_bad_input_is_one_line_before_any_work(arguments, message, tmp_path, capsys):
    assert start(tmp_path / "run", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("[!.]*"))


def test_a_missing_argument_is_named():
    with pytest.raises(
        UserError, match=r"fokker_planck needs a value for dim: --set fokker_planck"
    ):
        Experiment(problem="fokker_planck").checked().build_problem()


def test_help_fits_on_one_screen(capsys):
    with pytest.raises(SystemExit):
        program("--help")
    assert capsys.readouterr().out.count("\n") < 40


def test_everything_is_listed(capsys):
    assert program("--list") == 0
    listed = capsys.readouterr().out
    for names in (catalog.PROBLEMS, catalog.NETWORKS, catalog.OPTIMIZERS, PRESETS):
        assert all(f"  {name} " in listed for name in names)
    assert program("--list", "kfac-star") == 0
    listed = capsys.readouterr().out
    for name in list(inspect.signature(presets.kfac_star).parameters)[1:]:
        assert f"--set kfac_star.{name}=" in listed
    assert "Return KFAC*" in listed
    assert program("--list", "kfac_sta") == 2


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "must hold a JSON object"),
        ({"problm": "x"}, "unknown field 'problm'. Perhaps you meant problem"),
        ({"problem": 5}, "--problem must be str, got 5"),
        ({"optimizers": ["adam", 5]}, "--optimizers must be tuple[str, ...], got ('adam', 5)"),
        ({"settings": ["x"]}, "--settings must be"),
    ],
)
def test_a_bad_file_of_settings_is_refused(tree, message, tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tree))
    assert start(tmp_path / "run", "--config", str(path)) == 2
    assert message in capsys.readouterr().err


def test_a_field_of_a_wrong_type_is_refused():
    with pytest.raises(UserError, match="--steps must be int"):
        from_json({"steps": "many"}, "here").checked()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    experiment = PRESETS[name].checked()
    for label in experiment.labels:
        one = experiment.only(label)
        found = resolve(one.labels[label], catalog.OPTIMIZERS, "optimizer")
        bind(found, one.of(label), label, ("params",))
        bind(catalog.PROBLEMS[one.problem], one.of("problem"), "problem")
    assert Path("experiments/README.md").read_text().count(name)


def test_a_chunk_size_that_is_no_number_is_explained():
    with pytest.raises(argparse.ArgumentTypeError, match="a whole number or auto, got 'foo'"):
        number_or_auto("foo")
    assert (number_or_auto("auto"), number_or_auto("7")) == ("auto", 7)
