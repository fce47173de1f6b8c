"""KFAC: factors against their definition, the cases where it is exact, scale laws."""

import dataclasses

import pytest
import torch

from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    KFACLinearOperator,
    MatrixFreeGaussNewton,
    expand,
    reduce,
)
from pinncurv.diffops import Directional, Gradient, Laplacian, Partial, SecondOrder, Value
from pinncurv.linearization import Empirical, ForwardOnly, Type2, linearize
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.conformance import check_operator
from tests.networks import TwoParts, build, points
from tests.terms import PARTS, TERMS

SHARINGS = {"expand": (expand, oracles.kfac_expand), "reduce": (reduce, oracles.kfac_reduce)}
FISHERS = {"type2": Type2(), "empirical": Empirical(), "forward_only": ForwardOnly()}
LAYERED = ["tanh", "residual", "gated", "fourier", "hard_boundary", "no_bias", "repeated", "linear"]


def kfac(terms, model, batch, sharing=expand, fisher=None, **options) -> KFACLinearOperator:
    linearized = [linearize(t, model, x, **options) for t, x in zip(terms, batch, strict=True)]
    return KFAC(sharing, fisher)(linearized)


def block_diagonal(terms, model, batch) -> torch.Tensor:
    linearized = [linearize(t, model, x) for t, x in zip(terms, batch, strict=True)]
    return BlockDiagonalGaussNewton()(linearized).to_dense()


def term_of(operators, residual, weight=1.0) -> LossTerm:
    return LossTerm(operators, residual, Fixed(points()), weight, "term")


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("term", ["poisson", "allen_cahn", "vector", "diffusion"])
@pytest.mark.parametrize("kind", LAYERED)
def test_factors_are_those_of_the_definition(kind, term, sharing):
    rule, oracle = SHARINGS[sharing]
    model, x, loss_term = build(kind), points(), TERMS[term]
    operator = kfac([loss_term], model, [x], rule)
    expected = oracles.layers(loss_term, model, x)
    assert [block.name for block in operator.blocks] == list(expected)
    for (pair,), layer in zip(operator.factors, expected.values(), strict=True):
        A, B = oracle(layer)
        oracles.assert_close(pair.A, A)
        oracles.assert_close(pair.B, B)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_choices_of_the_gradients(fisher, sharing):
    """Empirical scales g by the residual; forward-only replaces B by the weight times I."""
    rule, oracle = SHARINGS[sharing]
    model, x, term = build("tanh"), points(), TERMS["vector"]
    operator = kfac([term], model, [x], rule, FISHERS[fisher])
    u = oracles.at_point(model, oracles.trainable(model))
    r = torch.stack([oracles.residual_at(term, u, x, n).detach() for n in range(len(x))], 1)
    for (pair,), layer in zip(
        operator.factors, oracles.layers(term, model, x).values(), strict=True
    ):
        if fisher == "empirical":
            layer.G = torch.einsum("vn,vnso->nso", r, layer.G)[None]
        A, B = oracle(layer)
        oracles.assert_close(pair.A, A)
        wanted = 0.7 * torch.eye(len(B), dtype=torch.float64) if fisher == "forward_only" else B
        oracles.assert_close(pair.B, wanted)


@pytest.mark.parametrize("fisher", ["empirical", "forward_only"])
def test_choice_made_when_linearizing(fisher):
    """The choice of G may be made in either place, with the same result."""
    model, x, term = build("tanh"), points(), TERMS["vector"]
    first = kfac([term], model, [x], fisher=FISHERS[fisher])
    linearized = linearize(term, model, x, FISHERS[fisher])
    second = KFAC()([linearized])
    torch.testing.assert_close(second.to_dense(), first.to_dense())


def test_choice_made_twice():
    """Choosing the empirical gradients twice scales by the residual once."""
    model, x, term = build("tanh"), points(), TERMS["poisson"]
    wanted = kfac([term], model, [x], fisher=Empirical())
    linearized = linearize(term, model, x, Empirical())
    received = KFAC(fisher=Empirical())([linearized])
    torch.testing.assert_close(received.to_dense(), wanted.to_dense())


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_change_nothing(chunk_size, fisher, sharing):
    terms = [TERMS["vector"], TERMS["anisotropic"], TERMS["log_fokker_planck"]]
    model, batch, rule = build("gated"), [points(4), points(3), points(5)], SHARINGS[sharing][0]
    whole = kfac(terms, model, batch, rule, FISHERS[fisher])
    chunked = kfac(terms, model, batch, rule, FISHERS[fisher], chunk_size=chunk_size)
    for pairs, others in zip(whole.factors, chunked.factors, strict=True):
        for pair, other in zip(pairs, others, strict=True):
            torch.testing.assert_close(other.A, pair.A)
            torch.testing.assert_close(other.B, pair.B)


