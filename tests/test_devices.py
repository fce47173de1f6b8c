"""The pretended device refuses what a GPU refuses, holds values, and is read by copies only."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tests.devices import PRETENDED, Pretended, not_beside_a_gpu
from tests.host_reads import HostReads

pytestmark = not_beside_a_gpu


@pytest.fixture
def x():
    return torch.tensor([1.0, 2.0, 3.0]).to(PRETENDED)


MIXED = {
    "sum": lambda x: x + torch.ones(3),
    "product": lambda x: torch.eye(3) @ x,
    "product from the left": lambda x: x @ torch.eye(3),
    "cat": lambda x: torch.cat([x, torch.ones(1)]),
    "stack": lambda x: torch.stack([x, torch.ones(3)]),
    "where": lambda x: torch.where(torch.tensor([True, False, True]), x, -x),
    "in place on the CPU": lambda x: torch.ones(3).add_(x),
    "a number in place": lambda x: torch.ones(()).add_(x.sum()),
    "a number in a stack": lambda x: torch.stack([x[0], torch.ones(())]),
    "selection": lambda x: x.index_select(0, torch.tensor([1])),
    "indices on the device": lambda x: torch.ones(4)[x.long()],
    "written values": lambda x: x.index_put_((torch.tensor([0, 1]),), torch.ones(2)),
    "equal": lambda x: torch.equal(x, torch.ones(3)),
    "loss": lambda x: nn.functional.mse_loss(x, torch.ones(3)),
    "layer": lambda x: nn.functional.linear(x, torch.ones(3, 3)),
}


@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED)
def test_mixing_devices_is_refused(mix, x):
    with pytest.raises(RuntimeError, match="same device"):
        mix(x)


def test_what_cannot_be_done_without_a_copy_is_refused(x):
    with pytest.raises(RuntimeError, match="numpy"):
        x.numpy()
    draws = torch.Generator().manual_seed(0)
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, generator=draws, device=PRETENDED)
    with pytest.raises(NotImplementedError, match="resize"):
        torch.add(x, 1, out=torch.empty(0, device=PRETENDED))


def test_numbers_and_indices_may_be_on_the_cpu(x):
    two, index = torch.tensor(2.0), torch.tensor([2, 0])
    assert (x * two).tolist() == [2, 4, 6]
    assert torch.where(x > two, two, x).tolist() == [1, 2, 2]
    assert x[index].tolist() == x[[2, 0]].tolist() == [3, 1]
    x[index] = two
    assert x.tolist() == [2, 2, 2]
    assert torch.ones(3).copy_(x).tolist() == [2, 2, 2]


def test_results_are_where_their_arguments_are(x):
    made = [torch.zeros_like(x), x.new_ones(2), torch.eye(2).to(x), x @ x, x.double(), x[:1]]
    made += [torch.arange(3, device=x.device), torch.eye(2, 3, device=x.device)]
    assert all(isinstance(y, Pretended) and y.device.type == PRETENDED for y in made)
    assert not isinstance(x.cpu(), Pretended)
    assert type(torch.zeros_like(x, device="cpu")) is torch.Tensor


def test_views_see_what_is_written(x):
    version = x._version
    x[1:].mul_(10)
    assert x.tolist() == [1, 20, 30]
    assert x._version > version


def test_a_network_moves_trains_and_returns():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    twin, parameters = copy.deepcopy(model), list(model.parameters())
    x = torch.rand(5, 3, dtype=torch.float64)
    for net, device in ((model, PRETENDED), (twin, "cpu")):
        net.to(device).double()(x.to(device)).square().sum().backward()
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for here, there in zip(twin.parameters(), model.parameters(), strict=True):
        assert there.grad.device.type == PRETENDED
        torch.testing.assert_close(there.grad.cpu(), here.grad)
    model.cpu()(x)
    assert not any(isinstance(p, Pretended) for p in model.parameters())


def test_copies_and_files_keep_device_and_kind():
    model = nn.Linear(2, 1).to(PRETENDED)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.weight, nn.Parameter)
        assert twin.weight.requires_grad
        assert twin.weight.device == model.weight.device
        assert torch.equal(twin.weight, model.weight)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for where in (None, "cpu"):
        file.seek(0)
        state = torch.load(file, map_location=where, weights_only=True)
        assert state["weight"].device.type == (where or PRETENDED)


def test_only_what_leaves_the_device_is_a_read(x):
    here = x.cpu()
    with HostReads(PRETENDED) as counted:
        here.sum().item(), here.tolist()
    assert not counted.counts
    with HostReads(PRETENDED) as counted:
        x.sum().item(), bool(x.isfinite().all()), x.tolist(), x.cpu(), x.to("cpu"), here.copy_(x)
    assert counted.counts == {"item": 2, "copy": 4}
    with HostReads(PRETENDED) as counted:
        x[x > 1], torch.linalg.eigh(x.outer(x)), torch.tensor([1.0]).to(PRETENDED), x.copy_(here)
    assert counted.counts == {"shape": 1, "check": 1, "upload": 2}
    assert counted.reads == 0
