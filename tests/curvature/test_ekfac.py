"""EKFAC: its definition against the dense block, errors below KFAC's, scale laws."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    expand,
    reduce,
    second_moments,
)
from pinncurv.curvature.ekfac import EKFAC, EKFACLinearOperator, KFACFactors, PartialTraces
from pinncurv.diffops import Value
from pinncurv.linearization import Empirical, ForwardOnly, Type2, blocks, linearize
from pinncurv.linops import FactorDamping, merge
from pinncurv.machine import Sizes
from pinncurv.problems import Fixed, LossTerm, fokker_planck, heat1d, log_fokker_planck, poisson2d
from tests import oracles
from tests.conformance import check_operator
from tests.networks import TwoParts, build, points
from tests.terms import PARTS, TERMS

BASES = {
    "expand": {"sharing": expand},
    "reduce": {"sharing": reduce, "basis": KFACFactors()},
    "traces": {"basis": PartialTraces()},
}


def linearized(terms, model, batch, **options):
    return [linearize(t, model, x, **options) for t, x in zip(terms, batch, strict=True)]


def of(terms, model, batch, basis="expand", **options) -> EKFACLinearOperator:
    return EKFAC(**BASES[basis])(linearized(terms, model, batch, **options))


def joint_rows(model: nn.Module, J: Tensor) -> list[Tensor]:
    """Columns of the oracle's Jacobian as one ``[N V, d_out, d_joint]`` per linear layer."""
    parameters = dict(model.named_parameters())
    columns = dict(
        zip(parameters, J.split([p.numel() for p in parameters.values()], 1), strict=True)
    )
    rows = []
    for name, parameter in parameters.items():
        if name.endswith("weight"):
            weight = columns[name].unflatten(1, parameter.shape)
            bias = columns.get(name.replace("weight", "bias"))
            rows.append(weight if bias is None else torch.cat([weight, bias[..., None]], -1))
    return rows


def diagonal_in(basis, rows: Tensor) -> Tensor:
    """U diag(Uᵀ C U) Uᵀ with C = Σ vec(J) vec(J)ᵀ."""
    C = torch.einsum("noi,npj->oipj", rows, rows).reshape(2 * (rows[0].numel(),))
    U = torch.kron(basis.B, basis.A)
    return U @ torch.diag((U.T @ C @ U).diagonal()) @ U.T


def assert_diagonalizes(U: Tensor, factor: Tensor) -> None:
    oracles.assert_close(U.T @ U, torch.eye(len(U), dtype=U.dtype))
    rotated = U.T @ factor @ U
    assert (rotated - torch.diag(rotated.diagonal())).norm() <= 1e-12 * factor.norm()


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("names", [["poisson"], ["vector", "log_fokker_planck"]])
@pytest.mark.parametrize("kind", ["tanh", "gated", "no_bias", "repeated"])
def test_definition(kind, names, basis):
    """The eigenvectors are those of the factors, and S is the block's diagonal between them."""
    model, terms = build(kind), [TERMS[name] for name in names]
    batch = [points(3, seed=i) for i in range(len(terms))]
    operator = of(terms, model, batch, basis)
    parts = zip(terms, batch, strict=True)
    rows = joint_rows(model, torch.cat([oracles.jacobian(t, model, x) for t, x in parts]))
    parts = zip(terms, batch, strict=True)
    layers = [list(oracles.layers(t, model, x).values()) for t, x in parts]
    for i, J in enumerate(rows):
        if basis == "traces":
            A, B = torch.einsum("noi,noj->ij", J, J), torch.einsum("noi,npi->op", J, J)
        else:
            oracle = {"expand": oracles.kfac_expand, "reduce": oracles.kfac_reduce}[basis]
            pairs = [oracle(layer[i]) for layer in layers]
            A = sum(B.trace() * A for A, B in pairs)
            B = sum(B for _, B in pairs)
        assert_diagonalizes(operator.bases[i].A, A)
        assert_diagonalizes(operator.bases[i].B, B)
        expected = diagonal_in(operator.bases[i], J)
        oracles.assert_close(operator.block_to_dense(i), expected)


