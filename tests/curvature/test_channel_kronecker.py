"""Kronecker products by channel: against sums over pairs of channels, and where they are exact."""

import dataclasses

import pytest
import torch
from torch import Tensor

from pinncurv.curvature import (
    KFAC,
    BlockDiagonalGaussNewton,
    ChannelKronecker,
    ChannelKroneckerLinearOperator,
    Objective,
    reduce,
)
from pinncurv.diffops import Directional, Laplacian, SecondOrder, Value
from pinncurv.linearization import Empirical, ForwardOnly, linearize
from pinncurv.linops import (
    BlockFactorizedInverseLinearOperator,
    CGInverseLinearOperator,
    Damped,
    FactorDamping,
    FactorizationError,
)
from pinncurv.machine import Sizes
from pinncurv.optim import CurvatureOptimizer, QuadraticModel
from pinncurv.problems import Fixed, LossTerm, poisson2d
from tests import oracles
from tests.conformance import check_operator
from tests.meter import Meter
from tests.networks import TwoParts, build, points
from tests.terms import PARTS, TERMS

PAIRS = pytest.mark.parametrize("pairs", [True, False], ids=["pairs", "channels"])


def linearized(terms, model, batch, **options):
    return [linearize(t, model, x, **options) for t, x in zip(terms, batch, strict=True)]


def of(terms, model, batch, pairs=True, **options) -> ChannelKroneckerLinearOperator:
    return ChannelKronecker(pairs)(linearized(terms, model, batch, **options))


def by_definition(layer: oracles.Layer, pairs: bool) -> Tensor:
    """Return Σ_sq B_sq ⊗ A_sq of one layer, product by product."""
    N, S, _ = layer.Z.shape
    block = 0
    for s in range(S):
        for q in range(S) if pairs else [s]:
            A = torch.einsum("ni,nj->ij", layer.Z[:, s], layer.Z[:, q]) / N
            B = torch.einsum("vno,vnp->op", layer.G[:, :, s], layer.G[:, :, q])
            block = block + torch.kron(B.contiguous(), A.contiguous())
    return block


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["poisson", "allen_cahn", "vector"])
@pytest.mark.parametrize("kind", ["tanh", "gated", "no_bias", "repeated"])
def test_blocks_are_those_of_the_definition(kind, term):
    model, x, loss_term = build(kind), points(), TERMS[term]
    operators = {pairs: of([loss_term], model, [x], pairs) for pairs in (True, False)}
    expected = oracles.layers(loss_term, model, x)
    assert [block.name for block in operators[True].blocks] == list(expected)
    for i, layer in enumerate(expected.values()):
        S = layer.Z.shape[1]
        for pairs, operator in operators.items():
            oracles.assert_close(operator.block_to_dense(i), by_definition(layer, pairs))
            (factors,) = operator.factors[i]
            assert len(factors.A) == len(factors.B) == (S**2 if pairs else S)
        (factors,) = operators[True].factors[i]
        first_and_last = torch.einsum("ni,nj->ij", layer.Z[:, 0], layer.Z[:, S - 1]) / len(x)
        oracles.assert_close(factors.A[S - 1], first_and_last)
        oracles.assert_close(factors.A[(S - 1) * S], first_and_last.T)


@PAIRS
@pytest.mark.parametrize("made_when_linearizing", [True, False])
def test_empirical_choice(made_when_linearizing, pairs):
    model, x, term = build("tanh"), points(), TERMS["vector"]
    made = Empirical() if made_when_linearizing else None
    operator = ChannelKronecker(pairs, Empirical())([linearize(term, model, x, made)])
    u = oracles.at_point(model, oracles.trainable(model))
    r = torch.stack([oracles.residual_at(term, u, x, n).detach() for n in range(len(x))], 1)
    for i, layer in enumerate(oracles.layers(term, model, x).values()):
        layer.G = torch.einsum("vn,vnso->nso", r, layer.G)[None]
        oracles.assert_close(operator.block_to_dense(i), by_definition(layer, pairs))


@PAIRS
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks_change_nothing(chunk_size, pairs):
    terms, model = [TERMS["vector"], TERMS["anisotropic"]], build("gated")
    batch = [points(5), points(3)]
    whole = of(terms, model, batch, pairs)
    chunked = of(terms, model, batch, pairs, chunk_size=chunk_size)
    for M, other in zip(whole.tensors(), chunked.tensors(), strict=True):
        torch.testing.assert_close(other, M)


