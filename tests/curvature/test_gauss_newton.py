"""The exact Gauss-Newton in all its forms, and the Jacobian, against nested torch.func."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pinncurv.curvature import (
    BlockDiagonalGaussNewton,
    DiagonalGaussNewton,
    GaussNewton,
    JacobianLinearOperator,
    MatrixFreeGaussNewton,
    ParameterSpace,
    gauss_newton_diagonal,
)
from pinncurv.diffops import Laplacian, SecondOrder
from pinncurv.linearization import Empirical, ForwardOnly, linearize
from pinncurv.linops import PyTorchLinearOperator
from pinncurv.machine import Sizes
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.conformance import check_operator
from tests.networks import KINDS, TwoParts, build, points
from tests.problems.shipped import GALLERY, SHIPPED
from tests.terms import PARTS, TERMS

PAIR = [TERMS["allen_cahn"], TERMS["value"]]
TRIPLE = [TERMS["log_fokker_planck"], TERMS["poisson"], TERMS["vector"]]


def batches(terms, N=(3, 2, 4)):
    """Return different points for every term; weights per point need three."""
    return [
        points(3 if isinstance(term.weight, Tensor) else N[i % 3], seed=10 + i)
        for i, term in enumerate(terms)
    ]


def linearizations(terms, model, batch, **options):
    return [linearize(t, model, x, **options) for t, x in zip(terms, batch, strict=True)]


@pytest.fixture(scope="module")
def triple():
    """Three terms on a gated network: linearizations and the oracle's matrix."""
    model, batch = build("gated"), batches(TRIPLE)
    return linearizations(TRIPLE, model, batch), oracles.gauss_newton(TRIPLE, model, batch)


def flat_matrix(linearized) -> Tensor:
    return MatrixFreeGaussNewton()(linearized).to_dense()


@pytest.mark.parametrize("kind", KINDS)
def test_every_network_kind(kind):
    model, batch = build(kind), batches(PAIR)
    expected = oracles.gauss_newton(PAIR, model, batch)
    linearized = linearizations(PAIR, model, batch)
    operator = MatrixFreeGaussNewton()(linearized)
    identity = torch.eye(len(expected), dtype=torch.float64)
    oracles.assert_close(operator.to_dense(), expected)
    oracles.assert_close(operator @ identity, expected)
    oracles.assert_close(operator.diagonal(), expected.diagonal())
    oracles.assert_close(GaussNewton()(linearized).to_dense(), expected)
    oracles.assert_close(DiagonalGaussNewton()(linearized).to_dense(), expected.diagonal().diag())
    blocks = BlockDiagonalGaussNewton()(linearized)
    oracles.assert_close(blocks.to_dense(), expected * block_mask(linearized))


def block_mask(linearized) -> Tensor:
    """Return 1 where row and column belong to the same layer."""
    space = ParameterSpace.of(linearized)
    owner = torch.cat(
        [torch.full((p.numel(),), _layer(name)) for name, p in space.parameters.items()]
    )
    return (owner[:, None] == owner[None]).double()


def _layer(name: str) -> int:
    return hash(name.rpartition(".")[0])


