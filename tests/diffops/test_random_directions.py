"""Estimates along random directions: their law, where they are exact, what they compute."""

import pickle
from dataclasses import replace

import pytest
import torch

from pinncurv.diffops import (
    Bilaplacian,
    Derivative,
    DifferentialOperator,
    Directional,
    Gradient,
    Laplacian,
    Partial,
    Plan,
    RandomCoordinates,
    RandomDirections,
    RandomSigns,
    SecondOrder,
    Value,
    evaluate,
)
from pinncurv.diffops.point_bits import point_bits
from tests import oracles
from tests.networks import build, points

KINDS = (RandomCoordinates, RandomSigns)
D = 4
C = torch.tensor(
    [[1.0, 0.5, -0.2, 0], [0.1, 2.0, 0.7, 0.3], [0.0, 0.3, -1.0, 0.2], [0.4, 0, 0, 0.5]]
).double()
F = torch.tensor([[1.0, 0.2, 0.5], [-0.5, 0.4, 1.0], [0.3, 1.1, 0.1], [0.7, -0.2, 0.6]]).double()


def matrix_field(x):
    return torch.einsum("ni,nj->nij", torch.sin(x), 1 + x)


def factor_field(x):
    return torch.stack([x, torch.cos(x), 1 - x], -1)


def operators(sampling: RandomDirections | None) -> dict[str, DifferentialOperator]:
    return {
        "laplacian": Laplacian(sampling=sampling),
        "laplacian_dims": Laplacian(dims=(-1, 0, 2), sampling=sampling),
        "matrix": SecondOrder(C, sampling=sampling),
        "matrix_diagonal": SecondOrder(torch.diag(C.diagonal()), sampling=sampling),
        "matrix_field": SecondOrder(matrix_field, sampling=sampling),
        "matrix_dims": SecondOrder(C[:3, :3], dims=(2, 0, -1), sampling=sampling),
        "diagonal_field": SecondOrder(lambda x: torch.diag_embed(1 + x**2), sampling=sampling),
        "factors": SecondOrder.from_factors(F, sampling=sampling),
        "factor_field": SecondOrder.from_factors(factor_field, sampling=sampling),
    }


# --- bits of a point ------------------------------------------------------------------------------

_MASK = (1 << 64) - 1