def test_chunks_where_a_field_vanishes_have_the_same_channels():
    field = SecondOrder(lambda x: torch.diag_embed((x - 0.4).clamp(min=0)))
    term = term_of({"a": field}, lambda x, a: a)
    model = build("tanh")
    x = torch.tensor([[0.1, 0.2], [0.9, 0.1], [0.8, 0.9]], dtype=torch.float64)
    torch.testing.assert_close(
        kfac([term], model, [x], chunk_size=1).to_dense(), kfac([term], model, [x]).to_dense()
    )


@pytest.mark.parametrize("sharing", SHARINGS)
def test_conformance(sharing):
    model, rule = build("residual"), SHARINGS[sharing][0]
    two = [TERMS["allen_cahn"], TERMS["value"]]
    one = kfac(two[:1], model, [points()], rule)
    check_operator(one, one.to_dense(), tolerance=1e-10)
    both = kfac(two, model, [points(), points(4)], rule)
    check_operator(both, both.to_dense(), tolerance=1e-10)


def test_sum_over_terms():
    terms, batch = (
        [TERMS["poisson"], TERMS["vector"], TERMS["value"]],
        [points(n) for n in (3, 4, 2)],
    )
    model = build("gated")
    operator = kfac(terms, model, batch)
    assert operator.terms == ("poisson", "vector", "value")
    alone = [kfac([t], model, [x]).to_dense() for t, x in zip(terms, batch, strict=True)]
    torch.testing.assert_close(operator.to_dense(), sum(alone))
    for i, term in enumerate(operator.terms):
        torch.testing.assert_close(operator.term(term).to_dense(), alone[i])
        torch.testing.assert_close(operator.term(i).to_dense(), alone[i])


def test_recipe():
    model, x, term = build("gated"), points(), TERMS["vector"]
    linearized = [linearize(term, model, x)]
    for sharing in (expand, reduce):
        torch.testing.assert_close(
            KFAC(sharing=sharing)(linearized).to_dense(),
            kfac([term], model, [x], sharing).to_dense(),
        )
    torch.testing.assert_close(
        KFAC(fisher=ForwardOnly())(linearized).to_dense(),
        kfac([term], model, [x], fisher=ForwardOnly()).to_dense(),
    )


# --- where KFAC is exact --------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("kind", ["tanh", "residual", "gated", "no_bias"])
def test_exact_for_one_point_and_one_channel(kind, sharing):
    """N = S = 1, with two residual components."""
    model, x = build(kind, 2, 2), points(1)
    term = term_of({"u": Value()}, lambda x, u: u**2 - u, 1.7)
    received = kfac([term], model, [x], SHARINGS[sharing][0]).to_dense()
    oracles.assert_close(received, block_diagonal([term], model, [x]))


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("d_out", [1, 2])
def test_exact_for_deep_linear_networks_with_one_channel(d_out, sharing):
    """S = 1 and a linear residual, any number of points."""
    model, x = build("linear", 2, d_out), points(5)
    term = term_of({"u": Value()}, lambda x, u: 3 * u - x[:, :1], 0.6)
    received = kfac([term], model, [x], SHARINGS[sharing][0]).to_dense()
    oracles.assert_close(received, block_diagonal([term], model, [x]))


@pytest.mark.parametrize(
    "operators",
    [
        {"u": Value(), "a": Partial(0)},
        {"u": Value(), "a": Partial(0), "b": Partial(1)},
        {"u": Value(), "a": Directional(torch.tensor([0.3, -2.0], dtype=torch.float64))},
        {"u": Value(), "a": Partial(1), "b": Directional(torch.cos)},
    ],
)
@pytest.mark.parametrize("d_out", [1, 2])
def test_reduce_is_exact_for_value_plus_directional_derivatives(d_out, operators):
    """On deep linear networks: every channel has the same gradient, so J_n = g ⊗ Σ_s z_ns.

    No constant is left over: the mean over S in A and the sum over S in B cancel.
    """
    model, x = build("linear", 2, d_out), points(4)
    term = term_of(operators, lambda x, **values: sum(values.values()), 1.3)
    exact = block_diagonal([term], model, [x])
    oracles.assert_close(kfac([term], model, [x], reduce).to_dense(), exact)
    difference = kfac([term], model, [x], expand).to_dense() - exact
    assert difference.norm() > 0.1 * exact.norm(), "expand is no theorem here"


