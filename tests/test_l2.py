"""The L2 term on the parameters: exact in loss, gradient and every operator."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import pinncurv as pc
from pinncurv import curvature as c
from pinncurv.linearization import Empirical, ForwardOnly

WEIGHT = 0.3


class Wave(nn.Module):
    """A network with a parameter outside of linear layers, and a layer without bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.slope = nn.Parameter(torch.tensor(1.3))
        self.second = nn.Linear(4, 3, bias=False)
        self.mix = nn.Parameter(torch.randn(3, 2))
        self.last = nn.Linear(2, 1)

    def forward(self, x):
        y = torch.tanh(self.second(torch.sin(self.slope * self.first(x))))
        return self.last(y @ self.mix)


class Diffusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.nu = nn.Parameter(torch.tensor(0.7).double())

    def forward(self, x, lap):
        return self.nu * lap - 1


def all_of(name):
    return True


def weights(name):
    return name.endswith("weight")


def some(name):
    return "nu" in name or name == "first.bias"


CHOICES = [None, all_of, weights, some]


def objective(of=None, chunk_size=None, weight=WEIGHT):
    torch.manual_seed(0)
    box = pc.Box.unit(2)
    pde = pc.LossTerm({"lap": pc.Laplacian()}, Diffusion(), box.interior(7), name="pde")
    value = pc.LossTerm({"u": pc.Value()}, lambda x, u: u - x, box.interior(5), name="value")
    terms = [pde, value, pc.L2(weight, of=of)]
    return pc.Objective.sample(Wave().double(), terms, chunk_size=chunk_size)


def decays(chosen, of):
    """Return the diagonal of the L2 term's Gauss-Newton matrix."""
    parts = []
    for name, p in chosen.named_parameters():
        own = not name.startswith("pde.") if of is None else of(name)
        parts.append(torch.full((p.numel(),), WEIGHT if own else 0.0, dtype=torch.float64))
    return torch.cat(parts)


def without(chosen):
    """Return the linearizations of the other terms."""
    pairs = list(zip(chosen.terms, chosen.points, strict=True))[:-1]
    return pc.Objective(chosen.model, *zip(*pairs, strict=True)).linearize()


@pytest.mark.parametrize(("of", "chunk_size"), [(None, 3), *((of, None) for of in CHOICES[1:])])
def test_loss_and_gradient(of, chunk_size):
    chosen = objective(of, chunk_size)
    diagonal = decays(chosen, of)
    theta = torch.cat([p.detach().flatten() for p in chosen.parameters()])
    expected = 0.5 * (diagonal * theta.square()).sum()
    losses = chosen.term_losses()
    torch.testing.assert_close(losses["l2"], expected, check_dtype=False)
    linearized = chosen.linearize()
    assert linearized.term_losses["l2"] == pytest.approx(float(expected), rel=1e-12)
    others = without(chosen)
    gradient = torch.cat([g.flatten() for g in linearized.gradient()])
    rest = torch.cat([g.flatten() for g in others.gradient()])
    torch.testing.assert_close(gradient, rest + diagonal * theta)
    chosen.backward()
    taken = torch.cat([p.grad.flatten() for p in chosen.parameters()])
    torch.testing.assert_close(taken, gradient)


