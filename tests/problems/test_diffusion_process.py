"""Coefficients of the Fokker-Planck equation and their derivatives."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pinncurv.problems import (
    Box,
    FullDiffusion,
    IsotropicDiffusion,
    SpaceTimeBox,
    anisotropic_log_fokker_planck,
    fokker_planck,
    gaussian_density,
    gaussian_log_density,
    gaussian_preserving,
    log_fokker_planck,
    waves,
)
from tests.problems import oracles


def _drift(x: Tensor) -> Tensor:
    return torch.sin(x[:, 1:].flip(1)) * x[:, 1:] + x[:, :1]


def _tall(x: Tensor) -> Tensor:
    """A diffusivity [N, 3, 2] in which every entry depends on time and on every coordinate."""
    rows = torch.sin(x[:, 1:, None] + x.sum(1)[:, None, None])
    columns = torch.stack([torch.cos(x[:, 1] * x[:, 2]), torch.exp(-(x[:, 3] ** 2)) + x[:, 0]], 1)
    return 1 + rows * columns[:, None, :]


def _points(d: int, generator: torch.Generator) -> Tensor:
    """Times in [0, 1], space in [-2, 2]."""
    x = torch.rand(6, d, generator=generator, dtype=torch.float64)
    return torch.cat([x[:, :1], 4 * x[:, 1:] - 2], 1)


def _log_density(x: Tensor) -> Tensor:
    """Not a solution of anything."""
    return torch.sin(x[:, :1] + x[:, 1:2] * x[:, 2:3]) - (x[:, 1:] ** 2).sum(1, keepdim=True)


def test_density_equation_of_a_general_process(generator: torch.Generator) -> None:
    """All terms of div D and div div D are there: the residual agrees with the flux form."""
    x = _points(4, generator)
    process = FullDiffusion(3, _drift, _tall)
    problem = fokker_planck(3, process, initial=gaussian_density)
    oracle = oracles.fokker_planck(_drift, _tall)
    terms = oracles.terms_of(oracle, lambda y: torch.exp(_log_density(y)), x)
    residual = problem.terms[0].evaluate(lambda y: torch.exp(_log_density(y)), x)[:, 0]
    assert ((residual - terms.sum(1)).abs() <= 1e-13 * terms.abs().sum(1)).all()
    assert (terms.sum(1).abs() > 1e-3 * terms.abs().sum(1)).any()


def test_log_density_equation_of_a_general_process(generator: torch.Generator) -> None:
    """The residual for q is the one for p = exp(q) divided by p."""
    x = _points(4, generator)
    problem = log_fokker_planck(3, FullDiffusion(3, _drift, _tall), initial=gaussian_log_density)
    oracle = oracles.logarithmic(oracles.fokker_planck(_drift, _tall))
    terms = oracles.terms_of(oracle, _log_density, x)
    residual = problem.terms[0].evaluate(_log_density, x)[:, 0]
    assert ((residual - terms.sum(1)).abs() <= 1e-13 * terms.abs().sum(1)).all()


def test_gaussian_solves_the_equation_of_any_diffusivity(generator: torch.Generator) -> None:
    """`gaussian_preserving` finds the drift, also when D is singular (rank 2 in 3 dimensions)."""
    x = _points(4, generator)
    process = gaussian_preserving(3, _tall)
    problem = fokker_planck(3, process, solution=gaussian_density)
    oracle = oracles.fokker_planck(process.drift, _tall)
    terms = oracles.terms_of(oracle, gaussian_density, x)
    assert (terms.sum(1).abs() <= 1e-12 * terms.abs().sum(1)).all()
    residual = problem.terms[0].evaluate(gaussian_density, x)[:, 0]
    assert (residual.abs() <= 1e-12 * terms.abs().sum(1)).all()


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_closed_forms_of_waves_are_the_derivatives(dim: int, generator: torch.Generator) -> None:
    """The shipped process agrees with what torch.func computes from its drift and diffusivity."""
    x = _points(1 + dim, generator)
    process = waves(dim)
    computed = FullDiffusion(dim, process.drift, process.diffusivity)
    for name in ("velocity", "rate", "row_divergence", "double_divergence"):
        torch.testing.assert_close(
            getattr(process, name)(x), getattr(computed, name)(x), rtol=1e-12, atol=1e-13
        )


def test_waves_are_full_and_vary(generator: torch.Generator) -> None:
    """The shipped diffusion matrix has no zero and differs from point to point."""
    matrices = waves(3).matrix(_points(4, generator))
    assert (matrices != 0).all()
    assert (matrices.std(0) > 1e-3).all()
    assert torch.linalg.eigvalsh(matrices).min() > 0.1


def test_isotropic_divergence_is_computed_if_left_out(generator: torch.Generator) -> None:
    """Without a closed form, torch.func differentiates the drift in space only."""
    x = _points(3, generator)
    process = IsotropicDiffusion(2, drift=lambda x: x[:, :1] * x[:, 1:] ** 2, scale=0.3)
    expected = 2 * x[:, :1] * x[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(process.rate(x), expected)


def test_isotropic_and_full_agree(generator: torch.Generator) -> None:
    """A constant multiple of the identity is the same equation, whichever class declares it."""
    x = _points(3, generator)

    def sigma(x: Tensor) -> Tensor:
        return (0.3 * torch.eye(2, dtype=x.dtype)).expand(len(x), -1, -1)

    drift = lambda x: torch.sin(x[:, 1:])  # noqa: E731
    isotropic, full = IsotropicDiffusion(2, drift, 0.3), FullDiffusion(2, drift, sigma)
    for build, start in ((fokker_planck, gaussian_density), (log_fokker_planck, _log_density)):
        first, second = (
            build(2, process, initial=start).terms[0].evaluate(gaussian_log_density, x)
            for process in (isotropic, full)
        )
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_automatic_derivatives_do_not_depend_on_the_grad_mode(
    mode: type, generator: torch.Generator
) -> None:
    """Forward mode works under no_grad, as line searches use it."""
    x = _points(4, generator)
    term = log_fokker_planck(3, FullDiffusion(3, _drift, _tall), initial=_log_density).terms[0]
    expected = term.evaluate(_log_density, x)
    with mode():
        torch.testing.assert_close(term.evaluate(_log_density, x), expected)


def test_float32(generator: torch.Generator) -> None:
    """Coefficients follow the dtype of the points."""
    problem = anisotropic_log_fokker_planck(2, n_interior=5, n_initial=5)
    x = problem.terms[0].points.sample(generator, torch.float32, "cpu")
    residual = problem.terms[0].evaluate(problem.solution, x)
    assert residual.dtype == torch.float32
    assert residual.abs().max() < 1e-4


def test_wrong_shapes_of_coefficients(generator: torch.Generator) -> None:
    """A coefficient that would broadcast is an error with its name."""
    x = _points(3, generator)
    good = waves(2)
    with pytest.raises(ValueError, match=r"'drift' must have shape \[6, 2\] .* got \[6, 1\]"):
        replace(good, drift=lambda x: x[:, :1]).velocity(x)
    with pytest.raises(ValueError, match=r"'drift_divergence' .* \[6, 1\] .* got \[6\]"):
        replace(good, drift_divergence=lambda x: x[:, 0]).rate(x)
    with pytest.raises(ValueError, match=r"'diffusivity' .* got \[2, 2\]"):
        replace(good, diffusivity=lambda x: torch.eye(2)).matrix(x)


def test_processes_and_problems_must_fit() -> None:
    """Dimensions and initial values are checked when the problem is built."""
    with pytest.raises(ValueError, match="must have the problem's dimension 3, got 2"):
        fokker_planck(3, waves(2), initial=gaussian_density)
    with pytest.raises(ValueError, match="needs values at the start"):
        log_fokker_planck(2, waves(2))
    with pytest.raises(ValueError, match="must have dimension d_in = 3, got 4"):
        fokker_planck(2, domain=SpaceTimeBox(Box.unit(3)))


def test_own_initial_density_has_no_solution() -> None:
    """Other initial values than the known ones leave the solution unknown."""
    problem = fokker_planck(2, initial=lambda x: 2 * gaussian_density(x), name="other")
    assert problem.solution is None
    assert problem.name == "other"
