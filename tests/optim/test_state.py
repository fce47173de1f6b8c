"""The state: saved and loaded in the middle of a run, copied, and moved to another dtype."""

import copy
import io
import itertools
import math
import pickle
from dataclasses import replace

import pytest
import torch

from pinncurv import presets
from pinncurv.curvature import EKFAC, Objective, PreconditionedCG
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer, ExponentialAverage, FirstOrder, Intervals
from pinncurv.optim.identity import describe
from tests.devices import DEVICES, move_
from tests.optim.cases import (
    OPTIMIZERS,
    LeastSquaresFit,
    fixed,
    gram,
    network,
    poisson,
    same,
    values,
)

# The others have states like one of these, and hessian_free takes ten times as long.
QUICK = ("kfac", "kfac_star", "engd", "gauss_newton_cg", "engd_w", "adaptive_intervals", "auto")
ON_DEVICES = [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPTIMIZERS]


def through_a_file(state):
    """Save and load as a careful user does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_pickle(thing):
    return pickle.loads(pickle.dumps(thing))


def comparable(record):
    """Return a record without tensors; NaN equals NaN."""
    names = ("loss", "new_loss", "step_size", "momentum", "damping", "predicted_decrease", "reason")
    return [repr(getattr(record, name)) for name in names]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_round_trip_in_the_middle_of_a_run(name):
    """Bit for bit the same run, wherever it was cut, also between two refreshments."""
    model, steps = network(), 5
    optimizer, saved, records = OPTIMIZERS[name](model.parameters()), {}, []
    frozen = poisson(model)  # the same batch twice in a row, so that linearizations are reused
    for step in range(steps):
        if step in (1, 4):
            saved[step] = through_a_file([model.state_dict(), optimizer.state_dict()])
        records.append(optimizer.step(frozen if step < 2 else poisson(model, seed=step)))
    for start, (weights, state) in saved.items():
        twin = network(seed=7)
        twin.load_state_dict(weights)
        resumed = OPTIMIZERS[name](twin.parameters())
        resumed.load_state_dict(state)
        for step in range(start, steps):
            record = resumed.step(poisson(twin, seed=0 if step < 2 else step))
            assert comparable(record) == comparable(records[step])
        assert same(values(twin), values(model))
        assert_equal_states(resumed, optimizer)


def assert_equal_states(left, right):
    a, b = left.state_dict(), right.state_dict()
    assert_equal(a["state"], b["state"])
    assert a["param_groups"] == b["param_groups"]


def assert_equal(left, right):
    """Bit for bit; torch compares no strings."""
    left, right = ({**state, "curvature": dict(state["curvature"])} for state in (left, right))
    for key in ("names", "method"):
        assert left["curvature"].pop(key) == right["curvature"].pop(key)
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["kfac_star", "kfac_intervals"])
def test_loading_does_not_tie_two_optimizers_together(name):
    model = network()
    first = OPTIMIZERS[name](model.parameters())
    first.step(poisson(model))
    second = OPTIMIZERS[name](model.parameters())
    second.load_state_dict(first.state_dict())
    before = copy.deepcopy(first.state_dict())
    second.step(poisson(model))
    assert_equal(first.state_dict()["state"], before["state"])
    assert second.state_dict()["state"]["curvature"]["step"] == 2


def test_loading_into_a_run():
    """Going back to a checkpoint with the same optimizer."""
    model = network()
    optimizer = presets.kfac_star(model.parameters())
    optimizer.step(poisson(model))
    checkpoint = through_a_file([model.state_dict(), optimizer.state_dict()])
    runs = []
    for _ in range(2):
        model.load_state_dict(checkpoint[0])
        optimizer.load_state_dict(through_a_file(checkpoint[1]))
        for step in range(3):
            optimizer.step(poisson(model, seed=step))
        runs.append(values(model))
    assert same(*runs)


@pytest.mark.parametrize(
    ("name", "duplicate"),
    list(zip(OPTIMIZERS, itertools.cycle([copy.deepcopy, through_pickle]), strict=False)),
)
def test_copies(name, duplicate):
    """A copy of model and optimizer goes on as the original does, and apart from it."""
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters())
    for step in range(2):
        optimizer.step(poisson(model, seed=step))
    twin, copied = duplicate((model, optimizer))
    before = values(twin)
    for step in range(2):
        optimizer.step(poisson(model, seed=step))
    assert same(before, values(twin))
    for step in range(2):
        copied.step(poisson(twin, seed=step))
    assert same(values(model), values(twin))
    assert_equal_states(optimizer, copied)


# --- what must not be loaded ----------------------------------------------------------------------


def test_state_of_another_class():
    model = network()
    adam = torch.optim.Adam(model.parameters())
    FirstOrder(adam).step(poisson(model))
    optimizer = presets.kfac_star(model.parameters())
    with pytest.raises(ValueError, match="must come from a CurvatureOptimizer"):
        optimizer.load_state_dict(adam.state_dict())
    assert optimizer.step(poisson(model)).accepted


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((2, 5, 1), r"'previous_update' of parameter 0 has shape \[4, 2\], the parameter has"),
        ((2, 4, 4, 1), "must belong to the same network|doesn't match the size"),
    ],
)
def test_state_of_another_network(widths, message):
    model, other = network(), network(*widths)
    source = presets.kfac_star(model.parameters())
    source.step(poisson(model))
    optimizer, clean = presets.kfac_star(other.parameters()), network(*widths)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(source.state_dict())
    optimizer.step(poisson(other))  # nothing of it was taken
    presets.kfac_star(clean.parameters()).step(poisson(clean))
    assert same(values(other), values(clean))


@pytest.mark.parametrize("name", ["engd", "engd_diagonal"])
def test_state_of_another_curvature(name):
    model = network()
    source = OPTIMIZERS["kfac"](model.parameters())
    source.step(poisson(model))
    optimizer = OPTIMIZERS[name](model.parameters())
    with pytest.raises(ValueError, match=r"saved with momentum HeavyBall\(\) instead of None; cur"):
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.step(poisson(model)).accepted  # nothing of it was taken


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ("kfac_star", r"step_size QuadraticModel\(\) instead of GridLineSearch\(\); momentum None"),
        ("kfac_star_reduce", r"KFAC\(sharing=Reduce.* instead of KFAC\(sharing=Expand"),
        ("engd_diagonal", r"curvature DiagonalGaussNewton\(\) instead of KFAC\("),
        ("adaptive", r"damping_rule LevenbergMarquardt\(\) instead of ConstantDamping\(\)"),
    ],
)
def test_state_of_another_preset(saved, message):
    model = network()
    source, optimizer = (OPTIMIZERS[n](model.parameters()) for n in (saved, "kfac"))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(source.state_dict())


def test_numbers_may_differ():
    """Another decay or damping goes on with the average; the damping is that of the state."""
    model = network()
    source = presets.kfac_star(model.parameters(), damping=1e-3, decay=0.9)
    source.step(poisson(model))
    optimizer = presets.kfac_star(model.parameters(), damping=1e-5, decay=0.5)
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    assert optimizer.step(poisson(model)).damping == 1e-3
    assert describe(PreconditionedCG(1e-3, spacing=1.3)) == describe(PreconditionedCG(1e-3))


def square_network():
    """Two layers of the same shape, which only their names tell apart."""
    return network(2, 2, 2, 1)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("name", ["gauss_newton", "kfac", "engd_diagonal"])
def test_state_for_parameters_in_another_order(name, first_order):
    """Where shapes fit, the names say that momentum would go to another layer."""
    model = square_network()
    swapped = [*model[2].parameters(), *model[0].parameters(), *model[4].parameters()]
    make = (lambda p: FirstOrder(torch.optim.Adam(p))) if first_order else OPTIMIZERS[name]
    source, optimizer = make(model.parameters()), make(swapped)
    source.step(poisson(model))
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    before = values(model)
    with pytest.raises(ValueError, match=r"4 have another name: '0.weight' is now '2.weight'"):
        optimizer.step(poisson(model))
    assert same(before, values(model))
    optimizer.load_state_dict(make(swapped).state_dict())  # of no step: belongs to anybody
    optimizer.step(poisson(model))


def test_state_of_a_network_of_the_same_shapes():
    model, other = network(), torch.nn.Sequential(network())
    source, optimizer = (OPTIMIZERS["gauss_newton"](m.parameters()) for m in (model, other))
    source.step(poisson(model))
    optimizer.load_state_dict(source.state_dict())
    with pytest.raises(ValueError, match=r"4 have another name: '0.weight' is now '0.0.weight'"):
        optimizer.step(poisson(other))


@pytest.mark.parametrize("name", ["kfac", "engd", "engd_per_layer", "engd_diagonal"])
def test_layers_that_change_places(name):
    """What was averaged belongs to a name: a layer that goes by another one is not mixed in."""
    model = square_network()
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.step(poisson(model))
    model[0], model[2] = model[2], model[0]
    before = values(model)
    with pytest.raises(ValueError, match=r"have another name: '0.weight' is now '2.weight'"):
        optimizer.step(poisson(model))
    assert same(before, values(model))


@pytest.mark.parametrize("name", ["kfac_star", "kfac_intervals"])
def test_terms_in_another_order(name):
    """The average of a term goes on with that term."""
    runs = []
    for swap in (False, True):
        model = network()
        optimizer = OPTIMIZERS[name](model.parameters())
        for step in range(4):
            made = poisson(model, step, n=8)  # both terms have factors of the same shapes
            order = (1, 0) if swap and step >= 2 else (0, 1)
            terms, xs = [made.terms[i] for i in order], [made.points[i] for i in order]
            optimizer.step(Objective(model, terms, xs))
        runs.append(values(model))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_other_terms():
    model = network()
    optimizer = presets.kfac_star(model.parameters())
    optimizer.step(poisson(model))
    made = poisson(model)
    terms = [made.terms[0], replace(made.terms[1], name="wall")]
    with pytest.raises(
        ValueError, match=r"differ in 8: 0.weight in wall, A: missing instead of \[3, 3\]"
    ):
        optimizer.step(Objective(model, terms, made.points))


@pytest.mark.parametrize("name", ["kfac", "engd_per_layer", "adaptive", "kfac_intervals"])
def test_halves_that_are_trained_in_turns(name):
    """The average of one half never leaks into the other: it is refused, or there is none."""
    model = square_network()
    optimizer = OPTIMIZERS[name](model.parameters())
    model[2].requires_grad_(False)
    optimizer.step(poisson(model))
    model[2].requires_grad_(True)
    model[0].requires_grad_(False)
    before = values(model)
    if name == "adaptive":
        assert optimizer.step(poisson(model)).accepted
        return
    with pytest.raises(ValueError, match=r"choice of frozen layers: build a new optimizer"):
        optimizer.step(poisson(model))
    assert same(before, values(model))


def corrupted(state, *path):
    """Return a copy of a state with NaN at a place."""
    state = copy.deepcopy(state)
    place = state
    for key in path[:-1]:
        place = place[key]
    old = place[path[-1]]
    place[path[-1]] = torch.full_like(old, math.nan) if torch.is_tensor(old) else math.nan
    return state


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("kfac", ("param_groups", 0, "lr")),
        ("adaptive", ("state", "curvature", "damping")),
        ("kfac", ("state", "curvature", "average", "0.weight in interior, A")),
        ("kfac", ("state", 1, "momentum_buffer")),
        ("adam", ("param_groups", 0, "lr")),
        ("adam", ("state", 0, "exp_avg")),
    ],
)
def test_nan_in_a_state(name, path):
    model = network()
    adam = name == "adam"
    optimizer = (FirstOrder if adam else lambda o: o)(
        torch.optim.Adam(model.parameters()) if adam else OPTIMIZERS[name](model.parameters())
    )
    optimizer.step(poisson(model))
    state = optimizer.state_dict()
    where = "".join(rf"\[{key!r}\]" for key in path)
    with pytest.raises(ValueError, match=f"must contain no NaN, but state{where} is or has one"):
        optimizer.load_state_dict(corrupted(state, *path))
    optimizer.load_state_dict(state)
    optimizer.step(poisson(model))


def test_first_order_states_of_another_class():
    model = network()
    source = FirstOrder(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = FirstOrder(torch.optim.Adam(model.parameters()))
    with pytest.raises(ValueError, match="same class, Adam, got SGD"):
        optimizer.load_state_dict(source.state_dict())


def test_states_of_an_older_version():
    optimizer = OPTIMIZERS["kfac"](network().parameters())
    state = optimizer.state_dict()
    del state["state"]["curvature"]["names"]
    with pytest.raises(ValueError, match="saved by another version"):
        optimizer.load_state_dict(state)


def test_state_is_data():
    """Numbers, strings, tensors and containers of them, whatever the optimizer."""
    model = network()
    optimizer = OPTIMIZERS["kfac_intervals"](model.parameters())
    optimizer.step(poisson(model))
    shared = optimizer.state_dict()["state"]["curvature"]
    mine = {"step", "damping", "average", "inverted", "halvings", "rows", "names", "method"}
    assert set(shared) == mine
    assert (shared["step"], shared["damping"]) == (1, 1e-3)
    assert shared["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(shared["average"])[:2] == ["0.weight in interior, A", "0.weight in interior, B"]
    assert all(isinstance(tensor, torch.Tensor) for tensor in shared["average"].values())


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_an_operator_that_is_stored_but_not_averaged(chunk_size):
    """Bit for bit the same run, between two estimates and between two inversions."""

    def build(model):
        return fixed(
            model.parameters(),
            0.1,
            curvature=EKFAC(),
            inverse=Damped(1e-2),
            intervals=Intervals(3, 2),
        )

    model, twin = network(), network()
    optimizer, resumed = build(model), None
    for step in range(5):
        optimizer.step(poisson(model, step, chunk_size))
        if resumed is not None:
            resumed.step(poisson(twin, step, chunk_size))
        state = through_a_file([model.state_dict(), optimizer.state_dict()])
        assert resumed is None or same(values(model), values(twin))
        twin.load_state_dict(state[0])
        resumed = build(twin)
        resumed.load_state_dict(state[1])
    with pytest.raises(
        TypeError, match=r"average needs an operator with .* got EKFACLinearOperator"
    ):
        fixed(
            model.parameters(),
            curvature=EKFAC(),
            average=ExponentialAverage(0.5),
        ).step(poisson(model))


# --- another dtype, another device ----------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float32(name):
    model = network(dtype=torch.float32)
    objective, optimizer = poisson(model), OPTIMIZERS[name](model.parameters())
    start = objective.loss().item()
    for _ in range(2):
        record = optimizer.step(objective)
        assert math.isfinite(record.new_loss)
    assert objective.loss().item() < start
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("source", "target"), [(torch.float32, torch.float64), (torch.float64, torch.float32)]
)
@pytest.mark.parametrize(
    "name", ["kfac", "engd_per_layer", "gauss_newton", "kfac_intervals", "adaptive_intervals"]
)
def test_another_dtype_between_two_steps(name, source, target):
    """All that is kept follows, also between two refreshments."""
    model = network(dtype=source)
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.step(poisson(model))
    model.to(target)
    before = poisson(model).loss().item()
    for _ in range(2):
        record = optimizer.step(poisson(model))
    assert record.new_loss < before
    kept = [t for p in model.parameters() for t in optimizer.state[p].values()]
    assert all(tensor.dtype == target for tensor in kept)


def test_a_batch_of_another_dtype():
    """The points did not move with the network: an error, and no harm done."""
    model = network()
    objective, optimizer = poisson(model), presets.kfac_star(model.parameters())
    optimizer.step(objective)
    model.float()
    before = values(model)
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        optimizer.step(objective)
    assert same(before, values(model))
    assert optimizer.step(poisson(model)).accepted


@pytest.mark.parametrize("elsewhere", DEVICES)
@pytest.mark.parametrize("name", ON_DEVICES)
def test_another_device_between_two_steps(name, elsewhere):
    model, twin = network(), network()
    optimizer, reference = (OPTIMIZERS[name](m.parameters()) for m in (model, twin))
    for device in ("cpu", elsewhere, "cpu"):
        move_(model, device)
        record = optimizer.step(on_the_device(model))
        expected = reference.step(poisson(twin))
        assert record.accepted == expected.accepted
        assert all(p.device.type == device for p in model.parameters())
        for a, b in zip(values(model), values(twin), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ON_DEVICES)
def test_loading_on_another_device(name, device):
    model, twin = network(), network().to(device)
    optimizer = OPTIMIZERS[name](model.parameters())
    optimizer.step(poisson(model))
    resumed = OPTIMIZERS[name](twin.parameters())
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    expected, record = optimizer.step(poisson(model)), resumed.step(on_the_device(twin))
    assert record.loss == pytest.approx(expected.loss, rel=1e-9)
    for a, b in zip(values(twin), values(model), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-9)


def on_the_device(model):
    """Return the points of the CPU on the device of the network."""
    objective = poisson(model)
    assert all(x.device == next(model.parameters()).device for x in objective.points)
    return objective


def test_parameters_of_two_dtypes():
    """One operator acts on all parameters, so they share a dtype."""
    model = network()
    model[0].float()
    with pytest.raises((RuntimeError, ValueError), match="dtype"):
        fixed(model.parameters()).step(poisson(model))


def test_a_fit_of_ones_own_is_saved_too():
    """Per-parameter state in the order of the groups."""
    fit = LeastSquaresFit(
        [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3))],
        lambda p: torch.cat([2 * p[0], p[1]]),
    )
    optimizer = CurvatureOptimizer(fit.parameters[::-1], gram, Damped(1e-2))
    optimizer.step(fit)
    state = through_a_file(optimizer.state_dict())["state"]
    assert state[0]["previous_update"].shape == (3,)
    assert state[1]["previous_update"].shape == (2,)


def test_an_objective_of_ones_own_may_return_a_number():
    class Numbers:
        def __init__(self, objective) -> None:
            self.objective = objective

        def loss(self):
            return float(self.objective.loss())

        def linearize(self):
            return self.objective.linearize()

    ends = []
    for wrapped in (Numbers, lambda objective: objective):
        net = network()
        optimizer, objective = presets.kfac_star(net.parameters()), wrapped(poisson(net))
        ends.append([optimizer.step(objective).new_loss for _ in range(3)])
    assert ends[0] == pytest.approx(ends[1])
