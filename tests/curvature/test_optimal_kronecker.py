"""Optimal Kronecker products: against a singular value decomposition of the dense block."""

import dataclasses
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn

from pinncurv.curvature import KFAC, expand, reduce
from pinncurv.curvature.optimal_kronecker import (
    KroneckerExpansionLinearOperator,
    KroneckerNotConverged,
    OptimalKronecker,
    OptimalKroneckerLinearOperator,
    optimal_kronecker,
)
from pinncurv.diffops import Value
from pinncurv.linearization import Empirical, ForwardOnly, linearize
from pinncurv.linops import FactorDamping
from pinncurv.problems import Fixed, LossTerm, heat1d, log_fokker_planck, poisson2d
from tests import oracles
from tests.conformance import DAMPINGS, check_inverse, check_operator
from tests.networks import TwoParts, build, points
from tests.terms import PARTS, TERMS

TIGHT = {"tolerance": 1e-14, "iterations": 2000}


def linearized(terms, model, batch, **options):
    return [linearize(t, model, x, **options) for t, x in zip(terms, batch, strict=True)]


def of(terms, model, batch, rank=1, **options):
    return optimal_kronecker(linearized(terms, model, batch), rank, **options)


def blocks_of(model: nn.Module, J: Tensor) -> list[Tensor]:
    """Each layer's block ``[d_out, d_joint, d_out, d_joint]`` from the oracle's Jacobian."""
    parameters = dict(model.named_parameters())
    columns = dict(
        zip(parameters, J.split([p.numel() for p in parameters.values()], 1), strict=True)
    )
    blocks = []
    for name in [name for name in parameters if name.endswith("weight")]:
        rows = columns[name].unflatten(1, parameters[name].shape)
        bias = columns.get(name.replace("weight", "bias"))
        rows = rows if bias is None else torch.cat([rows, bias[..., None]], -1)
        blocks.append(torch.einsum("noi,npj->oipj", rows, rows))
    return blocks


def exact_blocks(terms, model, batch) -> list[Tensor]:
    parts = zip(terms, batch, strict=True)
    return blocks_of(model, torch.cat([oracles.jacobian(t, model, x) for t, x in parts]))


def dense(block: Tensor) -> Tensor:
    return block.flatten(2).flatten(0, 1)


def rearranged(block: Tensor) -> Tensor:
    """[(o, i), (p, j)] to [(o, p), (i, j)]."""
    return block.movedim(2, 1).flatten(2).flatten(0, 1)


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("names", [["poisson"], ["vector"], ["allen_cahn", "value"]])
@pytest.mark.parametrize("kind", ["tanh", "residual", "no_bias", "repeated"])
def test_is_the_truncated_singular_value_decomposition(kind, names, rank):
    """Singular values, and the error, that no other sum of so many products undercuts."""
    model, terms = build(kind), [TERMS[name] for name in names]
    batch = [points(7, seed=i) for i in range(len(terms))]
    operator = of(terms, model, batch, rank, **TIGHT)
    for i, block in enumerate(exact_blocks(terms, model, batch)):
        sigma = torch.linalg.svdvals(rearranged(block))
        received = torch.tensor(operator.records[i].singular_values, dtype=torch.float64)
        assert operator.records[i].converged
        oracles.assert_close(received / sigma[0], sigma[: len(received)] / sigma[0], 1e-8)
        assert len(received) == min(rank, len(sigma))
        error = (operator.block_to_dense(i) - dense(block)).norm() / sigma[0]
        oracles.assert_close(error, sigma[rank:].norm() / sigma[0], 1e-6)
        oracles.assert_close(operator.block_to_dense(i), operator.block_to_dense(i).T)


@pytest.mark.parametrize("kind", ["tanh", "no_bias"])
def test_error_falls_with_the_rank_until_the_block_is_recovered(kind):
    terms, model, batch = [TERMS["vector"]], build(kind), [points(6)]
    for i, block in enumerate(exact_blocks(terms, model, batch)):
        C = dense(block)
        full = min(block.shape[0], block.shape[1]) ** 2
        operators = [of(terms, model, batch, rank) for rank in (1, 2, 3, 5, full)]
        errors = [(o.block_to_dense(i) - C).norm().item() for o in operators]
        assert all(b <= a + 1e-12 * C.norm() for a, b in itertools.pairwise(errors))
        oracles.assert_close(operators[-1].block_to_dense(i), C)