def test_not_exact_in_general():
    """The ladder ends: on a nonlinear network with several channels KFAC is an approximation."""
    model, x = build("tanh"), points(4)
    exact = block_diagonal([TERMS["poisson"]], model, [x])
    for sharing in (expand, reduce):
        received = kfac([TERMS["poisson"]], model, [x], sharing).to_dense()
        assert (received - exact).norm() > 1e-2 * exact.norm()


# --- scale ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", ["number", "tensor", "function"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_doubling_a_weight_doubles(sharing, fisher, weight):
    rule, chosen = SHARINGS[sharing][0], FISHERS[fisher]
    x = points()
    w = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    weights = {
        "number": (0.8, 1.6),
        "tensor": (w, 2 * w),
        "function": (lambda x: x[:, 0], lambda x: 2 * x[:, 0]),
    }[weight]
    model = build("gated")
    once, twice = (
        kfac([dataclasses.replace(TERMS["vector"], weight=w)], model, [x], rule, chosen).to_dense()
        for w in weights
    )
    torch.testing.assert_close(twice, 2 * once)
    assert once.norm() > 0


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_duplicating_the_batch_changes_nothing(sharing, fisher):
    model, x, rule = build("gated"), points(), SHARINGS[sharing][0]
    for term in (TERMS["vector"], TERMS["log_fokker_planck"]):
        once, twice = (
            kfac([term], model, [batch], rule, FISHERS[fisher]).to_dense()
            for batch in (x, torch.cat([x, x]))
        )
        torch.testing.assert_close(twice, once)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_two_equal_terms_are_one_of_double_weight(sharing, fisher):
    model, x, term = build("gated"), points(), TERMS["vector"]
    rule, chosen = SHARINGS[sharing][0], FISHERS[fisher]
    twin = dataclasses.replace(term, name="twin")
    heavy = dataclasses.replace(term, weight=1.4)
    torch.testing.assert_close(
        kfac([term, twin], model, [x, x], rule, chosen).to_dense(),
        kfac([heavy], model, [x], rule, chosen).to_dense(),
    )


def test_expand_and_reduce_agree_without_sharing():
    """One channel: nothing is shared, both are the ordinary KFAC."""
    model, x = build("gated"), points()
    torch.testing.assert_close(
        kfac([TERMS["value"]], model, [x], expand).to_dense(),
        kfac([TERMS["value"]], model, [x], reduce).to_dense(),
    )


# --- the channel set is part of the definition ----------------------------------------------------


def laplacian_term(operators) -> LossTerm:
    return term_of(operators, lambda x, **values: -values["lap"])


def test_rotated_directions_change_reduce_but_not_expand():
    """An orthogonal change of directions leaves Σ_r z_r z_rᵀ as it is, and changes Σ_r z_r."""
    Q, _ = torch.linalg.qr(torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64))
    model, x = build("tanh"), points()
    standard = laplacian_term({"lap": Laplacian()})
    rotated = laplacian_term({"lap": SecondOrder.from_factors(Q)})
    before, after = (kfac([t], model, [x], reduce).to_dense() for t in (standard, rotated))
    assert (before - after).norm() > 1e-2 * before.norm()
    before, after = (kfac([t], model, [x], expand).to_dense() for t in (standard, rotated))
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_scaled_and_further_directions_change_kfac(sharing):
    model, x, rule = build("tanh"), points(), SHARINGS[sharing][0]
    eye = torch.eye(2, dtype=torch.float64)
    split = torch.cat([eye, 2 * eye], 1) / 5**0.5
    reference = kfac([laplacian_term({"lap": Laplacian()})], model, [x], rule).to_dense()
    further = {
        "split": {"lap": SecondOrder.from_factors(split)},
        "unused": {"lap": Laplacian(), "v": Directional(torch.cos)},
    }
    for operators in further.values():
        other = kfac([laplacian_term(operators)], model, [x], rule).to_dense()
        assert (other - reference).norm() > 1e-2 * reference.norm()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_merged_directions_do_not_change_kfac(sharing):
    """Declaring the directions of the Laplacian once more adds no channel."""
    model, x, rule = build("tanh"), points(), SHARINGS[sharing][0]
    alone = laplacian_term({"lap": Laplacian()})
    declared = laplacian_term({"lap": Laplacian(), "g": Gradient(), "p": Partial(1), "u": Value()})
    torch.testing.assert_close(
        kfac([alone], model, [x], rule).to_dense(), kfac([declared], model, [x], rule).to_dense()
    )