@PAIRS
def test_sum_over_terms(pairs):
    terms, model = [TERMS["poisson"], TERMS["vector"], TERMS["value"]], build("gated")
    batch = [points(n) for n in (3, 4, 2)]
    operator = of(terms, model, batch, pairs)
    assert operator.terms == ("poisson", "vector", "value")
    alone = [of([t], model, [x], pairs).to_dense() for t, x in zip(terms, batch, strict=True)]
    torch.testing.assert_close(operator.to_dense(), sum(alone))
    for i, term in enumerate(operator.terms):
        torch.testing.assert_close(operator.term(term).to_dense(), alone[i])
        torch.testing.assert_close(operator.term(i).to_dense(), alone[i])
    with pytest.raises(KeyError, match="term must be one of"):
        operator.term("initial")


# --- where it is exact ----------------------------------------------------------------------------


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("term", ["allen_cahn", "vector"])
@pytest.mark.parametrize("kind", ["tanh", "residual", "no_bias", "repeated", "tokens"])
def test_pairs_are_exact_for_copies_of_one_point(kind, term, copies):
    """Whatever the network, its channels, and the residual components; KFAC is not."""
    model, terms, batch = build(kind), [TERMS[term]], [points(1).repeat(copies, 1)]
    lin = linearized(terms, model, batch)
    exact = BlockDiagonalGaussNewton()(lin).to_dense()
    oracles.assert_close(ChannelKronecker()(lin).to_dense(), exact)
    for other in (ChannelKronecker(pairs=False), KFAC()):
        assert (other(lin).to_dense() - exact).norm() > 1e-4 * exact.norm()


def test_exact_blocks_are_the_oracles():
    """The reference above, for one case."""
    model, terms, batch = build("no_bias"), [TERMS["vector"]], [points(1)]
    operator, exact = of(terms, model, batch), oracles.gauss_newton(terms, model, batch)
    start = 0
    for i, parameter in enumerate(model.parameters()):
        part = slice(start, start + parameter.numel())
        oracles.assert_close(operator.block_to_dense(i), exact[part, part])
        start = part.stop


@PAIRS
@pytest.mark.parametrize("kind", ["tanh", "no_bias"])
def test_one_channel_is_kfac(kind, pairs):
    """With two outputs, and any number of points."""
    term = LossTerm({"u": Value()}, lambda x, u: u**2 - u, Fixed(points()), 1.7, "term")
    lin = [linearize(term, build(kind, 2, 2), points(4))]
    torch.testing.assert_close(ChannelKronecker(pairs)(lin).to_dense(), KFAC()(lin).to_dense())


def test_product_of_the_partial_traces():
    """It has the same partial traces."""
    operator = of([TERMS["poisson"], TERMS["value"]], build("tanh"), [points(), points(4)])
    product = operator.partial_traces()
    assert product.terms == ("poisson+value",)
    for i, block in enumerate(operator.blocks):
        d_out, d_joint = block.shape
        C, P = (
            op.block_to_dense(i).view(d_out, d_joint, d_out, d_joint) for op in (operator, product)
        )
        for subscripts in ("oioj->ij", "oipi->op"):
            oracles.assert_close(torch.einsum(subscripts, P), torch.einsum(subscripts, C))


# --- as an operator -------------------------------------------------------------------------------


@PAIRS
@pytest.mark.parametrize("names", [["allen_cahn"], ["vector", "value"]])
def test_conformance(names, pairs):
    """Positive semidefinite, as the inverses for small dampings show, with unsymmetric factors."""
    terms, batch = [TERMS[name] for name in names], [points(), points(4)][: len(names)]
    operator = of(terms, build("residual"), batch, pairs)
    check_operator(operator, operator.to_dense(), tolerance=1e-10)
    m = torch.linalg.eigvalsh(operator.to_dense())
    assert m.min() > -1e-12 * m.max()
    A = operator.factors[1][0].A
    assert ((A - A.mT).norm() > 1e-2 * A.norm()) == pairs


