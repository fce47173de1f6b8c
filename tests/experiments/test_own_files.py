"""A PDE, a network and an optimizer in files of the user's own, as README has them."""

import re
from pathlib import Path

import pytest

from tests.experiments.runs import column, program, resume, same, state

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write the files of README's section on the command line, and go there."""
    for name, code in re.findall(
        r"```python\n# (my_\w+\.py)\n(.*?)```", README.read_text(), flags=re.DOTALL
    ):
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"my_pde.py", "my_net.py", "my_opt.py"}
    return tmp_path


FILES = ["--problem", "my_pde.py:allen_cahn", "--network", "my_net.py:build"]


def test_they_are_trained_and_resumed_without_a_solution(own, capsys):
    options = [*FILES, "--optimizers", "my_opt.py:mine", "kfac_star", "--threads", "1"]
    options += ["--set", "mine.damping=1e-5"]
    assert program(*options, "--steps", "6", "--run-folder", "whole") == 0
    assert "held_out_loss" in capsys.readouterr().out
    losses = column(own / "whole", "mine", "held_out_loss")
    assert losses[-1] < losses[0]
    assert program(*options, "--steps", "4", "--run-folder", "parts") == 0
    again = [*FILES, "--optimizers", "my_opt.py:mine", "kfac_star"]
    assert resume(Path("parts"), *again, "--steps", "6") == 0
    for label in ("mine", "kfac_star"):
        assert same(state(own / "whole", label), state(own / "parts", label))


def test_arguments_of_own_functions_are_set_and_listed(own, capsys):
    assert program("--list", "my_pde.py:allen_cahn") == 0
    assert "--set allen_cahn.diffusivity=0.0001" in capsys.readouterr().out
    options = [*FILES, "--optimizers", "adam", "--threads", "1", "--steps", "1"]
    assert (
        program(
            *options, "--set", "allen_cahn.diffusivity=1e-3", "network.width=4", "--run-folder", "a"
        )
        == 0
    )
    assert program(*options, "--set", "allen_cahn.diffusivty=1", "--run-folder", "b") == 2
    assert "Perhaps you meant diffusivity" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("import nothing_like_this\n", "pde", "line 1: ModuleNotFoundError: No module named"),
        ("x = 1\n\nraise ValueError('why')\n", "pde", "line 3: ValueError: why"),
        ("def pde(:\n", "pde", "SyntaxError"),
        (
            "def burger():\n    return 1\n",
            "burgers",
            "defines no 'burgers' to be a problem. Perhaps you meant burger",
        ),
        (
            "def burgers():\n    return 1\n",
            "burgers",
            "must be or return a pinncurv.Problem, got int",
        ),
        ("def burgers():\n    raise ValueError('why')\n", "burgers", "broken.py:burgers: why"),
        ("def burgers():\n    {}['a']\n", "burgers", "broken.py:burgers: KeyError: 'a'"),
        ("raise SystemExit(0)\n", "burgers", "line 1: SystemExit: 0"),
        ("def __getattr__(name):\n    1 / 0\n", "burgers", "defines no 'burgers'"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(code, name, message, tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text(code)
    assert program("--problem", f"{path}:{name}", "--run-folder", str(tmp_path / "run")) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


@pytest.mark.usefixtures("_no_figure")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("        {}['a']\n", "KeyError: 'a'"),
        ("        raise SystemExit(0)\n", "SystemExit: 0"),
        (
            "        pass\n    def state_dict(self):\n"
            "        return {**super().state_dict(), 'x': range}\n",
            "must hold tensors, numbers, strings, lists and dicts to be restored",
        ),
    ],
)
def test_an_own_optimizer_that_fails_does_not_stop_the_others(body, message, tmp_path, capsys):
    path, run = tmp_path / "opt.py", tmp_path / "run"
    path.write_text(
        "import torch\nclass mine(torch.optim.SGD):\n    def step(self, closure):\n" + body
    )
    options = ["--optimizers", f"{path}:mine", "adam", "--steps", "2", "--threads", "1"]
    assert program(*options, "--run-folder", str(run)) == 1
    assert message in capsys.readouterr().out
    assert state(run, "adam")["step"] == 2


@pytest.mark.usefixtures("_no_figure")
def test_a_network_made_once_starts_every_training_alike(tmp_path):
    path, run = tmp_path / "net.py", tmp_path / "run"
    path.write_text(
        "from torch import nn\nONE = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))\n"
        "def net():\n    return ONE\n"
    )
    options = ["--network", f"{path}:net", "--optimizers", "adam", "sgd", "--steps", "2"]
    assert program(*options, "--threads", "1", "--run-folder", str(run)) == 0
    assert column(run, "adam", "loss")[0] == column(run, "sgd", "loss")[0]


def test_a_network_of_a_wrong_width_is_refused(own, capsys):
    (own / "net.py").write_text("from torch import nn\ndef net():\n    return nn.Linear(2, 3)\n")
    assert program(*FILES[:2], "--network", "net.py:net", "--run-folder", "run") == 2
    assert "the network must return [N, 1], got [1000, 3]" in capsys.readouterr().err


def test_a_network_that_every_training_would_share_is_refused(tmp_path, capsys):
    path = tmp_path / "net.py"
    path.write_text("from torch import nn\nnet = nn.Linear(2, 1)\n")
    assert program("--network", f"{path}:net", "--run-folder", str(tmp_path / "run")) == 2
    assert "Name a class or a function that builds it" in capsys.readouterr().err


def test_a_changed_file_is_another_run(own, capsys):
    options = [*FILES, "--optimizers", "adam", "--threads", "1"]
    assert program(*options, "--steps", "1", "--run-folder", "run") == 0
    path = own / "my_net.py"
    path.write_text(path.read_text() + "\n# another\n")
    assert resume(Path("run"), *FILES, "--steps", "2") == 2
    assert "belongs to another run: files.my_net.py was" in capsys.readouterr().err