def _mixed(word: int) -> int:
    """The last step of splitmix64, in integers without a size."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def test_bits_are_those_of_splitmix64_in_integers_of_any_size():
    x, step = points(3, 2), 0x9E3779B97F4A7C15
    for seed in (0, 5, -7, (1 << 63) - 1):
        received = point_bits(x, seed, 4)
        for n in range(len(x)):
            words = x[n].float().view(torch.int32).tolist()
            start = _mixed(seed & _MASK)
            total = sum(_mixed((w + start + i * step) & _MASK) for i, w in enumerate(words, 1))
            of_point = _mixed(total & _MASK)
            wanted = [_mixed((of_point + i * step) & _MASK) for i in range(1, 5)]
            assert [word & _MASK for word in received[n].tolist()] == wanted


def test_bits_depend_on_the_point_alone():
    x = points(9, D)
    bits = point_bits(x, 3, 5)
    order = torch.tensor([4, 1, 8])
    assert torch.equal(point_bits(x[order], 3, 5), bits[order])
    assert torch.equal(point_bits(x.float(), 3, 5), bits)
    assert torch.equal(point_bits(x, 3, 2), bits[:, :2])
    moved = x.clone()
    moved[0, 2] += 1e-6
    assert point_bits(moved, 3, 5).ne(bits).any(1).tolist() == [True] + [False] * 8
    zeros = torch.zeros(1, D)
    assert torch.equal(point_bits(zeros, 0, 2), point_bits(-zeros, 0, 2))


def test_bits_are_balanced_and_independent():
    """Of neighbours, seeds, and words; bounds of five standard errors."""
    count = 20_000
    x = torch.arange(count, dtype=torch.float64)[:, None] / 1024
    first, second = point_bits(x, 0, 2), point_bits(x, 1, 2)
    pairs = (
        first,
        first[1:] ^ first[:-1],  # of a point and its neighbour
        first[:, :1] ^ first[:, 1:],  # of one word and the next
        first ^ second,  # of one seed and the next
        first ^ (first >> 1),  # of one bit and the next
    )
    for words in pairs:
        for bit in range(63):
            values = (words >> bit & 1).double()
            assert abs(values.mean() - 0.5) < 5 * 0.5 / values.numel() ** 0.5


# --- the law of the directions --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("samples", "k"), [(1, 1), (3, 5), (5, 5), (70, 80)])
def test_directions_are_unit_vectors_with_the_right_covariance(kind, samples, k):
    count = 4000
    z = kind(samples, seed=2).draw(points(count, 3), k)
    assert z.shape == (samples, count, k)
    torch.testing.assert_close(z.norm(dim=2), torch.ones(samples, count).double())
    if kind is RandomSigns:  # every sample alone, too; coordinates are sorted
        _check_covariance(z[-1:])
    _check_covariance(z)


def _check_covariance(z):
    """Check that Σ z zᵀ / m has the mean I/k over the points, to five standard errors."""
    m, count, k = z.shape
    outer = torch.einsum("mni,mnj->nij", z, z) / m
    error = (outer.mean(0) - torch.eye(k).double() / k).abs()
    assert (error <= 5 * outer.std(0) / count**0.5 + 1e-12).all()


def test_coordinates_differ_from_each_other():
    z = RandomCoordinates(3).draw(points(50, 2), 7)
    assert (z.sum(0).max(1).values == 1).all()
    assert z.sum(0).unique(dim=0).shape[0] > 20  # of the 35 sets


def test_all_coordinates_are_the_standard_basis():
    z = RandomCoordinates(5).draw(points(4, 2), 5)
    assert torch.equal(z, torch.eye(5).double()[:, None].expand(5, 4, 5))


def quadratic(H):
    """u = xᵀ H x / 2, whose second derivatives are H everywhere."""
    return lambda x: 0.5 * ((x @ H) * x).sum(-1, keepdim=True)


H = torch.randn(9, 9, generator=torch.Generator().manual_seed(4)).double()
H = H + H.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 4])
def test_estimates_are_unbiased_with_the_stated_variance(kind, samples):
    """And so E[r̂²] = r² + Var: the bias of a loss."""
    N, d = 20_000, 9
    received = evaluate(
        {"u": Laplacian(sampling=kind(samples, seed=1))}, quadratic(H), points(N, d)
    )
    error = received["u"][:, 0] - H.trace()
    diagonal, off = H.diagonal(), H - torch.diag(H.diagonal())
    variance = {
        RandomCoordinates: d**2 / samples * (1 - samples / d) * diagonal.var(),
        RandomSigns: 2 / samples * off.square().sum(),
    }[kind]
    assert abs(error.mean()) < 4 * (variance / N) ** 0.5
    spread = error.square().std() / N**0.5
    assert abs(error.square().mean() - variance) < 4 * spread
    assert spread < 0.05 * variance  # so that the line above says something


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", operators(None))
def test_every_operator_is_estimated_without_bias(kind, name):
    N = 20_000
    x = points(1, D).expand(N, D)
    x = torch.cat([x, torch.arange(N)[:, None].double()], 1)  # one point, but for its label

    def u(point):
        return quadratic(H[:D, :D])(point[:, :D]) + torch.sin(point[:, :D]).prod(1, keepdim=True)

    pad = torch.nn.functional.pad
    chosen = {
        "laplacian": Laplacian(dims=range(D)),
        "matrix": SecondOrder(C, dims=range(D)),
        "matrix_diagonal": SecondOrder(torch.diag(C.diagonal()), dims=range(D)),
        "matrix_field": SecondOrder(lambda x: matrix_field(x[:, :D]), dims=range(D)),
        "matrix_dims": SecondOrder(C[:3, :3], dims=(2, 0, 3)),
        "diagonal_field": SecondOrder(lambda x: torch.diag_embed(1 + x[:, :D] ** 2), dims=range(D)),
        "laplacian_dims": Laplacian(dims=(3, 0, 2)),
        "factors": SecondOrder.from_factors(pad(F, (0, 0, 0, 1))),
        "factor_field": SecondOrder.from_factors(
            lambda x: pad(factor_field(x[:, :D]), (0, 0, 0, 1))
        ),
    }[name]
    exact = evaluate({"o": chosen}, u, x[:1])["o"]
    received = evaluate({"o": replace(chosen, sampling=kind(2))}, u, x)["o"]
    assert received.std() > 0.01
    assert abs(received.mean() - exact) < 4 * received.std() / N**0.5


@pytest.mark.parametrize("name", operators(None))
def test_all_samples_of_coordinates_are_exact(name):
    model, x = build("gated", D, 2), points(5, D)
    k = 3 if name in ("laplacian_dims", "matrix_dims", "factors", "factor_field") else D
    exact = evaluate({name: operators(None)[name]}, model, x)[name]
    received = evaluate({name: operators(RandomCoordinates(k))[name]}, model, x)[name]
    oracles.assert_close(received.detach(), exact.detach(), 1e-13)


def test_where_the_variance_vanishes_estimates_are_exact():
    x, level = points(6, 9), H - torch.diag(H.diagonal()) + 3 * torch.eye(9)
    equal = evaluate({"o": Laplacian(sampling=RandomCoordinates(2))}, quadratic(level), x)["o"]
    oracles.assert_close(equal, torch.full_like(equal, 27.0), 1e-13)
    apart = evaluate({"o": Laplacian(sampling=RandomSigns(2))}, lambda x: torch.exp(x).sum(1), x)
    oracles.assert_close(apart["o"], x.exp().sum(1), 1e-13)


# --- one frozen operator --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("network", ["tanh", "gated", "hard_boundary"])
def test_frozen_directions_against_nested_autodiff(kind, samples, network):
    model, x = build(network, D, 2), points(3, D)
    everything = {"u": Value(), "first": Partial(1), **operators(kind(samples, seed=9))}
    received = evaluate(everything, model, x)
    u = oracles.at_point(model, oracles.trainable(model))
    for n in range(len(x)):
        wanted = oracles.operator_values(everything, u, x[n], n)
        for name in everything:
            oracles.assert_close(received[name][n].detach(), wanted[name].detach())


@pytest.mark.parametrize(
    ("chosen", "R"),
    [
        ([Laplacian(sampling=RandomCoordinates(3))], 3),
        ([Laplacian(sampling=RandomSigns(2))], 2),
        ([SecondOrder(torch.diag(C.diagonal()), sampling=RandomCoordinates(3))], 3),
        ([SecondOrder(torch.diag(C.diagonal()), sampling=RandomSigns(2))], 4),
        ([SecondOrder(matrix_field, sampling=RandomCoordinates(2))], 4),
        ([SecondOrder.from_factors(F, sampling=RandomCoordinates(2))], 2),
        ([Laplacian(sampling=RandomSigns(2)), Partial(0), Value()], 3),
        # with one seed, two operators have the same directions, and propagate them once
        ([Laplacian(sampling=RandomSigns(2)), Laplacian(sampling=RandomSigns(2))], 2),
        ([Laplacian(sampling=RandomSigns(2)), Laplacian(sampling=RandomSigns(2, seed=1))], 4),
    ],
)
def test_channels(chosen, R):
    layout = Plan.of({f"o{i}": o for i, o in enumerate(chosen)}, points(5, D)).layout
    assert layout.R == R
    assert len({repr(o) for o in chosen if not isinstance(o, Partial | Value)}) == layout.C


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", operators(None))
def test_float32_takes_the_same_directions(kind, name):
    operator = {"o": operators(kind(2))[name]}
    model, x = build("tanh", D), points(4, D)
    wanted = evaluate(operator, model, x)["o"]
    received = evaluate(operator, model.float(), x.float())["o"]
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind):
    x, first = points(20, 3), kind(2, seed=5)
    assert torch.equal(first.draw(x, 8), kind(2, seed=5).draw(x, 8))
    assert not torch.equal(first.draw(x, 8), kind(2, seed=6).draw(x, 8))
    one, other = first.redrawn(123), first.redrawn(124)
    assert one == first.redrawn(123)
    assert one not in (first, other)
    assert one != kind(2, seed=6).redrawn(123)
    largest = (1 << 63) - 1
    for seed in (0, largest, -largest - 1):  # stays in 64 bits
        kind(2, seed=seed).redrawn(largest).draw(x, 8)
    assert (type(one), one.samples) == (kind, 2)


def test_equality_text_and_pickles():
    operator = Laplacian(dims=[0, 1], sampling=RandomSigns(2, seed=3))
    assert operator == Laplacian(dims=(0, 1), sampling=RandomSigns(2, seed=3))
    assert len({operator, pickle.loads(pickle.dumps(operator))}) == 1
    for other in (RandomSigns(2), RandomSigns(3, seed=3), RandomCoordinates(2, seed=3), None):
        assert operator != Laplacian(dims=(0, 1), sampling=other)
    assert "sampling=RandomSigns(samples=2, seed=3)" in repr(operator)


def test_only_what_is_random_is_redrawn():
    for operator in (Value(), Laplacian(), SecondOrder(C), Directional(C[0]), Gradient()):
        assert operator.sampling is None
        assert operator.redrawn(7) is operator
    for operator in operators(RandomSigns(2)).values():
        redrawn = operator.redrawn(7)
        assert vars(redrawn) == {**vars(operator), "sampling": RandomSigns(2, seed=7)}


def test_coefficients_of_points_are_cut_with_them():
    x = points(6, D)
    whole = SecondOrder(matrix_field(x), sampling=RandomSigns(2))
    model = build("tanh", D)
    part = torch.tensor([4, 1])
    received = evaluate({"o": whole.at(part)}, model, x[part])["o"]
    oracles.assert_close(received.detach(), evaluate({"o": whole}, model, x)["o"][part].detach())


class Gaussian(RandomDirections):
    """Directions of one's own: unit vectors of any direction."""

    def draw(self, x, k):
        bits = point_bits(x, self.seed, 2 * self.samples * k).double() / 2.0**64 + 0.5
        radius = (-2 * bits[:, ::2].clamp(1e-12).log()).sqrt()
        normal = radius * (2 * torch.pi * bits[:, 1::2]).cos()
        z = normal.reshape(len(x), self.samples, k).transpose(0, 1)
        return (z / z.norm(dim=2, keepdim=True)).to(x.dtype)