@PAIRS
def test_inverse_by_conjugate_gradients(pairs):
    operator = of([TERMS["poisson"], TERMS["value"]], build("tanh"), [points(6), points(4)], pairs)
    assert isinstance(operator.inverse(1e-3), BlockFactorizedInverseLinearOperator)
    for damping, saves in ((1e-3, False), (1.0, True)):
        inverse = operator.inverse(damping, dense_limit=1)
        assert isinstance(inverse, CGInverseLinearOperator)
        oracles.assert_close(inverse.to_dense(), operator.inverse(damping).to_dense(), 1e-8)
        b = torch.ones(operator.shape[0], dtype=torch.float64)
        plain = CGInverseLinearOperator(operator, damping)
        counts = [solver.solve(b).record.iterations for solver in (inverse, plain)]
        assert counts[0] < counts[1] or not saves


def test_inverse_without_damping():
    operator = of([TERMS["poisson"]], build("tanh"), [points(2)])
    with pytest.raises(FactorizationError, match=r"layer 0, damped block must be nonsingular"):
        operator.inverse(0.0)
    assert operator.inverse(0.0, dense_limit=1).preconditioner is None


def test_nonfinite_block_is_named():
    operator = of([TERMS["poisson"]], build("tanh"), [points()])
    operator.factors[1][0].B[1, 0, 0] = float("nan")
    with pytest.raises(FactorizationError, match="layer 2, damped block must be finite"):
        operator.inverse(1e-3)


def test_averages_are_positive_semidefinite():
    """Averaging the moments of several batches, and starting from the identity."""
    model, term = build("tanh"), TERMS["poisson"]
    operators = [of([term], model, [points(3, seed=i)]) for i in range(3)]
    identity = operators[0].identity()
    S = 4
    torch.testing.assert_close(
        identity.to_dense(), S**2 * torch.eye(len(identity.to_dense())).double()
    )
    sets = zip(*(operator.tensors() for operator in (identity, *operators)), strict=True)
    average = operators[0].with_tensors([torch.stack(tensors).mean(0) for tensors in sets])
    assert type(average) is ChannelKroneckerLinearOperator
    assert average.terms == operators[0].terms
    m = torch.linalg.eigvalsh(average.to_dense())
    assert m.min() > -1e-12 * m.max()


def test_factor_damping_is_refused():
    """It would add λ to the factors of every pair, also of different channels."""
    with pytest.raises(TypeError, match=r"ChannelKroneckerLinearOperator\. Use Damped"):
        FactorDamping(1e-3)(of([TERMS["poisson"]], build("tanh"), [points()]))


@PAIRS
def test_trains_a_network(pairs):
    problem, model = poisson2d(50, 20), build("mixed")
    optimizer = CurvatureOptimizer(
        model.parameters(),
        curvature=ChannelKronecker(pairs),
        inverse=Damped(1e-6),
        step_size=QuadraticModel(),
    )
    batch = problem.sample(torch.Generator().manual_seed(0), torch.float64, "cpu")
    objective = Objective(model, problem.terms, batch)
    losses = [float(optimizer.step(objective).loss) for _ in range(10)]
    assert losses[-1] < 0.5 * losses[0]


# --- scale ----------------------------------------------------------------------------------------


@PAIRS
def test_scale(pairs):
    """Weights, duplicated points, and equal terms."""
    model, x, term = build("gated"), points(5), TERMS["vector"]
    once = of([term], model, [x], pairs).to_dense()
    heavy = of([dataclasses.replace(term, weight=1.4)], model, [x], pairs).to_dense()
    twin = dataclasses.replace(term, name="twin")
    torch.testing.assert_close(heavy, 2 * once)
    torch.testing.assert_close(of([term], model, [torch.cat([x, x])], pairs).to_dense(), once)
    torch.testing.assert_close(of([term, twin], model, [x, x], pairs).to_dense(), heavy)
    assert once.norm() > 0


