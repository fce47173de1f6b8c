"""Time windows, causal weights and residual-based resampling, each in a training of few steps."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from pinncurv import presets
from pinncurv.curvature import Objective
from pinncurv.diffops import Partial, Value
from pinncurv.problems import (
    Ansatz,
    Box,
    CausalWeights,
    Fixed,
    LossTerm,
    Problem,
    ResidualBased,
    SpaceTimeBox,
    Windows,
    allen_cahn,
    dirichlet,
    kdv,
    kdv_two_solitons,
    kuramoto_sivashinsky,
    nls,
)

SHIFT = torch.tensor([[0.1, 0.0]], dtype=torch.float64)


def _decay(start: float, end: float, initial=None) -> Problem:
    """u_t = -u, from 1 + x."""
    domain = SpaceTimeBox(Box.unit(1), start, end)
    term = LossTerm(
        {"u": Value(), "u_t": Partial(0)}, lambda x, u, u_t: u_t + u, domain.interior(40)
    )
    values = (lambda x: 1 + x[:, 1:]) if initial is None else initial
    return Problem("decay", (term, dirichlet(values, domain.initial(20))), 2, domain.interior(50))


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.mark.parametrize("hard", [False, True])
def test_windows_are_trained_one_after_the_other(hard: bool, generator: torch.Generator) -> None:
    windows = Windows((0.0, 0.5, 1.0, 2.0))
    while not windows.complete:
        problem = windows.problem(_decay)
        model: nn.Module = windows.scaled(_network())
        if hard and windows.state is not None:
            model = Ansatz(model, windows.state.elapsed, windows.state)
        objective = Objective.sample(model, problem, generator)
        optimizer = presets.levenberg_marquardt(objective.parameters())
        for _ in range(25):
            optimizer.step(objective)
        windows.append(model)
    x = torch.rand(200, 2, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0])
    expected = (1 + x[:, 1:]) * torch.exp(-x[:, :1])
    assert (windows(x) - expected).norm() < 2e-3 * expected.norm()
    assert not any(p.requires_grad for p in windows.parameters())
    twin = pickle.loads(pickle.dumps(windows))
    assert torch.equal(twin(x), windows(x))
    if hard:  # there is no jump
        edge = torch.cat([torch.full((9, 1), 0.5).double(), x[:9, 1:]], 1)
        left, right = windows.networks[0](edge), windows.networks[1](edge)
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)


def test_windows_of_an_ansatz_share_the_networks_before(generator: torch.Generator) -> None:
    """Not a copy of the whole chain in every window; in the k-th, k networks are passed."""
    windows = Windows((0.0, 1.0, 2.0, 3.0))
    while not windows.complete:
        model: nn.Module = _network()
        if windows.state is not None:
            model = Ansatz(model, windows.state.elapsed, windows.state)
        windows.append(model)
    count = sum(p.numel() for p in _network().parameters())
    assert sum(p.numel() for p in windows.parameters()) == 3 * count
    twin = pickle.loads(pickle.dumps(windows))
    assert sum(p.numel() for p in twin.parameters()) == 3 * count
    passes: list[nn.Module] = []
    for module in windows.modules():
        if isinstance(module, nn.Sequential):
            module.register_forward_hook(lambda module, *_: passes.append(module))
    for k, network in enumerate(windows.networks, 1):
        passes.clear()
        network(torch.rand(2, 2, generator=generator, dtype=torch.float64))
        assert len(passes) == len(set(passes)) == k


def test_points_go_to_the_network_of_their_window() -> None:
    windows = Windows((0.0, 1.0, 3.0))
    for value in (1.0, 2.0):
        network = nn.Linear(2, 1).double()
        nn.init.zeros_(network.weight)
        nn.init.constant_(network.bias, value)
        windows.append(network)
        nn.init.constant_(network.bias, 7.0)  # it was copied
    times = torch.tensor([2.5, 0.0, 1.0, 1.5, 0.2, 3.0], dtype=torch.float64)
    x = torch.stack([times, 0 * times], 1).requires_grad_()
    values = windows(x)
    assert values[:, 0].tolist() == [2.0, 1.0, 1.0, 2.0, 1.0, 2.0]
    assert torch.autograd.grad(values.sum(), x)[0].shape == (6, 2)
    assert windows(x[:0]).shape == (0, 1)


def test_state_is_the_network_at_the_edge(generator: torch.Generator) -> None:
    windows = Windows((0.0, 0.25, 1.0))
    assert windows.state is None
    network = _network()
    windows.append(network)
    problem = windows.problem(partial(kdv, 30, 20))
    interior, start = problem.sample(generator, torch.float64, "cpu")
    assert (start[:, 0] == 0.25).all()
    assert interior[:, 0].min() >= 0.25
    for x in (start, start + SHIFT):
        residual = problem.terms[1].apply(start, {"u": network(start)})
        assert residual.abs().max() < 1e-15
        torch.testing.assert_close(windows.state(x), network(start))


@pytest.mark.parametrize("build", [allen_cahn, kdv, kuramoto_sivashinsky, nls, kdv_two_solitons])
def test_problems_in_a_part_of_the_time(build, generator: torch.Generator) -> None:
    def at_start(x: Tensor) -> Tensor:
        return 2 * x[:, 1:].expand(-1, 1 + (build is nls))

    problem = build(n_interior=30, start=0.25, end=0.5, initial=at_start, initial_weight=1e3)
    points = dict(zip(problem.terms, problem.sample(generator, torch.float64, "cpu"), strict=True))
    for term, x in points.items():
        assert (x[:, 0] >= 0.25).all()
        assert (x[:, 0] <= 0.5).all()
        assert term.weight == (1e3 if term.name == "initial" else 1)
    term, x = next((t, x) for t, x in points.items() if t.name == "initial")
    assert (x[:, 0] == 0.25).all()
    ones = torch.ones(len(x), problem.d_out, dtype=torch.float64)
    assert torch.equal(term.apply(x, {"u": ones}), 1 - at_start(x))


def test_time_of_a_window_goes_from_minus_one_to_one() -> None:
    windows, points = Windows((0.0, 0.5, 2.0)), torch.tensor([[0.5, 3.0], [1.25, 4.0], [2.0, 5.0]])
    windows.append(_network())
    scaled = windows.scaled(nn.Identity())(points)
    assert scaled.tolist() == [[-1.0, 3.0], [0.0, 4.0], [1.0, 5.0]]


def test_windows_in_order() -> None:
    for edges in ((0.0,), (0.0, 1.0, 1.0), (0.0, torch.inf)):
        with pytest.raises(ValueError, match=r"two or more finite times that increase, got \(0\.0"):
            Windows(edges)
    windows = Windows((0.0, 1.0))
    with pytest.raises(ValueError, match=r"a window that is trained, got none of \(0\.0, 1\.0\)"):
        windows(torch.tensor([[0.0, 0.0]]))
    windows.append(_network())
    with pytest.raises(ValueError, match=r"windows that are trained, \[0.0, 1.0\], got 1.5 to 1.5"):
        windows(torch.tensor([[1.5, 0.0]]))
    with pytest.raises(ValueError, match=r"a window left to train, got all 1 of \(0\.0, 1\.0\)"):
        windows.append(_network())
    with pytest.raises(ValueError, match="a window left to train"):
        windows.problem(_decay)


def test_causal_weights_are_those_of_the_formula(generator: torch.Generator) -> None:
    problem, model = allen_cahn(300), _network()
    causal = CausalWeights(0.0, 1.0, slabs=4, tolerance=0.3)
    x = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    assert (causal(x) == 1).all()
    causal.update_(problem.terms[0], model, x)
    squares = problem.terms[0].evaluate(model, x)[:, 0] ** 2
    losses = [squares[(x[:, 0] >= i / 4) & (x[:, 0] < (i + 1) / 4)].mean() for i in range(4)]
    for i in range(4):
        inside = (x[:, 0] >= i / 4) & (x[:, 0] < (i + 1) / 4)
        expected = torch.exp(-0.3 * sum(losses[:i], torch.zeros(()).double()))
        torch.testing.assert_close(causal(x)[inside], expected.expand(int(inside.sum())))
    edges = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    assert causal(edges).tolist() == [causal.by_slab[0], causal.by_slab[-1]]
    assert causal(x.float()).dtype == torch.float32


def test_an_objective_follows_causal_weights() -> None:
    """Loss, gradient and curvature are those of a fixed weight per point."""
    problem, model = allen_cahn(60, 20), _network()
    causal = CausalWeights(0.0, 1.0, slabs=8)
    term = replace(problem.terms[0], weight=causal)
    objective = Objective.sample(model, [term, problem.terms[1]])
    before, x = objective.loss().item(), objective.points[0]
    causal.update_(term, model, x)
    fixed = replace(problem.terms[0], points=Fixed(x), weight=causal(x))
    expected = Objective(model, [fixed, problem.terms[1]], objective.points)
    assert objective.loss().item() != before
    torch.testing.assert_close(objective.loss(), expected.loss())
    for mine, wanted in zip(
        objective.linearize().gradient(), expected.linearize().gradient(), strict=True
    ):
        torch.testing.assert_close(mine, wanted)
    optimizer = presets.levenberg_marquardt(objective.parameters())
    smallest = causal.by_slab.min().item()
    for _ in range(15):
        causal.update_(term, model, x)
        assert optimizer.step(objective).accepted
    assert causal.by_slab.min() > smallest
    assert len(pickle.loads(pickle.dumps(causal)).by_slab) == 8


def test_causal_weights_need_a_slab(shapes_unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"a start before .*, got start=1\.0, end=0\.0, slabs=32"):
        CausalWeights(1.0, 0.0)
    for wrong in ({"slabs": 0}, {"slabs": 2.0}, {"tolerance": -1.0}, {"tolerance": torch.nan}):
        with pytest.raises(ValueError, match=r"a finite tolerance >= 0, got start=0\.0, end=1\.0"):
            CausalWeights(0.0, 1.0, **wrong)


def _step(x: Tensor, u: Tensor) -> Tensor:
    """Three for x < 1/4, one elsewhere, times the network."""
    return u * (1 + 2 * (x < 0.25).to(x.dtype))


class _Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x):
        return self.value + 0 * x


def test_resampling_has_the_density_of_the_formula(generator: torch.Generator) -> None:
    """Nine to one by the squared residual, plus the floor: mean of the squares is three."""
    term = LossTerm({"u": Value()}, _step, Box.unit(1).interior(40_000))
    sampler = ResidualBased(term, _Constant(), 1000, power=2, floor=0.5)
    x = sampler.sample(generator, torch.float64, "cpu")
    assert x.shape == (1000, 1)
    share = 0.25 * (9 / 3 + 0.5) / 1.5
    deviation = (share * (1 - share) / 1000) ** 0.5
    # without replacement the share is a little smaller: the candidates are 40 times as many
    assert abs((x < 0.25).double().mean() - share) < 4 * deviation
    assert x.unique().numel() == 1000


def test_candidates_are_drawn_as_often_as_asked(generator: torch.Generator) -> None:
    """A network that solves the equation on the right keeps points of the left alone."""
    term = LossTerm({"u": Value()}, _step, Box.unit(1).interior(100))
    sampler = ResidualBased(term, _Constant(), 100, power=20, floor=1e-6, draws=8)
    x = sampler.sample(generator, torch.float64, "cpu")
    assert x.shape == (100, 1)
    assert (x < 0.25).all()
    with pytest.raises(ValueError, match="among as many candidates or more, got n=801 of 800"):
        ResidualBased(term, _Constant(), 801, draws=8)


def test_resampling_in_a_training(generator: torch.Generator) -> None:
    problem, model = allen_cahn(400, 20), _network()
    term = replace(problem.terms[0], points=ResidualBased(problem.terms[0], model, 50))
    objective = Objective.sample(model, [term, problem.terms[1]], generator)
    uniform = problem.terms[0].points.sample(generator, torch.float64, "cpu")
    size = [term.evaluate(model, x).abs().mean() for x in (objective.points[0], uniform)]
    assert size[0] > 1.05 * size[1]
    optimizer = presets.levenberg_marquardt(objective.parameters())
    first = optimizer.step(objective)
    second = optimizer.step(objective.resampled(generator))
    assert first.accepted
    assert second.accepted
    copy.deepcopy(term)


def test_resampling_where_nothing_is_left(generator: torch.Generator) -> None:
    """A residual of zero everywhere leaves the uniform distribution."""
    model = _Constant()
    nn.init.zeros_(model.value)
    term = LossTerm({"u": Value()}, _step, Box.unit(1).interior(100))
    assert ResidualBased(term, model, 10).sample(generator, torch.float64, "cpu").shape == (10, 1)


def test_resampling_needs_finite_residuals(generator: torch.Generator) -> None:
    model = _Constant()
    nn.init.constant_(model.value, torch.nan)
    term = LossTerm({"u": Value()}, _step, Box.unit(1).interior(100), name="steps")
    sampler = ResidualBased(term, model, 10)
    with pytest.raises(FloatingPointError, match=r"finite .* term 'steps' with a mean of nan"):
        sampler.sample(generator, torch.float64, "cpu")


def test_resampling_needs_candidates(shapes_unchecked: None) -> None:
    term = LossTerm({"u": Value()}, _step, Box.unit(1).interior(10))
    with pytest.raises(ValueError, match="among as many candidates or more, got n=11 of 10"):
        ResidualBased(term, _Constant(), 11)
    fixed = replace(term, points=Fixed(torch.zeros(10, 1)))
    with pytest.raises(ValueError, match="others every time, got those of"):
        ResidualBased(fixed, _Constant(), 11, draws=2)
    for floor in (0, -1.0, torch.nan):
        with pytest.raises(
            ValueError, match=r"The floor must be positive and finite, got .*\. Pass"
        ):
            ResidualBased(term, _Constant(), 5, floor=floor)
    fixed = replace(term, points=Fixed(torch.rand(10, 1)))
    with pytest.raises(ValueError, match="must be others every time, got those of term"):
        ResidualBased(fixed, _Constant(), 5, draws=2)
    with pytest.raises(ValueError, match=r"The power must be finite, got nan\. Pass"):
        ResidualBased(term, _Constant(), 5, power=torch.nan)
    for n in (0, 2.0):
        with pytest.raises(ValueError, match="must be an int of at least 1, got n="):
            ResidualBased(term, _Constant(), n)