class Weighted(DifferentialOperator):
    """An operator of one's own that takes part: (1 + |x|²) Δu."""

    def __init__(self, sampling):
        self.sampling = sampling

    def requests(self, x):
        """Request the Laplacian along random directions."""
        return {"lap": self.sampling.estimate(x, x.shape[1], lambda z: z)}

    def read(self, x, derivatives):
        """Multiply by the coefficient."""
        return (1 + x.square().sum(1, keepdim=True)) * derivatives["lap"]

    def redrawn(self, seed):
        """Take other directions."""
        return Weighted(self.sampling.redrawn(seed))


def test_directions_and_operators_of_ones_own():
    N, d = 20_000, 9
    x = points(N, d)
    received = evaluate({"o": Weighted(Gaussian(2))}, quadratic(H), x)["o"][:, 0]
    error = received / (1 + x.square().sum(1)) - H.trace()
    assert abs(error.mean()) < 4 * error.std() / N**0.5
    assert isinstance(Weighted(Gaussian(2)).requests(x)["lap"], Derivative)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_wrong_raise(kind):
    with pytest.raises(ValueError, match=r"1 or more samples, got 0\. Leave sampling out"):
        kind(0)
    with pytest.raises(ValueError, match="The seed must have 64 bits, got 9223372036854775808"):
        kind(1, seed=1 << 63)