@pytest.mark.parametrize(("V", "S"), [(1, 1), (1, 4), (2, 3), (1, 9)])
def test_both_ways_to_the_moments(V, S, monkeypatch):
    monkeypatch.setattr(
        "pinncurv.machine.sizes._CPU", Sizes(120, 1 << 22, 256, 128)
    )  # blocks of two points
    generator = torch.Generator().manual_seed(0)
    G, Z = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((V, S, 7, 4), (S, 7, 5))
    )
    expected = torch.einsum("vsno,sni->vnoi", G, Z).square().sum((0, 1))
    oracles.assert_close(blocks.squared_products(G, Z), expected)
    oracles.assert_close(second_moments._moments_by_pairs(G, Z), expected)


def test_empirical_choice():
    """One gradient per point, scaled by the residual; chosen in either place."""
    model, x, term = build("tanh"), points(), TERMS["vector"]
    u = oracles.at_point(model, oracles.trainable(model))
    r = torch.stack([oracles.residual_at(term, u, x, n).detach() for n in range(len(x))])
    J = torch.einsum("nv,nvd->nd", r, oracles.jacobian(term, model, x).unflatten(0, r.shape))
    for options in BASES.values():
        operator = EKFAC(**options, fisher=Empirical())([linearize(term, model, x)])
        for i, rows in enumerate(joint_rows(model, J)):
            expected = diagonal_in(operator.bases[i], rows)
            oracles.assert_close(operator.block_to_dense(i), expected)
        made = [linearize(term, model, x, Empirical())]
        again = EKFAC(**options)(made)
        torch.testing.assert_close(again.to_dense(), operator.to_dense())


@pytest.mark.parametrize("basis", BASES)
def test_conformance(basis):
    two = [TERMS["allen_cahn"], TERMS["value"]]
    for terms, batch in ((two[:1], [points()]), (two, [points(), points(4)])):
        operator = of(terms, build("residual"), batch, basis)
        check_operator(operator, operator.to_dense(), tolerance=1e-10)


# --- the ladder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", [expand, reduce])
@pytest.mark.parametrize("kind", ["tanh", "residual", "no_bias"])
@pytest.mark.parametrize(
    "problem",
    [poisson2d(20, 10), heat1d(20, 10), fokker_planck(1), log_fokker_planck(1)],
    ids=lambda problem: problem.name,
)
def test_error_is_at_most_that_of_kfac(problem, kind, sharing):
    """For each term and layer, and for the sum of the terms."""
    model = build(kind)
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    terms = linearized(problem.terms, model, [x[:20] for x in batch])
    smaller = 0
    for chosen in [[linearization] for linearization in terms] + [terms]:
        exact = BlockDiagonalGaussNewton()(chosen)
        operator, kfac = EKFAC(sharing)(chosen), KFAC(sharing)(chosen)
        oracles.assert_close(operator.trace(), exact.trace())
        for i, layer in enumerate(kfac.factors):
            pair = merge(layer)
            C, scale = exact.block_to_dense(i), exact.block_to_dense(i).norm()
            error = (operator.block_to_dense(i) - C).norm()
            reference = (torch.kron(pair.B, pair.A) - C).norm()
            assert error <= reference + 1e-12 * scale
            smaller += bool(error < 0.99 * reference)
    assert smaller >= 5


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("kind", ["tanh", "gated", "no_bias"])
def test_exact_for_one_point_and_one_channel(kind, basis):
    model, x = build(kind), points(1)
    term = LossTerm({"u": Value()}, lambda x, u: u**2 - u, Fixed(x), 1.7, "term")
    lin = [linearize(term, model, x)]
    exact = BlockDiagonalGaussNewton()(lin).to_dense()
    oracles.assert_close(EKFAC(**BASES[basis])(lin).to_dense(), exact)


