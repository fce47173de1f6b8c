"""KFAC against the exact Gauss-Newton matrix of a PINN, through the public interface."""

import curvlinops
import pytest
import torch
from torch import nn

from pinncurv import comparison
from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    GaussNewton,
    MatrixFreeGaussNewton,
    Objective,
    expand,
    reduce,
)
from pinncurv.linops import Damped, FactorDamping
from pinncurv.problems import poisson2d
from tests.devices import DEVICES

DAMPING = 1e-3


def linearized(device="cpu", dtype=torch.float64, width=6):
    """A Poisson problem on a small network."""
    problem, draws = poisson2d(40, 12), torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        model.append(nn.Linear(width, 1)).to(device, dtype)
    points = [x.to(device) for x in problem.sample(draws, dtype, "cpu")]
    return Objective(model, problem.terms, points).linearize()


@pytest.fixture(scope="module")
def objective():
    return linearized()


def test_spectra_of_exact_and_approximate_matrices(objective, generator):
    free = MatrixFreeGaussNewton()(objective.linearizations)
    exact = GaussNewton()(objective.linearizations)
    m = comparison.spectrum(exact)
    torch.testing.assert_close(m, torch.linalg.eigvalsh(exact.matrix).flip(0))
    pairs = comparison.largest_eigenpairs(free, 5, generator=generator)
    torch.testing.assert_close(pairs.values, m[:5])
    dense = comparison.effective_dimension(m, [DAMPING])
    density = comparison.spectral_density(free, steps=40, vectors=10, generator=generator)
    estimate = density.trace(lambda m: m / (m + DAMPING))
    assert abs(estimate.value - dense[0]) < 4 * estimate.standard_error
    kfac = KFAC()(objective.linearizations)
    assert comparison.spectrum(kfac).sum().item() == pytest.approx(kfac.trace().item())


def test_similarity_by_layer(objective, generator):
    exact = GaussNewton()(objective.linearizations)
    free = MatrixFreeGaussNewton()(objective.linearizations)
    blocks = BlockDiagonalGaussNewton()(objective.linearizations)
    for sharing in (expand, reduce):
        kfac = KFAC(sharing)(objective.linearizations)
        by_pair = comparison.frobenius_by_layer_pair(kfac, free)
        by_layer = comparison.frobenius_by_layer(kfac, blocks)
        torch.testing.assert_close(by_pair.diagonal().cosine, by_layer.cosine)
        assert bool((by_layer.cosine > 0.2).all())
        assert not by_pair.cosine.triu(1).any()
        estimate = comparison.estimate_frobenius(
            kfac, free, vectors=60, generator=generator, sketch=8
        )
        difference = (estimate.cosine.value - comparison.frobenius(kfac, exact).cosine).abs()
        assert difference < 4 * estimate.cosine.standard_error + 1e-12
    shares = comparison.mass(comparison.squared_block_norms(free, kfac.blocks))
    captured = comparison.frobenius(blocks, exact)
    expected = captured.squared_norm / captured.squared_reference_norm
    torch.testing.assert_close(shares.diagonal().sum(), expected)
    # the best that a block-diagonal matrix can do is to agree with the diagonal blocks
    torch.testing.assert_close(captured.cosine, expected.sqrt())


def test_what_the_inverses_do(objective, generator):
    exact = GaussNewton()(objective.linearizations)
    free = MatrixFreeGaussNewton()(objective.linearizations)
    kfac = KFAC()(objective.linearizations)
    gradient = objective.gradient()
    inverses = {
        "exact": Damped(DAMPING)(exact),
        "kfac": Damped(DAMPING)(kfac),
        "factor damping": FactorDamping(DAMPING)(kfac),
    }
    fractions = {
        name: comparison.decrease_fraction(
            free, DAMPING, gradient, inverse @ gradient, inverses["exact"]
        )
        for name, inverse in inverses.items()
    }
    assert fractions["exact"] == pytest.approx(1)
    assert all(0 < fractions[name] < 0.999 for name in ("kfac", "factor damping"))
    assert comparison.step_cosine(inverses["kfac"], inverses["exact"], gradient) > 0
    records = comparison.cg_records(free, DAMPING, gradient, {"none": None, **inverses})
    assert records["exact"].iterations <= 3
    for name, inverse in inverses.items():
        spectrum = comparison.generalized_spectrum(exact, inverse, DAMPING)
        ends = comparison.generalized_extremes(
            free, inverse, DAMPING, steps=len(spectrum), generator=generator
        )
        assert ends.largest == pytest.approx(spectrum[0].item(), rel=1e-6), name
        assert ends.smallest == pytest.approx(spectrum[-1].item(), rel=1e-4), name


def test_float32_agrees_with_float64(objective):
    single = linearized(dtype=torch.float32).linearizations
    for recipe in (GaussNewton(), BlockDiagonalGaussNewton()):
        coarse, fine = recipe(single), recipe(objective.linearizations)
        values = comparison.spectrum(coarse), comparison.spectrum(fine)
        torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3 * values[1][0].item())
        assert comparison.frobenius(coarse, fine).relative_error < 0.5


@pytest.mark.filterwarnings("ignore")
def test_an_operator_of_curvlinops_that_differentiates(generator):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    data = [(torch.rand(9, 2).double(), torch.rand(9, 1).double())]
    parameters = list(model.parameters())
    hessian = curvlinops.HessianLinearOperator(model, nn.MSELoss(), parameters, data)
    ggn = curvlinops.GGNLinearOperator(model, nn.MSELoss(), parameters, data)
    eye = torch.eye(17).double()
    H, G = (hessian @ eye).detach(), (ggn @ eye).detach()
    torch.testing.assert_close(comparison.spectrum(ggn), torch.linalg.eigvalsh(G).flip(0))
    pairs = comparison.largest_eigenpairs(hessian, 3, generator=generator)
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(H).flip(0)[:3])
    expected = (H - G).norm() / G.norm()
    torch.testing.assert_close(comparison.frobenius(hessian, ggn).relative_error, expected)


@pytest.mark.parametrize("elsewhere", DEVICES)
def test_results_on_a_device_are_those_on_the_cpu(elsewhere):
    received = []
    for device in ("cpu", elsewhere):
        linearizations = linearized(device).linearizations
        free = MatrixFreeGaussNewton()(linearizations)
        kfac = KFAC()(linearizations)
        inverse, draws = Damped(DAMPING)(kfac), torch.Generator().manual_seed(0)
        options = {"generator": draws}
        pairs = comparison.largest_eigenpairs(free, 3, **options)
        ends = comparison.generalized_extremes(free, inverse, DAMPING, steps=10, **options)
        density = comparison.spectral_density(free, steps=10, vectors=2, **options)
        estimate = comparison.estimate_frobenius_by_layer_pair(kfac, free, vectors=4, **options)
        assert pairs.vectors.device.type == density.nodes.device.type == device
        results = [
            comparison.spectrum(kfac),
            comparison.generalized_spectrum(free, inverse, DAMPING),
            comparison.frobenius_by_layer_pair(kfac, free).cosine,
            estimate.cosine.value,
            pairs.values,
            torch.tensor([ends.smallest, ends.largest]).double(),
            density.trace(torch.exp).value,
        ]
        received.append([result.cpu() for result in results])
    for on_cpu, on_device in zip(*received, strict=True):
        torch.testing.assert_close(on_cpu, on_device, rtol=1e-6, atol=1e-8)
