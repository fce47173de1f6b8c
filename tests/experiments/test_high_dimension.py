"""The problem and the program of paper/high_dimension.md."""

from pathlib import Path

import pytest
import torch

from experiments.objects import resolve
from pinncurv.diffops import RandomCoordinates
from tests.experiments.runs import program, rows

FILE = str(Path(__file__).parents[2] / "paper" / "high_dimension.py")


def test_the_solution_solves_the_equation():
    problem = resolve(f"{FILE}:two_body", {}, "problem")(7, 20)
    (c,) = problem.solution.args
    (term,) = problem.terms
    x = term.points.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")

    def u(p):
        phases = [p[i] + torch.cos(p[i + 1]) + p[i + 1] * torch.cos(p[i]) for i in range(6)]
        return (1 - p @ p) * sum(c[i] * torch.sin(phase) for i, phase in enumerate(phases))

    assert (x.norm(dim=1) < 1).all()
    torch.testing.assert_close(problem.solution(x)[:, 0], torch.stack([u(p) for p in x]))
    laplacian = torch.stack([torch.func.hessian(u)(p).trace() for p in x])[:, None]
    residual = term.residual(x, laplacian)
    torch.testing.assert_close(residual, torch.zeros_like(residual), atol=1e-11, rtol=0)


def test_the_network_vanishes_on_the_sphere():
    network = resolve(f"{FILE}:ball", {}, "network")(3, 1, (4,)).double()
    x = torch.randn(5, 3).double()
    values = network(x / x.norm(dim=1, keepdim=True))
    assert values.shape == (5, 1)
    torch.testing.assert_close(values, torch.zeros_like(values))


def test_costs_of_a_step():
    measure = resolve(f"{FILE}:measure", {}, "program")
    cells = measure(12, 5, RandomCoordinates(3), 1)
    assert len(cells) == 6
    assert all(float(cell) >= 0 for cell in cells)
    assert min(float(cell) for cell in (*cells[:3], cells[5])) > 0
    assert float(measure(12, 5, RandomCoordinates(12), 1)[5]) < 1e-20  # without any bias


@pytest.mark.usefixtures("_no_figure")
def test_one_command_trains_with_several_samplings(tmp_path):
    arguments = ["--problem", f"{FILE}:two_body", "--network", f"{FILE}:ball", "--threads", "1"]
    arguments += ["--optimizers", "exact=kfac_star", "few=kfac_star", "adam", "--steps", "2"]
    arguments += ["--resample-every", "1", "--set", "problem.dim=6", "problem.n_interior=4"]
    arguments += ["few.problem.sampling=RandomSigns(2)", "network.widths=(4,)"]
    assert program(*arguments, "--run-folder", str(tmp_path)) == 0
    exact, few = (rows(tmp_path, name)[0]["loss"] for name in ("exact", "few"))
    assert exact != few  # from one network at the same points