@pytest.mark.parametrize("sharing", [expand, reduce])
@pytest.mark.parametrize(
    "problem", [poisson2d(20, 10), heat1d(20, 10), log_fokker_planck(1)], ids=lambda p: p.name
)
def test_rank_one_is_positive_and_below_kfac(problem, sharing):
    model = build("residual")
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    for term, x in zip(problem.terms, batch, strict=True):
        lin, exact = [linearize(term, model, x[:20])], exact_blocks([term], model, [x[:20]])
        kfac, operator = KFAC(sharing)(lin), OptimalKronecker()(lin)
        with pytest.warns(KroneckerNotConverged):
            early = optimal_kronecker(lin, iterations=1)
        for i, block in enumerate(exact):
            best, first, reference = (
                (o.block_to_dense(i) - dense(block)).norm() for o in (operator, early, kfac)
            )
            bound = 1e-12 * dense(block).norm()
            assert best <= first + bound
            assert best <= reference + bound
            if sharing == expand:
                assert first <= reference + bound, "the iteration starts from KFAC-expand"
            (pair,) = operator.factors[i]
            for factor in (pair.A, pair.B):
                oracles.assert_close(factor, factor.T)
                assert torch.linalg.eigvalsh(factor).min() > -1e-12 * factor.norm()
            oracles.assert_close(pair.A.norm(), pair.B.norm())


@pytest.mark.parametrize("names", [["poisson"], ["vector", "value"]])
def test_exact_where_every_row_has_the_same_inputs_or_gradients(names):
    """One point and one channel; and one output, where the block is A itself."""
    x = points(1)
    term = LossTerm({"u": Value()}, lambda x, u: u**2 - u, Fixed(x), 1.7, "term")
    model = build("tanh", 2, 2)
    for i, block in enumerate(exact_blocks([term], model, [x])):
        oracles.assert_close(of([term], model, [x]).block_to_dense(i), dense(block))
    terms, model = [TERMS[name] for name in names], build("tanh")
    batch = [points(5, seed=i) for i in range(len(terms))]
    head = dense(exact_blocks(terms, model, batch)[-1])
    oracles.assert_close(of(terms, model, batch).block_to_dense(2), head)


# --- several terms --------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2])
def test_products_per_term_are_those_of_each_term(rank):
    terms, model, batch = [TERMS["poisson"], TERMS["vector"]], build("gated"), [points(), points(5)]
    operator = of(terms, model, batch, rank, per_term=True)
    alone = [of([t], model, [x], rank).to_dense() for t, x in zip(terms, batch, strict=True)]
    oracles.assert_close(operator.to_dense(), sum(alone), 1e-8)
    names = {record.terms for record in operator.records}
    assert names == {"poisson", "vector"}
    if rank == 1:
        oracles.assert_close(operator.term("vector").to_dense(), alone[1], 1e-8)
    else:
        assert [len(layer) for layer in operator.products] == [4, 4, 4, 2]
    assert {record.terms for record in of(terms, model, batch).records} == {"poisson+vector"}


@pytest.mark.parametrize("rank", [1, 2])
def test_term_that_does_not_use_a_layer(rank):
    terms, batch = PARTS, [points(3), points(4)]
    operator = of(terms, TwoParts(), batch, rank, per_term=True)
    for record in operator.records:
        unused = record.layer.startswith("v.") and record.terms == "value"
        assert (sum(record.singular_values) == 0) == unused
        assert record.converged
    assert operator.to_dense().isfinite().all()


# --- as operators ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per_term", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_conformance(rank, per_term, monkeypatch):
    """Inverses too: of the positive part where a block has negative eigenvalues."""
    terms, batch = [TERMS["allen_cahn"], TERMS["vector"]], [points(), points(4)]
    operator = of(terms, build("tanh"), batch, rank, per_term=per_term)
    matrix = operator.to_dense()
    if rank == 1:
        assert type(operator) is OptimalKroneckerLinearOperator
        check_operator(operator, matrix, tolerance=1e-10)
        return
    assert type(operator) is KroneckerExpansionLinearOperator
    check_operator(operator, matrix, dampings=(), tolerance=1e-10)
    m, V = torch.linalg.eigh(matrix)
    assert m.min() < -1e-6 * m.max(), "the case is there to be tested"
    monkeypatch.setattr("pinncurv.linops.policy.LARGEST_EIGH", 0)
    for damping in DAMPINGS:
        check_inverse(operator, (V * m.clamp(min=0)) @ V.T, damping)


