"""Time windows in a run: a network for each part of the time, errors at all times so far."""

import re
from dataclasses import replace

import pytest
import torch

from experiments import compare
from experiments.command import Interruption, Parser
from experiments.comparing.job import Comparison, job_of
from experiments.exhibits import EXHIBITS
from experiments.experiment import Experiment
from experiments.train import smoke
from experiments.training import Trainer, Watch, train
from pinncurv.problems import ResidualBased
from tests.experiments.runs import column, program, same

EDGES = (0.0, 0.25, 1.0)
SETTINGS = {
    "network.widths": "(5,)",
    "network.periods": "(None, 2.0)",
    "problem.n_interior": "30",
}


def _trainer(edges: tuple[float, ...] = EDGES, steps: int = 4, candidates: int = 1) -> Trainer:
    experiment = Experiment(
        *("allen_cahn", "periodic_mlp", ("adam",), SETTINGS, None, steps, (2,)),
        resample_every=2 if candidates > 1 else 1,
        candidates=candidates,
        windows=edges,
    )
    return Trainer(experiment.checked(), "adam", 2, torch.device("cpu"))


@pytest.mark.parametrize("candidates", [1, 4])
def test_windows_are_trained_for_equal_shares_and_continued_exactly(candidates: int) -> None:
    whole, first, second = (_trainer(candidates=candidates) for _ in range(3))
    until = []
    for step in range(4):
        whole.advance()
        until.append(whole.measure()["until"])
        if step < 3:
            first.advance()
    second.load_state_dict(first.state_dict())
    second.advance()
    assert until == [0.25, 0.25, 1.0, 1.0]
    assert same(whole.state_dict(), second.state_dict())
    for state in (first.state_dict(), _trainer().state_dict()):  # as a comparison loads them
        second.load_state_dict(state)
        assert same(state, second.state_dict())


def test_a_step_for_every_window_is_enough() -> None:
    """Though 49 times 1/49 is less than one by rounding."""
    trainer = _trainer(tuple(k / 49 for k in range(50)), steps=49)
    due = []
    trainer._next_window = lambda: due.append(trainer.step)  # type: ignore[method-assign]
    for _ in range(2):
        trainer.advance()
    assert due == [1]


def test_points_are_chosen_among_candidates_by_their_residuals() -> None:
    """Those of the first term alone, among so many for each; the held-out ones are not."""
    trainer, generator = _trainer(candidates=5), torch.Generator().manual_seed(1)
    first, second = trainer.objective.terms
    among = ResidualBased(first, trainer.network, 30, draws=5)
    for term, x in zip((among, second.points), trainer.objective.points, strict=True):
        assert torch.equal(term.sample(generator, torch.float64, "cpu"), x)
    assert trainer.measure()["held_out_loss"] == _trainer().measure()["held_out_loss"]


def test_a_budget_that_ends_before_the_last_window_is_no_end(tmp_path) -> None:
    trainer = _trainer(steps=1)
    with Interruption() as interruption:
        outcome = train(trainer, tmp_path, Watch(interruption))
    assert "the budget was spent in the first 1 of 2 time windows" in outcome


def test_errors_are_those_of_all_networks_at_all_times_so_far() -> None:
    trainer = _trainer()
    for _ in range(3):
        trainer.advance()
    x = trainer.problem.evaluation.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    assert 0 < x[:, 0].min() < 0.05 < 0.95 < x[:, 0].max() < 1
    early, late = x[x[:, 0] <= 0.25], x[x[:, 0] > 0.25]
    assert trainer.windows is not None
    with torch.no_grad():
        assert torch.equal(trainer.model(early), trainer.windows.networks[0](early))
        assert torch.equal(trainer.model(late), trainer.network(late))
        error = trainer.measure()["relative_error"]
        trainer.windows.networks[0][-1][-1].bias.add_(100)
        assert trainer.measure()["relative_error"] > 2 * error


@pytest.mark.parametrize("name", [n for n, e in EXHIBITS.items() if e.experiment.windows])
def test_every_window_of_an_exhibit_can_be_trained(name: str) -> None:
    tiny = smoke(replace(EXHIBITS[name].experiment, optimizers=("adam",)))
    trainer = Trainer(tiny, "adam", 1, torch.device("cpu"))
    for end in tiny.windows[1:]:
        trainer.advance()
        row = trainer.measure()
        assert row["until"] == end
        assert 0 < row["relative_error"] < 10


@pytest.mark.usefixtures("_no_figure")
def test_a_run_with_windows(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    given = [
        "--problem",
        "allen_cahn",
        "--network",
        "periodic_mlp",
        "--optimizers",
        "adam",
        "--steps",
    ]
    given += ["4", "--windows", "0", "0.5", "1", "--set", *settings, "--run-folder", str(tmp_path)]
    assert program(*given) == 0
    assert column(tmp_path, "adam", "until") == [0.5, 0.5, 0.5, 1.0, 1.0]
    assert "float64, 2 time windows" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_figure")
def test_a_budget_that_misses_windows(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors until an earlier time look better than those of all times."""
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    given = ["--problem", "allen_cahn", "--network", "periodic_mlp", "--optimizers", "adam"]
    given += ["--steps", "2", "--windows", "0", "0.3", "0.6", "1", "--set", *settings]
    assert program(*given, "--run-folder", str(tmp_path / "run")) == 1
    printed = capsys.readouterr().out
    assert "adam/seed1 stopped: the budget was spent in the first 2 of 3 time windows" in printed
    assert "errors are those until t = 0.6; raise seconds" in printed
    assert program("--resume", str(tmp_path / "run"), "--steps", "4") == 0
    assert program(*given, "--smoke", "--run-folder", str(tmp_path / "smoke")) == 0


def test_a_comparison_goes_through_all_windows() -> None:
    """Its steps are the budget, whatever the time that they take."""
    parser = Parser("", compare.OF_TRAINING)
    Comparison.add_options(parser)
    given = ["--problem", "allen_cahn", "--network", "periodic_mlp", "--optimizers", "adam"]
    given += ["--seeds", "1", "--windows", "0", "0.5", "1", "--steps", "1", "2", "--set"]
    settings = [f"{name}={value}" for name, value in SETTINGS.items()]
    _, (training,) = job_of(parser, parser.parse_args([*given, *settings]))
    points = training.points(Interruption())
    assert [training.trainer.measure()["until"] for _ in points] == [0.5, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kdv", "--windows", "0", "1", "0.5"], "--windows: The edges .* increase, got"),
        (["poisson2d", "--windows", "0", "1"], "function of start, end, initial, got poisson2d"),
        (["kdv", "--windows", "0", "2"], "0 <= start < end <= 1.0, got start=0.0, end=2.0"),
    ],
)
def test_windows_that_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path
) -> None:
    assert program("--problem", *arguments, "--run-folder", str(tmp_path / "run")) == 2
    assert re.search(message, capsys.readouterr().err)