# --- the rest -------------------------------------------------------------------------------------


def test_term_that_does_not_use_a_layer_has_zero_factors():
    model = TwoParts()
    operator = kfac(PARTS, model, [points(3), points(4)])
    for block, (first, second) in zip(operator.blocks, operator.factors, strict=True):
        zero = block.name.startswith("v.")
        assert (torch.count_nonzero(first.A) == 0) == zero
        assert (torch.count_nonzero(first.B) == 0) == zero
        assert torch.count_nonzero(second.A) > 0
    x = torch.ones(operator.shape[0], dtype=torch.float64)
    assert (operator.inverse(1e-3) @ x).isfinite().all()


@pytest.mark.parametrize("sharing", SHARINGS)
def test_float32(sharing):
    rule, model = SHARINGS[sharing][0], build("gelu")
    wanted = kfac([TERMS["poisson"]], model, [points()], rule).to_dense()
    received = kfac([TERMS["poisson"]], model.float(), [points().float()], rule)
    assert received.dtype == torch.float32
    torch.testing.assert_close(
        received.to_dense().double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()
    )


def test_factors_are_positive_semidefinite_and_symmetric():
    operator = kfac([TERMS["vector"]], build("gated"), [points()])
    for (pair,) in operator.factors:
        for factor in (pair.A, pair.B):
            torch.testing.assert_close(factor, factor.T)
            assert torch.linalg.eigvalsh(factor).min() > -1e-12 * factor.norm()


def test_blocks_have_the_trace_of_expand_bounded_by_gauss_newton():
    """tr J_nᵀJ_n ≤ S Σ_s |g_s|² |z_s|²: the exact block is never larger than S² N times KFAC's."""
    model, x, term = build("tanh"), points(), TERMS["poisson"]
    linearized = [linearize(term, model, x)]
    exact = MatrixFreeGaussNewton()(linearized).to_dense().trace()
    S = linearized[0].blocks["0.weight"].Z.shape[0]
    assert exact <= S**2 * len(x) * kfac([term], model, [x]).trace()


def test_a_choice_that_was_made_is_not_overridden():
    linearization = linearize(TERMS["poisson"], build("no_bias"), points(), fisher=Empirical())
    with pytest.raises(ValueError, match=r"linearized with Empirical.*ForwardOnly"):
        KFAC(fisher=ForwardOnly())([linearization])


# --- merged terms ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
def test_merged_terms_are_one_product_of_the_merged_factors(sharing):
    """Σ_t B_t ⊗ A_t ≈ (Σ_t B_t) ⊗ (Σ_t tr(B_t) A_t / Σ_t tr(B_t)), with the trace of the sum."""
    terms = [TERMS["poisson"], TERMS["vector"], TERMS["value"]]
    model, batch = build("gated"), [points(n) for n in (3, 4, 2)]
    linearized = [linearize(t, model, x) for t, x in zip(terms, batch, strict=True)]
    rule = SHARINGS[sharing][0]
    whole = KFAC(rule)(linearized)
    merged = KFAC(sharing=rule, merge_terms=True)(linearized)
    assert merged.terms == ("poisson+vector+value",)
    torch.testing.assert_close(merged.trace(), whole.trace())
    for (pair,), pairs in zip(merged.factors, whole.factors, strict=True):
        A, B = torch.zeros_like(pair.A), torch.zeros_like(pair.B)
        for each in pairs:
            A += each.B.trace() * each.A
            B += each.B
        torch.testing.assert_close(pair.B, B)
        torch.testing.assert_close(pair.A, A / B.trace())
    assert (merged.to_dense() - whole.to_dense()).norm() > 1e-3 * whole.to_dense().norm()
    check_operator(merged, merged.to_dense(), tolerance=1e-10)


def test_merging_equal_terms_is_exact():
    """Two equal terms have equal A, and a term alone has nothing to merge with."""
    model, x, term = build("gated"), points(), TERMS["vector"]
    twin = dataclasses.replace(term, name="twin")
    linearized = [linearize(t, model, x) for t in (term, twin)]
    for chosen in (linearized, linearized[:1]):
        torch.testing.assert_close(
            KFAC(merge_terms=True)(chosen).to_dense(), KFAC()(chosen).to_dense()
        )
