"""Structure is found once: what a step does not do, and how many passes and rooms it takes."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pinncurv
from pinncurv import linearization, presets
from pinncurv.curvature import KFAC, Jacobian, MatrixFreeGaussNewton, Objective, ParameterSpace
from pinncurv.diffops import Plan
from pinncurv.linearization import BoundTerm
from pinncurv.problems import poisson2d
from tests.kinds import TERMS, build
from tests.networks import points


def objective(chunk_size: int | None = None) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    return Objective.sample(model, poisson2d(30, 12), chunk_size=chunk_size)


def counted(monkeypatch, owner, name: str, calls: list[str]) -> None:
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("preset", ["kfac_star", "gauss_newton", "engd_w", "auto"])
def test_nothing_is_found_again_in_a_step(preset, monkeypatch):
    """No walk over the autograd graph, no plan, no grouping into layers, no parameter space."""
    made, calls = objective(), []
    optimizer = getattr(presets, preset)(made.parameters(), damping=1e-3)
    counted(monkeypatch, linearization.structure, "_leaves", calls)
    counted(monkeypatch, linearization.structure, "_find_layers", calls)
    counted(monkeypatch, linearization.bound, "find_structure", calls)
    counted(monkeypatch, Plan, "of", calls)
    counted(monkeypatch, ParameterSpace, "of_bound", calls)
    for _ in range(3):
        optimizer.step(made)
    assert calls == []
    objective()
    assert {"_leaves", "_find_layers", "find_structure", "of", "of_bound"} == set(calls)


@pytest.mark.parametrize("kind", ["slopes", "fourier"])
def test_a_product_with_chunks_makes_one_pass(kind, monkeypatch):
    terms, batch = [TERMS["inverse"](), TERMS["first"]()], [points(5), points(3)]
    linearized = Objective(build(kind), terms, batch, chunk_size=2).linearize()
    linearized.run()
    calls: list[str] = []
    counted(monkeypatch, BoundTerm, "linearize", calls)
    vector = torch.ones(linearized.space.dimension, dtype=torch.float64)
    for operator in (MatrixFreeGaussNewton()(linearized), Jacobian()(linearized)):
        calls.clear()
        operator @ vector
        assert len(calls) == 5  # ceil(5 / 2) + ceil(3 / 2)


def test_one_pass_serves_curvature_and_gradient(monkeypatch):
    linearized = objective(chunk_size=10).linearize()
    calls: list[str] = []
    counted(monkeypatch, BoundTerm, "linearize", calls)
    KFAC()(linearized)
    linearized.gradient()
    assert linearized.term_losses
    assert len(calls) == 3 + 2


def test_rooms_of_a_step():
    """Functions and files of the package that one KFAC* step passes: fewer are better."""
    made = objective()
    optimizer = presets.kfac_star(made.parameters(), damping=1e-6)
    for _ in range(3):
        optimizer.step(made)
    root, rooms = Path(pinncurv.__file__).parent, set()

    def visit(frame, event, _):
        code = frame.f_code
        if event == "call" and "comp>" not in code.co_name and code.co_name != "<genexpr>":
            rooms.add((code.co_filename, code.co_qualname))

    sys.setprofile(visit)
    try:
        optimizer.step(made)
    finally:
        sys.setprofile(None)
    own = [room for room in rooms if Path(room[0]).is_relative_to(root)]
    assert len(own) <= 222
    assert len({file for file, _ in own}) <= 48
