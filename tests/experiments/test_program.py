"""What every program does around its job: exit codes, errors in one line, a folder let go of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments.training import main as training_main
from experiments.training.errors import UserError
from experiments.training.program import ExitCode, run_program
from experiments.training.run_folder import RunFolder
from tests.experiments.runs import start


@dataclass(frozen=True)
class _Job:
    folder: RunFolder


def _raise(error: BaseException) -> Callable[..., ExitCode]:
    def fail(*_: object) -> ExitCode:
        raise error

    return fail


def _run(folder: Path, work: Callable[[_Job], ExitCode]) -> ExitCode:
    return run_program(
        lambda: _Job(RunFolder.create(folder, "unused")), work, lambda path: f"see {path}"
    )


@pytest.mark.parametrize("code", list(ExitCode))
def test_the_exit_code_is_that_of_the_work_and_the_folder_is_free_again(
    code: ExitCode, tmp_path: Path
) -> None:
    assert _run(tmp_path / "run", lambda _: code) == code
    RunFolder(tmp_path / "run").close()


def test_ctrl_c_at_once_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(tmp_path / "run", _raise(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == f"see {tmp_path / 'run'}\n"
    RunFolder(tmp_path / "run").close()


@pytest.mark.parametrize("error", [UserError("one\n  two"), ValueError("one two")])
def test_a_wrong_request_is_one_line(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program(_raise(error), _raise(AssertionError()), str) == 2
    assert capsys.readouterr().err == "error: one two\n"


def test_errors_of_the_program_itself_are_no_wrong_requests(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with pytest.raises(ValueError, match="a bug"):
        _run(tmp_path / "run", _raise(ValueError("a bug")))
    RunFolder(tmp_path / "run").close()


def test_a_training_that_is_stopped_at_once_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_main, "train", _raise(KeyboardInterrupt()))
    assert start(tmp_path / "run", "--steps", "1", "--optimizers", "adam") == 130
    message = f"stopped at once; continue with: python experiments/train.py --resume {tmp_path}/run"
    assert message in capsys.readouterr().err
