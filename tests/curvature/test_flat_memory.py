"""With a chunk size, memory does not grow with the points but by a few numbers of each."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.problems import poisson2d

# What a process of its own does: the peak of its resident memory above that with the batch, in
# megabytes, after a first run at few points has loaded everything.
PROGRAM = """
import json, sys, torch
from pathlib import Path
from torch import nn
from pinncurv import presets
from pinncurv.curvature import (
    InSubspace, MatrixFreeGaussNewton, Objective, PreconditionedCG, SubspaceGaussNewton
)
from pinncurv.optim import CurvatureOptimizer
from pinncurv.problems import poisson2d

torch.set_num_threads(1)
what, sizes = sys.argv[1], [int(n) for n in sys.argv[2:]]

def resident(which):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024 / 1e6

def optimizer(parameters):
    if what == "kfac_star":
        return presets.kfac_star(parameters, damping=1e-8)
    curvature, inverse = {
        "cg": (MatrixFreeGaussNewton(), PreconditionedCG(1e-3, max_iterations=2)),
        "subspace": (SubspaceGaussNewton(50), InSubspace(1e-6)),
    }[what]
    return CurvatureOptimizer(parameters, curvature=curvature, inverse=inverse)

def peak(n):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    problem = poisson2d(n, n // 10)
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = resident("VmRSS")
    objective = Objective(model, problem.terms, batch, chunk_size=5000)
    if what == "gradient":
        objective.backward()
    else:
        taking = optimizer(model.parameters())
        for _ in range(2):
            taking.step(objective)
    return resident("VmHWM") - before

print(json.dumps([peak(n) for n in sizes][1:]))
"""


def peaks(what: str, *sizes: int) -> list[float]:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, what, "20000", *map(str, sizes)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def allocated(what: str, n: int) -> int:
    """The most bytes of tensors at one time, counted at the allocator: alike in every run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()
    problem = poisson2d(n, n // 10)
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective = Objective(model, problem.terms, batch, chunk_size=5000)
        if what == "gradient":
            objective.backward()
        else:
            optimizer = presets.kfac_star(model.parameters(), damping=1e-8)
            for _ in range(2):
                optimizer.step(objective)
    events = profiler.profiler.kineto_results.events()
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(("what", "numbers"), [("gradient", 3), ("kfac_star", 4)])
def test_what_grows_is_a_few_numbers_of_each_point(what, numbers):
    """The residual, products with J, and little else.

    Kept for every point, Z and G would be 300 numbers, and the jets of the points eight.
    """
    few, many = (allocated(what, n) for n in (20_000, 80_000))
    points = 60_000 + 6_000  # inside and on the boundary
    assert points * 8 < many - few < numbers * points * 8


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("what", "most"), [("gradient", 100), ("kfac_star", 100), ("cg", 100), ("subspace", 1000)]
)
def test_a_million_points(what, most):
    (peak,) = peaks(what, 1_000_000)
    assert peak < most