@pytest.mark.parametrize("given", [1.5, True, "16"])
def test_samples_that_are_no_whole_numbers_raise(given):
    with pytest.raises(TypeError, match=rf"whole numbers, got samples='?{given}'? of type"):
        unchecked(RandomSigns, samples=given, seed=0).__post_init__()


def unchecked(kind, **fields):
    """Return an object with fields that annotations, which speak first under pytest, refuse."""
    made = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(made, name, value)
    return made


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", operators(None))
def test_more_samples_than_directions_raise(kind, name):
    k = 3 if name in ("laplacian_dims", "matrix_dims", "factors", "factor_field") else D
    message = rf"as many samples as the operator has directions, {k}, got {k + 1}\. Take fewer"
    with pytest.raises(ValueError, match=message):
        evaluate({"o": operators(kind(k + 1))[name]}, build("tanh", D), points(2, D))


def test_sampling_that_is_a_number_raises():
    with pytest.raises(TypeError, match=r"or random directions, got 16\. Write e\.g\."):
        unchecked(Laplacian, sampling=16).__post_init__()


@pytest.mark.parametrize("make", [SecondOrder, SecondOrder.from_factors])
def test_trained_coefficients_raise(make):
    operator = make(C.clone().requires_grad_(), sampling=RandomSigns(2))
    with pytest.raises(NotImplementedError, match=r"must be exact, .* got RandomSigns\(samples=2"):
        evaluate({"o": operator}, build("tanh", D), points(2, D))


def test_coordinates_that_do_not_exist_raise():
    with pytest.raises(IndexError, match="between -4 and 3 for points with 4 coordinates, got 4"):
        evaluate(
            {"o": Laplacian(dims=[0, 4], sampling=RandomSigns(1))}, build("tanh", D), points(2, D)
        )


def test_the_bilaplacian_has_no_estimate():
    with pytest.raises(TypeError, match="sampling"):
        Bilaplacian(sampling=RandomSigns(1))
