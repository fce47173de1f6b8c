"""Compiled passes: what is traced equals what is written, whatever changes between calls."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from pinncurv import presets
from pinncurv.curvature import KFAC, Objective
from pinncurv.diffops import Laplacian, SecondOrder, Value
from pinncurv.linearization import DenseRows, LinearLayer
from pinncurv.machine import NotCompiled, compilation
from pinncurv.problems import Energy, Fixed, LossTerm
from tests import kinds, networks, terms

NETWORKS = {
    **dict.fromkeys(networks.KINDS, networks.build),
    **dict.fromkeys({**kinds.KINDS, **kinds.UNUSUAL}, kinds.build),
}
POISSON = LossTerm(
    {"lap": Laplacian()}, lambda x, lap: lap + x.sin().prod(1, True), Fixed(torch.rand(1, 2))
)


@pytest.fixture
def traced(monkeypatch):
    """Graphs that are run as they are, which takes no compiler; how many were handed over."""
    handed = []

    def run_of(graph, like, device):
        handed.append(graph)
        return graph

    monkeypatch.setattr(compilation, "_run_of", run_of)
    return handed


def tensors(chunk) -> list[torch.Tensor]:
    result = [chunk.residual, chunk.unscaled]
    for block in chunk.blocks.values():
        if isinstance(block, LinearLayer):
            result += [block.Z, block.G]
        if isinstance(block, DenseRows):
            result += [block.matrix]
    return result


def everything(objective: Objective) -> list[torch.Tensor]:
    """Return what the passes of an objective return, and sums of that."""
    linearized = objective.linearize()
    parts = [t for linearization in linearized for chunk in linearization for t in tensors(chunk)]
    parts += linearized.gradient()
    parts += linearized.residual_now()
    parts += KFAC()(linearized).tensors()
    v = [torch.ones_like(p) for p in objective.parameters()]
    parts += linearized.jacobian @ v
    with torch.no_grad():
        parts += objective.term_losses().values()
    loss = objective.loss()
    parts += [loss.detach(), *torch.autograd.grad(2 * loss, objective.parameters())]
    return parts


def compare(model, chosen, points, **options) -> Objective:
    """Compare what is compiled with what is not; return the former."""
    compiled = Objective(model, chosen, points, compile=True, check=False, **options)
    plain = Objective(model, chosen, points, check=False, **options)
    for mine, other in zip(everything(compiled), everything(plain), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-11)
    return compiled


def moved(model) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3).add_(0.1)


# Kinds whose parts other kinds are made of, too: other elementwise functions, and the same blocks.
ALIKE = {
    *("residual", "fourier", "hard_boundary", "gelu", "silu", "softplus", "linear", "no_bias"),
    *("pirate", "factorized", "deeponet", "neumann", "anchored", "sliced", "gated", "centres"),
    *("kinds first", "kinds poisson", "kinds biharmonic", "kinds wave", "allen_cahn", "diffusion"),
}


def cases(names):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in ALIKE else []) for n in names]


@pytest.mark.parametrize("name", cases(NETWORKS))
def test_networks_of_all_kinds(name, traced):
    model, several = NETWORKS[name](name), name == "pair"
    chosen = kinds.TERMS["first"]()
    chosen = [kinds.on_outputs(chosen, 0, 1)] if several else [chosen]
    for seed in (1, 2):
        compare(model, chosen, [networks.points(3, seed=seed)])
        moved(model)
    assert traced


TERMS = {**{f"kinds {n}": make for n, make in kinds.TERMS.items()}}
TERMS |= {n: (lambda term=term: term) for n, term in terms.TERMS.items()}


@pytest.mark.parametrize("name", cases(TERMS))
def test_terms_of_all_kinds(name, traced):
    term, model = TERMS[name](), networks.build("tanh")
    compare(model, [term], [networks.points(3, seed=1)])
    graphs = len(traced)
    moved(model)
    compare(model, [term], [networks.points(3, seed=2)])
    assert len(traced) == graphs  # other points and parameters take no new graph


def test_chunks(traced):
    compare(networks.build("tanh"), [POISSON], [networks.points(12)], chunk_size=4)


def test_a_coefficient_that_is_written_to(traced):
    matrix = torch.eye(2, dtype=torch.float64)
    term = LossTerm({"a": SecondOrder(matrix)}, lambda x, a: a - 1, Fixed(torch.rand(1, 2)))
    model, x = networks.build("tanh"), networks.points(4)
    objective = compare(model, [term], [x])
    before = objective.loss().item()
    matrix.mul_(2)
    assert objective.loss().item() != before
    compare(model, [term], [x])


def test_a_number_and_a_buffer_that_change(traced):
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.factor = networks.build("tanh"), 1.0
            self.register_buffer("shift", torch.zeros(1, dtype=torch.float64))

        def forward(self, x):
            return self.factor * self.net(x) + self.shift

    model, x = Scaled(), networks.points(4)
    term = LossTerm({"u": Value()}, lambda x, u: u - 1, Fixed(torch.rand(1, 2)))
    objective = compare(model, [term], [x])
    losses = [objective.loss().item()]
    model.factor = 2.0
    losses.append(objective.loss().item())
    compare(model, [term], [x])
    model.shift += 0.5
    losses.append(objective.loss().item())
    compare(model, [term], [x])
    assert len(set(losses)) == 3


def test_numbers_that_change_all_the_time_are_not_compiled(traced):
    strength = [1.0]
    term = LossTerm({"u": Value()}, lambda x, u: strength[0] * u - 1, Fixed(torch.rand(1, 2)))
    model, x = networks.build("tanh"), networks.points(4)
    objective = Objective(model, [term], [x], compile=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(20):
            strength[0] = 1.0 + step
            plain = Objective(model, [term], [x])
            assert objective.loss().item() == pytest.approx(plain.loss().item())
    assert [w.category for w in caught] == [NotCompiled]
    assert "compiled more than" in str(caught[0].message)


class Reads(nn.Module):
    """Uses the number in a parameter, in a way that no graph can follow."""

    def __init__(self, how) -> None:
        super().__init__()
        self.net, self.how = networks.build("tanh"), how
        self.a = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))

    def forward(self, x):
        return self.net(x) * self.how(self.a.detach()) + self.a


READS = {
    "item": lambda a: a.item(),
    "float": lambda a: float(a[0]),
    "numpy": lambda a: a.numpy()[0],
    "list": lambda a: a.tolist()[0],
    "branch": lambda a: 2.0 if a > 0.5 else 3.0,
}


@pytest.mark.parametrize("how", READS)
def test_values_are_not_frozen_into_graphs(how, traced):
    model, x = Reads(READS[how]), networks.points(4)
    objective = Objective(model, [POISSON], [x], compile=True)
    with pytest.warns(NotCompiled, match="passes of term .* can't be compiled"):
        objective.linearize()
    for _ in range(3):
        moved(model)
        plain = Objective(model, [POISSON], [x])
        assert objective.loss().item() == pytest.approx(plain.loss().item())


def test_values_of_points_are_not_frozen_into_graphs(traced):
    term = LossTerm(
        {"u": Value()},
        lambda x, u: u - torch.from_numpy(x.detach().numpy()).sum(1, True),
        Fixed(torch.rand(1, 2)),
    )
    model = networks.build("tanh")
    with pytest.warns(NotCompiled):
        Objective(model, [term], [networks.points(4)], compile=True).linearize()
    for seed in range(3):
        x = [networks.points(4, seed=seed)]
        mine, plain = Objective(model, [term], x, compile=True), Objective(model, [term], x)
        assert mine.loss().item() == pytest.approx(plain.loss().item())


def test_without_a_compiler_there_is_one_warning_for_each_term(monkeypatch):
    def none(*args, **kwargs):
        raise RuntimeError("No C++ compiler was found")

    monkeypatch.setattr(torch._inductor, "compile", none)
    model = networks.build("tanh")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        objective = Objective(model, [POISSON], [networks.points(6)], compile=True)
        optimizer = presets.kfac_star(objective.parameters())
        records = [optimizer.step(objective) for _ in range(3)]
    messages = [str(w.message) for w in caught if w.category is NotCompiled]
    assert len(messages) == len(set(messages)) == 2  # of the term, and of sums over points
    assert all("No C++ compiler" in message for message in messages)
    assert records[-1].new_loss < records[0].loss


def test_the_compiler(monkeypatch):
    """The only test that compiles."""
    handed = []
    compile = torch._inductor.compile
    monkeypatch.setattr(
        torch._inductor, "compile", lambda *args, **kw: handed.append(1) or compile(*args, **kw)
    )
    model = networks.build("tanh")
    for seed in (1, 2, 3):
        compare(model, [POISSON], [networks.points(6, seed=seed)])
    assert 0 < len(handed) < 10


def test_what_is_not_compiled_is_not_kept(traced, monkeypatch):
    objective = Objective(networks.build("tanh"), [POISSON], [networks.points(4)], compile=True)
    passes = objective._bound[0]._passes
    with torch.inference_mode():
        objective.term_losses()
    assert not passes.templates
    objective.linearize().run()
    assert passes.templates
    monkeypatch.setattr(compilation, "_MOST_GRAPHS", 0)
    with pytest.warns(NotCompiled):
        objective.term_losses()
    assert not passes.templates
    objective.linearize().run()
    assert not passes.templates


def test_sums_of_many_shapes_are_not_all_compiled(traced, monkeypatch):
    monkeypatch.setattr(compilation, "_MOST_CLOSED", 3)
    objective = Objective(networks.build("tanh"), [POISSON], [networks.points(6)], compile=True)
    J = objective.linearize().jacobian
    plain = Objective(objective.model, [POISSON], objective.points).linearize().jacobian
    for K in range(1, 7):  # products with K vectors
        V = torch.randn(J.shape[1], K, dtype=torch.float64)
        torch.testing.assert_close(J @ V, plain @ V)
    assert len(traced) == 1 + 3


def test_training_takes_the_same_steps(traced):
    losses = []
    for compile in (False, True):
        model = networks.build("tanh")
        objective = Objective(model, [POISSON], [networks.points(20)], compile=compile)
        optimizer = presets.kfac_star(objective.parameters(), damping=1e-6)
        losses.append([optimizer.step(objective).new_loss for _ in range(10)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_second_derivative_is_refused_rather_than_dropped(traced):
    model = networks.build("tanh")
    objective = Objective(model, [POISSON], [networks.points(4)], compile=True)
    with pytest.raises(RuntimeError, match=r"must not be differentiated again.*compile=False"):
        torch.autograd.grad(objective.loss(), objective.parameters(), create_graph=True)


def test_a_loss_in_inference_mode_spoils_no_later_gradient(traced):
    model, x = networks.build("tanh"), [networks.points(4)]
    with torch.inference_mode():
        objective = Objective(model, [POISSON], x, compile=True)
        first = objective.loss().item()
    (loss := objective.loss()).backward()
    assert loss.item() == pytest.approx(first)
    assert all(p.grad.isfinite().all() for p in objective.parameters())


def _residual(x, lap):
    return lap + x.sin().prod(1, True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_bring_no_compiled_code(copied, monkeypatch):
    def run_of(graph, like, device):
        def run(*inputs):  # can't be pickled, as what a compiler returns
            return graph(*inputs)

        return run

    monkeypatch.setattr(compilation, "_run_of", run_of)
    term = LossTerm({"lap": Laplacian()}, _residual, Fixed(torch.rand(1, 2)))
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    objective = Objective(model, [term], [networks.points(4)], compile=True)
    everything(objective)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = copied(objective)
    for mine, theirs in zip(everything(objective), everything(other), strict=True):
        torch.testing.assert_close(mine, theirs)
    moved(other.model)
    assert other.loss().item() != pytest.approx(objective.loss().item())


def test_an_energy_runs_as_written_after_one_warning(traced):
    x = networks.points(6)
    energy = Energy({"u": Value()}, density=lambda x, u: u**2 - u, points=Fixed(x), name="energy")
    ends = []
    for compile in (True, False):
        objective = Objective(networks.build("tanh"), [energy], [x], compile=compile)
        optimizer = presets.kfac_star(objective.parameters())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ends.append([optimizer.step(objective).new_loss for _ in range(4)])
        categories = [w.category for w in caught]
        assert categories == [NotCompiled] * compile
    assert ends[0] == pytest.approx(ends[1])