RECIPES = {
    "matrix-free": pc.MatrixFreeGaussNewton(),
    "dense": pc.GaussNewton(),
    "blocks": c.BlockDiagonalGaussNewton(),
    "diagonal": c.DiagonalGaussNewton(),
    "Hessian": c.Hessian(),
    "KFAC": pc.KFAC(),
    "KFAC reduce": pc.KFAC(sharing=c.reduce),
    "KFAC forward-only": pc.KFAC(fisher=ForwardOnly()),
    "KFAC empirical": pc.KFAC(fisher=Empirical()),
    "channels": c.ChannelKronecker(),
    "every channel alone": c.ChannelKronecker(pairs=False),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("of", [all_of, weights, some])
def test_adds_a_multiple_of_the_identity(of, recipe):
    chosen = objective(of, 3 if of is all_of else None)
    got = recipe(chosen.linearize()).to_dense()
    expected = recipe(without(chosen)).to_dense() + decays(chosen, of).diag()
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("basis", [c.KFACFactors(), c.PartialTraces()])
def test_ekfac(basis):
    chosen = objective(all_of)
    linearizations = chosen.linearize()
    operator = pc.EKFAC(basis=basis)(linearizations)
    only = operator.term("l2").to_dense()
    torch.testing.assert_close(only, decays(chosen, all_of).diag(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("of", CHOICES)
def test_jacobian_kernel_and_subspace(of):
    chosen = objective(of)
    linearizations = chosen.linearize()
    exact = pc.MatrixFreeGaussNewton()(linearizations)
    G, J = exact.to_dense(), linearizations.jacobian.to_dense()
    torch.testing.assert_close(J.mT @ J, G)
    torch.testing.assert_close(c.Kernel()(linearizations).to_dense(), J @ J.mT)
    v = torch.rand(len(G), dtype=G.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linearizations.jacobian @ v, J @ v)
    u = torch.rand(len(J), dtype=G.dtype, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(linearizations.jacobian.adjoint() @ u, J.mT @ u)
    solution = torch.linalg.solve(G + 1e-2 * torch.eye(len(G)).to(G), v)
    torch.testing.assert_close(c.Woodbury(1e-2)(exact) @ v, solution)
    everything = c.SubspaceGaussNewton(points=1000)(linearizations)
    torch.testing.assert_close(everything.to_dense(), G, rtol=1e-7, atol=1e-7)


def test_best_kronecker_product_of_the_term_alone():
    linearizations = objective(all_of).linearize()
    operator = c.OptimalKronecker(per_term=True)(linearizations)
    blocks = operator.term("l2").to_dense()
    torch.testing.assert_close(blocks, WEIGHT * torch.eye(len(blocks)).double())


@pytest.mark.parametrize("of", [None, some])
def test_brute_force_agrees(of):
    chosen = objective(of)
    report = pc.verify(
        chosen.model,
        chosen.terms,
        chosen.points,
        curvature=pc.MatrixFreeGaussNewton(),
        exact=pc.verification.gauss_newton,
    )
    report.raise_if_failed()


PRESETS = ["kfac", "kfac_star", "engd", "engd_w", "spring", "levenberg_marquardt", "hessian_free"]


@pytest.mark.parametrize("preset", PRESETS)
def test_trains(preset):
    chosen = objective()
    optimizer = getattr(pc.presets, preset)(chosen.parameters(), damping=1e-4)
    first = optimizer.step(chosen)
    losses = [optimizer.step(chosen).loss for _ in range(5)]
    assert losses[-1] < first.loss
    assert "l2" in first.term_losses


def test_adam_decays_as_its_own_weight_decay():
    chosen = objective(all_of)
    model, twin = chosen.model, copy.deepcopy(chosen)
    pc.FirstOrder(torch.optim.SGD(chosen.parameters(), lr=1e-3)).step(chosen)
    rest = pc.Objective(twin.model, twin.terms[:-1], twin.points[:-1])
    sgd = torch.optim.SGD(rest.parameters(), lr=1e-3, weight_decay=WEIGHT)
    pc.FirstOrder(sgd).step(rest)
    for mine, theirs in zip(model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_follows_what_is_frozen():
    chosen = objective()
    before = chosen.term_losses()["l2"].item()
    chosen.model.first.bias.requires_grad_(False)
    after = chosen.term_losses()["l2"].item()
    missing = 0.5 * WEIGHT * chosen.model.first.bias.square().sum().item()
    assert before - after == pytest.approx(missing, rel=1e-12)
    assert len(chosen.linearize().residual[-1]) == sum(
        p.numel() for p in chosen.model.parameters() if p.requires_grad
    )


def test_the_matrix_of_a_large_network_takes_no_cube():
    model = nn.Sequential(nn.Linear(2, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh()).double()
    term = pc.LossTerm({"u": pc.Value()}, lambda x, u: u, pc.Box.unit(2).interior(1))
    chosen = pc.Objective.sample(model, [term, pc.L2(1e-2)])
    with FlopCounterMode(display=False) as counter:
        pc.GaussNewton()(chosen.linearize())
    D = sum(p.numel() for p in model.parameters())
    assert counter.get_total_flops() < 100 * D**2


def test_belongs_to_a_problem_and_can_be_pickled():
    term = pickle.loads(pickle.dumps(pc.L2(1e-3, name="decay")))
    box = pc.Box.unit(2)
    value = pc.LossTerm({"u": pc.Value()}, lambda x, u: u, box.interior(4))
    problem = pc.Problem("mine", (value, term), d_in=2, evaluation=box.interior(3))
    model = nn.Linear(2, 1).double()
    assert "decay" in pc.Objective.sample(model, problem).term_losses()


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_refuses_a_weight(weight):
    with pytest.raises(ValueError, match=r"Term 'l2': a weight must be a finite number >= 0"):
        pc.L2(weight)


def test_refuses_points_and_no_parameters():
    chosen = objective()
    x = torch.rand(3, 2).double()
    with pytest.raises(ValueError, match=r"has no points, got shape \[3, 2\]"):
        pc.Objective(chosen.model, chosen.terms, [*chosen.points[:2], x])
    terms = [*chosen.terms[:2], pc.L2(1.0, of=lambda name: name == "weihgt")]
    with pytest.raises(ValueError, match=r"chose none of slope, mix, first.weight, "):
        pc.Objective(chosen.model, terms, chosen.points)


def test_a_parameter_that_only_decays_is_an_error():
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)}).double()
    model.forward = model["used"].forward
    term = pc.LossTerm({"u": pc.Value()}, lambda x, u: u, pc.Box.unit(2).interior(4))
    with pytest.raises(ValueError, match=r"unused.weight, unused.bias is used by none.*that an L2"):
        pc.Objective.sample(model, [term, pc.L2(1.0)]).linearize()
