"""Optimizers of others: one state, one step each, and runs that continue to the same bits."""

import sys

import pytest
import torch
from torch import nn

from experiments import baselines
from experiments.objects import UserError
from pinncurv.optim import FirstOrder
from tests.experiments.runs import resume, same, start, state
from tests.optim.cases import network, poisson, values


def test_muon_is_muon_on_matrices_and_adamw_on_the_rest():
    model, twin = network(2, 5, 4, 1), network(2, 5, 4, 1)
    optimizer = FirstOrder(baselines.Muon(model.parameters(), lr=1e-2, weight_decay=0.1))
    shared = {"lr": 1e-2, "weight_decay": 0.1}
    matrices = torch.optim.Muon(
        [p for p in twin.parameters() if p.dim() == 2], adjust_lr_fn="match_rms_adamw", **shared
    )
    vectors = torch.optim.AdamW([p for p in twin.parameters() if p.dim() == 1], **shared)
    for seed in range(3):
        record = optimizer.step(poisson(model, seed))
        assert record.solver["evaluations"] == 1
        twin.zero_grad()
        poisson(twin, seed).backward()
        matrices.step()
        vectors.step()
    for p, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("kinds", [[(2, 3)], [(3,)]])
def test_muon_of_one_kind_of_parameters(kinds):
    parameters = [nn.Parameter(torch.ones(*shape)) for shape in kinds]
    optimizer = baselines.Muon(parameters)
    optimizer.step(lambda: sum(p.square().sum() for p in parameters).backward())
    assert all(bool((p < 1).all()) for p in parameters)


@pytest.mark.parametrize("kind", ["groups", "names"])
def test_muon_makes_its_groups_itself(kind):
    model = network(2, 5, 1)
    given = {"groups": [{"params": model.parameters()}], "names": model.named_parameters()}
    with pytest.raises(UserError, match=r"must have the parameters themselves.*got (dict|tuple)\."):
        baselines.Muon(given[kind])


@pytest.mark.usefixtures("_no_figure")
@pytest.mark.parametrize(("label", "steps"), [("muon", 5), ("soap", 24), ("ssbroyden", 5)])
def test_a_run_continues_to_the_same_bits(label, steps, tmp_path):
    if label == "soap":
        pytest.importorskip("pytorch_optimizer")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert start(whole, "--steps", str(steps), "--optimizers", label) == 0
    assert start(part, "--steps", str(steps // 2 + 1), "--optimizers", label) == 0
    assert resume(part, "--steps", str(steps)) == 0
    assert same(state(whole, label)["model"], state(part, label)["model"])


def test_soap_decreases_the_loss():
    pytest.importorskip("pytorch_optimizer")
    model = network(2, 6, 6, 1)
    optimizer, before = FirstOrder(baselines.soap(model.parameters(), 0.1)), values(model)
    loss = poisson(model).loss().item()
    for _ in range(30):
        optimizer.step(poisson(model))
    assert poisson(model).loss().item() < 0.5 * loss
    assert not any(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))


def test_soap_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UserError, match=r"pip install pinncurv\[baselines\]"):
        baselines.soap([])