@pytest.mark.parametrize("change", ["rotated", "split", "further"])
def test_pairs_do_not_depend_on_the_channels(change):
    """As the exact matrix, and unlike KFAC: only Σ_s g_ns ⊗ z_ns counts."""
    eye = torch.eye(2, dtype=torch.float64)
    rotation, _ = torch.linalg.qr(torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64))
    operators = {
        "rotated": {"lap": SecondOrder.from_factors(rotation)},
        "split": {"lap": SecondOrder.from_factors(torch.cat([eye, 2 * eye], 1) / 5**0.5)},
        "further": {"lap": Laplacian(), "other": Laplacian(dims=[0]), "v": Directional(torch.cos)},
    }
    model, x = build("tanh"), points()
    first, second = (
        [linearize(LossTerm(o, lambda x, lap, **_: -lap, Fixed(x), 1.0, "term"), model, x)]
        for o in ({"lap": Laplacian()}, operators[change])
    )
    reference = ChannelKronecker()(first).to_dense()
    oracles.assert_close(ChannelKronecker()(second).to_dense(), reference)
    for other in (ChannelKronecker(pairs=False), KFAC(reduce)):
        before, after = other(first).to_dense(), other(second).to_dense()
        changes = change != "further" or isinstance(other, KFAC)
        assert ((before - after).norm() > 1e-3 * before.norm()) == changes


@PAIRS
def test_float32(pairs):
    model, x, term = build("gelu"), points(), TERMS["poisson"]
    wanted = of([term], model, [x], pairs).to_dense()
    received = of([term], model.float(), [x.float()], pairs)
    assert received.dtype == received.to_dense().dtype == torch.float32
    torch.testing.assert_close(
        received.to_dense().double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item()
    )
    matrix = received.to_dense().double()
    x = torch.rand(len(matrix), generator=torch.Generator().manual_seed(0))
    damping = 1e-4 * matrix.trace().item()
    exact = torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).double(), x.double())
    for inverse in (received.inverse(damping), received.inverse(damping, dense_limit=0)):
        assert (inverse @ x).dtype == torch.float32
        torch.testing.assert_close((inverse @ x).double(), exact, rtol=1e-4, atol=1e-5)
    loose = received.inverse(damping, dense_limit=0, tolerance=0.5) @ x
    assert (loose.double() - exact).norm() > 1e-3 * exact.norm()


def test_products_with_many_columns_fit_into_memory(monkeypatch):
    """A few pairs of channels at a time make the same product."""
    operator = of([TERMS["poisson"]], build("tanh"), [points()])
    X = torch.eye(operator.shape[1], dtype=torch.float64)
    expected = operator @ X
    with Meter() as meter:
        monkeypatch.setattr("pinncurv.machine.sizes._CPU", Sizes(1 << 19, 1, 256, 128))
        torch.testing.assert_close(operator @ X, expected)
    assert meter.largest <= X.numel()


def test_factors_must_fit():
    operator = of([TERMS["poisson"]], build("tanh"), [points()])
    blocks, shapes = operator.blocks, operator.shapes
    for factors in (operator.factors[:1], [(*layer, *layer) for layer in operator.factors]):
        with pytest.raises(ValueError, match=r"factors for each of the . layers and the terms"):
            ChannelKroneckerLinearOperator(factors, blocks, shapes, operator.terms)
    swapped = operator.factors[::-1]
    with pytest.raises(ValueError, match=r"layer .*, term .* must have shapes .* got"):
        ChannelKroneckerLinearOperator(swapped, blocks, shapes, operator.terms)


# --- the rest -------------------------------------------------------------------------------------


@PAIRS
def test_term_that_does_not_use_a_layer_has_no_products(pairs):
    terms, batch = PARTS, [points(3), points(4)]
    operator = of(terms, TwoParts(), batch, pairs)
    for block, (first, second) in zip(operator.blocks, operator.factors, strict=True):
        assert (len(first.A) == len(first.B) == 0) == block.name.startswith("v.")
        assert len(second.A) > 0
    check_operator(operator, operator.to_dense(), dampings=(1e-3,), tolerance=1e-10)
    unused = operator.term("value")
    check_operator(unused, unused.to_dense(), dampings=(1e-3,), tolerance=1e-10)
    assert unused.partial_traces().to_dense().isfinite().all()


@pytest.mark.parametrize("made_when_linearizing", [True, False])
def test_needs_output_gradients(made_when_linearizing):
    fisher = ForwardOnly() if made_when_linearizing else None
    lin = [linearize(TERMS["poisson"], build("tanh"), points(), fisher)]
    with pytest.raises(ValueError, match=r"term 'poisson' has none with ForwardOnly\(\)\. Use"):
        ChannelKronecker(fisher=ForwardOnly())(lin)