def test_rank_one_can_be_used_like_kfac():
    operator = of([TERMS["poisson"], TERMS["value"]], build("tanh"), [points(), points()])
    assert (FactorDamping(1e-3)(operator).to_dense()).isfinite().all()
    again = operator.with_tensors(operator.tensors())
    assert type(again) is type(operator)
    torch.testing.assert_close(again.to_dense(), operator.to_dense())


def test_higher_ranks_refuse_what_needs_positive_factors(monkeypatch):
    operator = of([TERMS["poisson"]], build("tanh"), [points()], 2)
    with pytest.raises(TypeError, match="got KroneckerExpansionLinearOperator"):
        FactorDamping(1e-3)(operator)
    monkeypatch.setattr("pinncurv.linops.policy.LARGEST_DENSE", 11)
    with pytest.raises(ValueError, match=r"dimension at most 11, but layer 2 has 12\. Use rank=1"):
        operator.inverse(1e-3)


# --- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3])
def test_scale(rank):
    """Weights, duplicated points, equal terms, chunks, and the choice of the gradients."""
    model, x, term = build("gated"), points(5), TERMS["vector"]
    once = of([term], model, [x], rank).to_dense()
    heavy = of([dataclasses.replace(term, weight=1.4)], model, [x], rank).to_dense()
    twin = dataclasses.replace(term, name="twin")
    chunked = optimal_kronecker(linearized([term], model, [x], chunk_size=2), rank).to_dense()
    oracles.assert_close(heavy, 2 * once, 1e-7)
    oracles.assert_close(of([term], model, [torch.cat([x, x])], rank).to_dense(), once, 1e-7)
    oracles.assert_close(of([term, twin], model, [x, x], rank).to_dense(), heavy, 1e-7)
    oracles.assert_close(chunked, once, 1e-7)
    assert once.norm() > 0


def test_empirical_choice():
    model, x, term = build("tanh"), points(), TERMS["vector"]
    u = oracles.at_point(model, oracles.trainable(model))
    r = torch.stack([oracles.residual_at(term, u, x, n).detach() for n in range(len(x))])
    J = torch.einsum("nv,nvd->nd", r, oracles.jacobian(term, model, x).unflatten(0, r.shape))
    operator = optimal_kronecker([linearize(term, model, x, Empirical())], 9)
    for i, block in enumerate(blocks_of(model, J)):
        oracles.assert_close(operator.block_to_dense(i), dense(block))


@pytest.mark.parametrize("rank", [1, 2])
def test_float32(rank):
    model, x, term = build("gelu"), points(), TERMS["poisson"]
    wanted = of([term], model, [x], rank).to_dense()
    received = of([term], model.float(), [x.float()], rank)
    assert received.dtype == received.to_dense().dtype == torch.float32
    torch.testing.assert_close(
        received.to_dense().double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()
    )


# --- what it reports and refuses ------------------------------------------------------------------


def test_reports_whether_it_converged():
    lin = [linearize(TERMS["poisson"], build("tanh"), points())]
    with pytest.warns(KroneckerNotConverged, match=r"at most 1\.0e-16, .* layer \d, terms poisson"):
        operator = optimal_kronecker(lin, rank=2, iterations=1, tolerance=1e-16)
    assert {record.iterations for record in operator.records} == {1}
    assert not any(record.converged for record in operator.records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        operator = optimal_kronecker(lin, rank=2)
    assert all(r.converged and r.change <= 1e-10 and r.iterations < 200 for r in operator.records)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"iterations": 0}, {"tolerance": float("nan")}])
def test_arguments(wrong):
    lin = [linearize(TERMS["poisson"], build("tanh"), points())]
    with pytest.raises(ValueError, match="rank and iterations must be at least 1"):
        optimal_kronecker(lin, **wrong)


def test_needs_output_gradients():
    lin = [linearize(TERMS["poisson"], build("tanh"), points(), ForwardOnly())]
    with pytest.raises(ValueError, match=r"layer 0\.weight needs output gradients"):
        optimal_kronecker(lin)