@pytest.mark.parametrize("name", [*SHIPPED, *GALLERY])
def test_every_shipped_problem(name):
    problem = (SHIPPED | GALLERY)[name]()
    model = build("tanh", problem.d_in, problem.d_out)
    if problem.d_in > 20:
        model = nn.Sequential(nn.Linear(problem.d_in, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    generator = torch.Generator().manual_seed(0)
    batch = [x[:2] for x in problem.sample(generator, torch.float64, "cpu")]
    expected = oracles.gauss_newton(problem.terms, model, batch)
    linearized = linearizations(problem.terms, model, batch)
    oracles.assert_close(flat_matrix(linearized), expected)
    oracles.assert_close(
        gauss_newton_diagonal(linearized, ParameterSpace.of(linearized)).diagonal(),
        expected.diagonal(),
    )


def test_conformance(triple):
    linearized, expected = triple
    space = ParameterSpace.of(linearized)
    operator = MatrixFreeGaussNewton()(linearized)
    check_operator(operator, expected, tolerance=1e-10)
    check_operator(GaussNewton()(linearized), expected, tolerance=1e-10)
    blocks = expected * block_mask(linearized)
    check_operator(BlockDiagonalGaussNewton()(linearized), blocks, tolerance=1e-10)
    check_operator(
        gauss_newton_diagonal(linearized, space), expected.diagonal().diag(), tolerance=1e-10
    )


def test_sum_of_terms_is_the_whole(triple):
    linearized, expected = triple
    operator = MatrixFreeGaussNewton()(linearized)
    parts = [operator.term(i).to_dense() for i in range(3)]
    oracles.assert_close(sum(parts), expected)
    oracles.assert_close(operator.term("poisson").to_dense(), parts[1])
    for missing in ("typo", 3, -1):
        with pytest.raises(KeyError, match=rf"'poisson'.* or a position, got '?{missing}"):
            operator.term(missing)
    oracles.assert_close(flat_matrix(linearized[:1]), parts[0])


def test_jacobian_and_its_adjoint(triple):
    linearized, expected = triple
    J = JacobianLinearOperator(linearized)
    dense = J.to_dense()
    rows = [
        oracles.jacobian(t, build("gated"), x)
        for t, x in zip(TRIPLE, batches(TRIPLE), strict=False)
    ]
    oracles.assert_close(dense, torch.cat(rows))
    oracles.assert_close(dense.T @ dense, expected)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(J.shape[1], 2, generator=generator, dtype=torch.float64)
    u = torch.randn(J.shape[0], 2, generator=generator, dtype=torch.float64)
    oracles.assert_close(J @ v, dense @ v)
    oracles.assert_close(J @ v[:, 0], dense @ v[:, 0])
    oracles.assert_close(J.adjoint() @ u, dense.T @ u)
    oracles.assert_close((u * (J @ v)).sum(), ((J.adjoint() @ u) * v).sum())
    oracles.assert_close(J.adjoint().adjoint() @ v, dense @ v)
    shapes = [p.shape for p in linearized[0].parameters.values()]
    pieces = v[:, 0].split([shape.numel() for shape in shapes])
    as_list = J @ [p.reshape(s) for p, s in zip(pieces, shapes, strict=True)]
    assert [t.shape for t in as_list] == [(3, 1), (2, 1), (4, 3)]
    oracles.assert_close(torch.cat([t.flatten() for t in as_list]), dense @ v[:, 0])


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_chunks_change_nothing(chunk_size, triple):
    whole, expected = triple
    chunked = linearizations(TRIPLE, build("gated"), batches(TRIPLE), chunk_size=chunk_size)
    operator = MatrixFreeGaussNewton()(chunked)
    oracles.assert_close(operator.to_dense(), expected)
    oracles.assert_close(operator @ torch.eye(len(expected), dtype=torch.float64), expected)
    oracles.assert_close(operator.diagonal(), expected.diagonal())
    oracles.assert_close(
        BlockDiagonalGaussNewton()(chunked).to_dense(), expected * block_mask(whole)
    )
    oracles.assert_close(operator.jacobian.to_dense(), JacobianLinearOperator(whole).to_dense())


def test_rows_are_summed_over_blocks_of_points(monkeypatch, triple):
    """The same with the smallest blocks of points and channels that memory could force."""
    linearized, expected = triple
    monkeypatch.setattr("pinncurv.machine.sizes._CPU", Sizes(1, 1, 1, 1))
    operator = MatrixFreeGaussNewton()(linearized)
    oracles.assert_close(operator.to_dense(), expected)
    oracles.assert_close(operator @ torch.eye(len(expected), dtype=torch.float64), expected)
    blocks = BlockDiagonalGaussNewton()(linearized).to_dense()
    oracles.assert_close(blocks, expected * block_mask(linearized))


@pytest.mark.parametrize("dense_limit", [0, 2048])
def test_inverse_by_both_ways(dense_limit, triple):
    linearized, expected = triple
    operator = MatrixFreeGaussNewton()(linearized)
    b = torch.ones(len(expected), dtype=torch.float64)
    for damping in (1e-3, 1.0):
        wanted = torch.linalg.solve(expected + damping * torch.eye(len(b)).double(), b)
        received = operator.inverse(damping, dense_limit=dense_limit) @ b
        oracles.assert_close(received, wanted, rtol=1e-7)
    with pytest.raises(ValueError, match="damping"):
        operator.inverse(-1.0, dense_limit=dense_limit)


# --- scale ----------------------------------------------------------------------------------------


def test_doubling_a_weight_doubles(triple):
    linearized, _ = triple
    term, x = TRIPLE[1], batches(TRIPLE)[1]
    heavy = dataclasses.replace(term, weight=2 * term.weight)
    torch.testing.assert_close(
        flat_matrix(linearizations([heavy], build("gated"), [x])), 2 * flat_matrix(linearized[1:2])
    )


@pytest.mark.parametrize("term", ["poisson", "vector", "log_fokker_planck"])
def test_duplicating_the_batch_changes_nothing(term):
    model, x = build("gated"), points()
    once = flat_matrix(linearizations([TERMS[term]], model, [x]))
    twice = flat_matrix(linearizations([TERMS[term]], model, [torch.cat([x, x])]))
    torch.testing.assert_close(once, twice)


def test_two_equal_terms_are_one_of_double_weight():
    model, x, term = build("gated"), points(), TERMS["poisson"]
    twin = dataclasses.replace(term, name="twin")
    heavy = dataclasses.replace(term, weight=5.0)
    torch.testing.assert_close(
        flat_matrix(linearizations([term, twin], model, [x, x])),
        flat_matrix(linearizations([heavy], model, [x])),
    )


def test_weight_zero_and_constant_weights_per_point():
    model, x, term = build("tanh"), points(), TERMS["poisson"]
    zero = dataclasses.replace(term, weight=0.0)
    assert torch.count_nonzero(flat_matrix(linearizations([zero], model, [x]))) == 0
    tensor = dataclasses.replace(term, weight=torch.full((3,), 2.5, dtype=torch.float64))
    torch.testing.assert_close(
        flat_matrix(linearizations([tensor], model, [x])),
        flat_matrix(linearizations([term], model, [x])),
    )


def test_the_channel_set_does_not_matter():
    """The Laplacian in a rotated basis, with scaled and redundant directions: the same matrix."""
    Q, _ = torch.linalg.qr(torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64))
    redundant = torch.cat([Q / 2**0.5, torch.eye(2, dtype=torch.float64) / 2**0.5], 1)
    model, x = build("gated"), points()
    matrices = [
        flat_matrix(
            linearizations([LossTerm({"lap": o}, lambda x, lap: lap, Fixed(x))], model, [x])
        )
        for o in (
            Laplacian(),
            SecondOrder(torch.eye(2, dtype=torch.float64)),
            SecondOrder.from_factors(Q),
            SecondOrder.from_factors(redundant),
        )
    ]
    for matrix in matrices[1:]:
        oracles.assert_close(matrix, matrices[0])


# --- what is refused ------------------------------------------------------------------------------


def test_forward_only_linearizations_have_no_jacobian():
    linearized = linearizations(
        [TERMS["poisson"]], build("no_bias"), [points()], fisher=ForwardOnly()
    )
    with pytest.raises(ValueError, match=r"'poisson' was linearized with ForwardOnly"):
        flat_matrix(linearized)
    for recipe in (BlockDiagonalGaussNewton(), DiagonalGaussNewton()):
        with pytest.raises(ValueError, match=r"'poisson' was linearized with ForwardOnly"):
            recipe(linearized)


@pytest.mark.parametrize("term", ["poisson", "vector"])
def test_empirical_linearizations_are_no_jacobian(term):
    """The exact matrix must not silently become the empirical one, nor take wrong shapes."""
    linearized = linearizations([TERMS[term]], build("no_bias"), [points()], fisher=Empirical())
    with pytest.raises(ValueError, match="Type2"):
        flat_matrix(linearized)


def test_parameter_that_no_term_uses_is_named():
    linearized = linearizations([TERMS["poisson"]], Unused(), [points()])
    with pytest.raises(ValueError, match=r"spare\.weight, spare\.bias is used by none"):
        flat_matrix(linearized)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.spare = build("tanh"), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def test_parameter_that_one_term_does_not_use_is_fine():
    model, terms = TwoParts(), PARTS
    batch = [points(3), points(4)]
    linearized = linearizations(terms, model, batch)
    expected = torch.zeros(0)
    by_term = []
    for term, x in zip(terms, batch, strict=True):
        scaled = term.scaled_residual(model, x).flatten()
        rows = [
            torch.cat(
                [
                    torch.zeros_like(p).flatten() if g is None else g.flatten()
                    for p, g in zip(
                        model.parameters(),
                        torch.autograd.grad(
                            r, list(model.parameters()), retain_graph=True, allow_unused=True
                        ),
                        strict=True,
                    )
                ]
            )
            for r in scaled
        ]
        by_term.append(torch.stack(rows))
    J = torch.cat(by_term)
    expected = J.T @ J
    operator = MatrixFreeGaussNewton()(linearized)
    oracles.assert_close(operator.jacobian.to_dense(), J)
    oracles.assert_close(operator.to_dense(), expected)
    oracles.assert_close(operator @ torch.eye(len(expected), dtype=torch.float64), expected)
    oracles.assert_close(operator.diagonal(), expected.diagonal())


def test_no_terms_and_different_networks_raise():
    with pytest.raises(ValueError, match="at least one linearization"):
        MatrixFreeGaussNewton()([])
    different = [linearize(TERMS["value"], build("tanh"), points()) for _ in range(2)]
    with pytest.raises(ValueError, match="same parameters"):
        MatrixFreeGaussNewton()(different)


def test_algebra_of_curvlinops_works(triple):
    """Sums, scalings and differences with operators of that package."""
    linearized, expected = triple
    operator = MatrixFreeGaussNewton()(linearized)
    combined = 2 * operator + operator - 0.5 * operator
    assert isinstance(combined, PyTorchLinearOperator)
    v = torch.ones(len(expected), dtype=torch.float64)
    oracles.assert_close(combined @ v, 2.5 * (expected @ v))