# --- terms ----------------------------------------------------------------------------------------


def test_terms_share_the_basis_and_add_up():
    terms, batch = [TERMS["poisson"], TERMS["vector"]], [points(3), points(4)]
    model = build("gated")
    operator = of(terms, model, batch)
    parts = [operator.term(name) for name in ("poisson", 1)]
    torch.testing.assert_close(sum(p.to_dense() for p in parts), operator.to_dense())
    J = joint_rows(model, oracles.jacobian(terms[1], model, batch[1]))
    for i, rows in enumerate(J):
        oracles.assert_close(parts[1].block_to_dense(i), diagonal_in(operator.bases[i], rows))
    assert (parts[0].terms, parts[1].terms) == (("poisson",), ("vector",))
    check_operator(parts[0], parts[0].to_dense(), tolerance=1e-10)
    with pytest.raises(KeyError, match=r"term must be one of \('poisson', 'vector'\)"):
        operator.term("initial")


@pytest.mark.parametrize("basis", BASES)
def test_term_that_does_not_use_a_layer(basis):
    operator = of(PARTS, TwoParts(), [points(3), points(4)], basis)
    first = operator.term("value")
    for i, block in enumerate(operator.blocks):
        unused = block.name.startswith("v.")
        assert (torch.count_nonzero(first.block_to_dense(i)) == 0) == unused
        assert torch.count_nonzero(operator.block_to_dense(i)) > 0


# --- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", BASES)
def test_scale(basis):
    """Weights, duplicated points, equal terms and chunks.

    With eight points no factor has a repeated eigenvalue, so that the eigenvectors are unique.
    """
    model, x, term = build("gated"), points(8), TERMS["vector"]
    once = of([term], model, [x], basis).to_dense()
    heavy = of([dataclasses.replace(term, weight=1.4)], model, [x], basis).to_dense()
    twin = dataclasses.replace(term, name="twin")
    torch.testing.assert_close(heavy, 2 * once)
    torch.testing.assert_close(of([term], model, [torch.cat([x, x])], basis).to_dense(), once)
    torch.testing.assert_close(of([term, twin], model, [x, x], basis).to_dense(), heavy)
    torch.testing.assert_close(of([term], model, [x], basis, chunk_size=3).to_dense(), once)
    assert once.norm() > 0


@pytest.mark.parametrize("basis", BASES)
def test_float32(basis):
    model, x, term = build("gelu"), points(8), TERMS["poisson"]
    wanted = of([term], model, [x], basis).to_dense()
    received = of([term], model.float(), [x.float()], basis)
    assert received.dtype == received.to_dense().dtype == torch.float32
    torch.testing.assert_close(
        received.to_dense().double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()
    )
    vector = torch.ones(received.shape[0])
    assert (received.inverse(1e-3) @ vector).dtype == torch.float32


# --- what it refuses ------------------------------------------------------------------------------


@pytest.mark.parametrize("basis", BASES)
def test_needs_output_gradients(basis):
    model, x, term = build("tanh"), points(), TERMS["poisson"]
    match = "EKFAC must have output gradients, but term 'poisson' has none with ForwardOnly"
    with pytest.raises(ValueError, match=match):
        EKFAC(**BASES[basis], fisher=ForwardOnly())([linearize(term, model, x)])
    with pytest.raises(ValueError, match=match):
        EKFAC(**BASES[basis])([linearize(term, model, x, ForwardOnly())])
    with pytest.raises(ValueError, match=r"was linearized with Empirical.*Type2"):
        EKFAC(**BASES[basis], fisher=Type2())([linearize(term, model, x, Empirical())])


def test_is_neither_averaged_nor_damped_by_factors():
    operator = of([TERMS["poisson"]], build("tanh"), [points()])
    assert operator.identity is None
    with pytest.raises(TypeError, match="got EKFACLinearOperator"):
        FactorDamping(1e-3)(operator)
