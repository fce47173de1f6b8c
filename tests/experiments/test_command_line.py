"""What the command line understands, and what it says to the rest."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from experiments.training.command_line import as_arguments, parse
from experiments.training.errors import UserError
from experiments.training.optimizers import LBFGSSettings, SGDSettings
from experiments.training.settings import Seeds, Settings
from tests.experiments.runs import ALL


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return what a wrong command line prints, without the box around it."""
    with pytest.raises(SystemExit, match="2"):
        parse(arguments)
    return " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_without_arguments_it_compares_the_three_for_equal_time() -> None:
    settings = parse([]).settings.resolved()
    assert settings.optimizers == ("kfac-star", "gauss-newton", "adam")
    assert (settings.problem, settings.hidden, settings.dtype) == ("poisson2d", (64,), "float64")
    assert (settings.seconds, settings.steps) == (16.0, None)
    assert (settings.n_interior, settings.n_boundary) == (900, 120)
    assert (settings.kfac_star.damping, settings.kfac_star.decay) == (1.2e-10, 0.926)


def test_help_shows_every_optimizer_and_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    text = capsys.readouterr().out
    for name in (*ALL, "poisson100d", "anisotropic-log-fokker-planck"):
        assert name in text
    assert "--kfac-star.damping" in text
    assert "--lbfgs.history-size" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--problem", "poison2d"], "invalid choice 'poison2d'.*'poisson2d'"),
        (["--optimizers", "adam", "kfca"], "invalid choice 'kfca'.*'kfac-star'"),
        (["--kfac-star.dampin", "1"], "Perhaps you meant: --kfac-star.damping"),
        (["--optimizer", "adam"], "Perhaps you meant: --optimizers"),
        (["--steps", "many"], "steps"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = error_of(capsys, *arguments)
    assert re.search(message, text), text


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["--optimizers", "adam", "kfacstar"], "--optimizers kfac-star"),
        (["--problem", "poisson2"], "--problem poisson2d or poisson"),
        (["--activation=tanhh"], "--activation tanh."),
        (["--kfac.sharing", "expnd"], "--kfac.sharing expand."),
    ],
)
def test_near_misses_of_choices_are_named(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"Perhaps you meant {near}" in error_of(capsys, *arguments)


def test_settings_survive_the_way_through_arguments() -> None:
    arguments = ["--hidden", "8", "9", "--kfac.line-search-exponents", "-7", "-1", "--steps", "3"]
    arguments += ["--optimizers", "kfac", "adam", "--adam.amsgrad", "True", "--seeds.points", "7"]
    settings = parse(arguments).settings.resolved()
    assert settings.kfac.line_search_exponents == (-7, -1)
    again = parse(as_arguments(json.loads(json.dumps(dataclasses.asdict(settings)))))
    assert again.settings == settings


def test_a_file_of_settings_comes_before_the_arguments(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"steps": 5, "adam": {"lr": 0.5}, "hidden": [3, 4]}))
    settings = parse(["--config", str(path), "--hidden", "6"]).settings
    assert (settings.steps, settings.adam.lr, settings.hidden) == (5, 0.5, (6,))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot read"), ("{", "no valid JSON"), ("[1]", "must hold a JSON object")],
)
def test_a_bad_file_of_settings_is_refused(
    content: str | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "settings.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        parse(["--config", str(path)])


def test_a_misspelt_name_in_a_file_is_answered_like_a_misspelt_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps({"adam": {"lrr": 0.5}}))
    assert "--adam.lr FLOAT" in error_of(capsys, "--config", str(path))


def test_settings_without_effect_are_refused() -> None:
    with pytest.raises(UserError, match=r"--engd\.\* has no effect: engd is not among"):
        parse(["--engd.damping", "1e-3"])


def test_resume_excludes_another_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="drop --config and --run-folder"):
        parse(["--resume", str(tmp_path), "--run-folder", str(tmp_path / "other")])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(seconds=0.0), "--seconds must be positive"),
        (Settings(steps=-1), "--steps must be positive"),
        (Settings(seconds=float("nan")), "--seconds must be a finite number, got nan"),
        (Settings(resample_every=-1), "--resample-every must be 0 or more"),
        (Settings(hidden=(3, 0)), "--hidden must be positive widths"),
        (Settings(optimizers=()), "--optimizers must be one or more different"),
        (Settings(optimizers=("adam", "adam")), "--optimizers must be one or more different"),
        (Settings(threads=1_000_000), "--threads must be at most"),
        (Settings(lbfgs=LBFGSSettings(history_size=0)), "--lbfgs.history-size must be positive"),
        (Settings(lbfgs=LBFGSSettings(max_iter=-1)), "--lbfgs.max-iter must be positive"),
        (Settings(sgd=SGDSettings(lr=0.0)), "--sgd.lr must be positive"),
        (Settings(seeds=Seeds(points=10**26)), "--seeds.points must be an integer of 64 bits"),
        (Settings(dimension=3), "The dimension of poisson2d is fixed"),
    ],
)
def test_settings_out_of_range_are_refused(settings: Settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings.resolved()
