"""The counter of what the host reads, and what a step reads."""

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.problems import poisson2d
from tests.devices import DEVICES
from tests.host_reads import HostReads

READS = {
    "item": (lambda x: x.sum().item(), "item"),
    "float": (lambda x: float(x[0]), "item"),
    "bool": (lambda x: bool(x.isfinite().all()), "item"),
    "if": (lambda x: 1 if x[0] > 0 else 0, "item"),
    "max": (lambda x: max(x[0], x[1]), "item"),
    "number": (lambda x: torch.add(x, x, alpha=x[0]), "item"),
    "index": (lambda x: x[torch.tensor(1)], "item"),
    "list": (lambda x: x.tolist(), "tolist"),
    "number as a list": (lambda x: x.sum().tolist(), "tolist"),
    "numpy": (lambda x: x.numpy(), "copy"),
    "cpu": (lambda x: x.cpu(), "copy"),
    "equal": (lambda x: torch.equal(x, x), "equal"),
    "mask": (lambda x: x[x > 0], "shape"),
    "nonzero": (lambda x: x.nonzero(), "shape"),
    "eigh": (lambda x: torch.linalg.eigh(x.outer(x)), "check"),
    "cholesky": (lambda x: torch.linalg.cholesky(torch.eye(3)), "check"),
}


@pytest.mark.parametrize("name", READS)
def test_each_kind_is_counted(name):
    read, kind = READS[name]
    x = torch.tensor([1.0, 2.0, 3.0])
    with HostReads() as counted:
        read(x)
    assert counted.counts == {kind: 1}
    assert counted.reads == (kind not in ("shape", "check"))


def test_what_stays_on_the_device_is_not():
    x = torch.rand(3)
    with HostReads() as counted:
        torch.where(x > 0, x, -x).clamp(max=x.sum())
        torch.cat([x, x]).view(2, 3) @ x
        x[torch.tensor([0, 1])] * x.shape[0]
        torch.linalg.cholesky_ex(torch.eye(3))
    assert not counted.counts
    bool(x.sum())  # and nothing thereafter
    assert not counted.counts


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [None, 300])
def test_a_step_of_kfac_star_reads_three_times(chunk_size, device):
    """Whether Cholesky's algorithm failed; the quadratic model; the loss after the step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double().to(device)
    objective = Objective.sample(model, poisson2d(), chunk_size=chunk_size)
    optimizer = presets.kfac_star(model.parameters())
    accepted, full = False, 0
    for _ in range(8):
        with HostReads(device) as counted:
            record = optimizer.step(objective)
        if accepted and record.accepted and record.scale == 1:
            assert counted.reads <= 3, counted.report()
            assert counted.counts["upload"] == counted.counts["shape"] == 0, counted.report()
            full += 1
        accepted = record.accepted
    assert full >= 2
