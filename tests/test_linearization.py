"""Z and G of a loss term: the Jacobian that they stand for against nested torch.func."""

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pinncurv.diffops import Laplacian, Partial, SecondOrder, Value
from pinncurv.linearization import (
    DenseRows,
    Empirical,
    ForwardOnly,
    Linearization,
    Type2,
    UncapturedParameterError,
    linearize,
)
from pinncurv.linearization.bound import check_chunk_size
from pinncurv.machine import Sizes
from pinncurv.problems import Fixed, LossTerm
from tests import oracles
from tests.networks import KINDS, build, points
from tests.terms import TERMS


def naive_jacobian(linearization: Linearization) -> Tensor:
    """Build ``[N V, D]`` from Z and G by the definition J_n = Σ_s g_ns ⊗ z_ns, and dense rows."""
    columns = {name: [] for name in linearization.parameters}
    for chunk in linearization:
        n, V = chunk.residual.shape
        for name, parameter in linearization.parameters.items():
            rows = torch.zeros(n, V, *parameter.shape, dtype=torch.float64)
            for block in chunk.blocks.values():
                if isinstance(block, DenseRows):
                    if block.name == name:
                        rows += block.matrix.transpose(0, 1).reshape(rows.shape)
                    continue
                for i, v, s in itertools.product(range(n), range(V), range(len(block.Z))):
                    g = block.G[v, s, i]
                    if block.weight == name:
                        outer = torch.outer(g, block.Z[s, i])
                        rows[i, v] += outer.T if block.transposed else outer
                    if block.bias == name and s in block.value_channels:
                        rows[i, v] += g
            columns[name].append(rows.reshape(n * V, -1))
    return torch.cat([torch.cat(parts) for parts in columns.values()], 1)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("kind", KINDS)
def test_jacobian_and_residual(kind, term):
    d_out = 2 if term in ("value", "anisotropic") else 1
    model, x, loss_term = build(kind, 2, d_out), points(), TERMS[term]
    linearization = linearize(loss_term, model, x)
    oracles.assert_close(naive_jacobian(linearization), oracles.jacobian(loss_term, model, x))
    wanted = oracles.scaled_residual(loss_term, model, x, oracles.trainable(model))
    oracles.assert_close(linearization.residual, wanted.detach())
    assert linearization.num_components == wanted.shape[1]


@pytest.mark.parametrize("kind", ["tanh", "gated", "repeated", "no_bias"])
def test_channels_are_those_of_the_definition(kind):
    """Z and G one by one, not only what they sum to."""
    model, x, term = build(kind), points(), TERMS["allen_cahn"]
    layers, expected = linearize(term, model, x).blocks, oracles.layers(term, model, x)
    assert {name.removesuffix(".weight") for name in layers} == set(expected)
    for name, wanted in expected.items():
        layer = layers[f"{name}.weight"]
        oracles.assert_close(layer.G, wanted.G.transpose(1, 2))
        Z, d_in = wanted.Z.transpose(0, 1), layer.Z.shape[-1]
        oracles.assert_close(layer.Z, Z[..., :d_in])
        if layer.bias is not None:
            ones = torch.zeros_like(Z[..., d_in])
            ones[list(layer.value_channels)] = 1
            torch.testing.assert_close(Z[..., d_in], ones)
        assert layer.d_out == layer.G.shape[-1]


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
@pytest.mark.parametrize("term", TERMS)
def test_chunks_give_the_same(term, chunk_size):
    model, x, loss_term = build("gated"), points(), TERMS[term]
    if term == "anisotropic":
        model = build("gated", 2, 2)
    whole = linearize(loss_term, model, x)
    chunked = linearize(loss_term, model, x, chunk_size=chunk_size)
    for _ in range(2):
        torch.testing.assert_close(naive_jacobian(chunked), naive_jacobian(whole))
    torch.testing.assert_close(chunked.residual, whole.residual)
    assert chunked.num_components == whole.num_components
    assert [len(c.residual) for c in chunked] == [
        min(chunk_size, 3 - start) for start in range(0, 3, chunk_size)
    ]


@pytest.mark.parametrize("term", ["vector", "point_tensors", "anisotropic", "data"])
def test_blocks_of_points_are_invisible(term, monkeypatch):
    """Large batches are cut into blocks that stay in the cache; here each point is one."""
    model, x, loss_term = build("repeated"), points(), TERMS[term]
    whole = linearize(loss_term, model, x)
    monkeypatch.setattr("pinncurv.machine.sizes._CPU", Sizes(1, 1 << 22, 256, 128))
    blocks = linearize(loss_term, model, x)
    assert len(list(blocks)) == 3
    torch.testing.assert_close(naive_jacobian(blocks), naive_jacobian(whole))
    torch.testing.assert_close(blocks.residual, whole.residual)
    for name, layer in whole.blocks.items():
        torch.testing.assert_close(blocks.blocks[name].Z, layer.Z)
        torch.testing.assert_close(blocks.blocks[name].G, layer.G)


def test_chunks_after_an_update_raise():
    model = build("tanh")
    chunked = linearize(TERMS["value"], model, points(), chunk_size=2)
    whole = linearize(TERMS["value"], model, points())
    before = naive_jacobian(whole)
    assert list(chunked)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match=r"term 'value' .* Linearize again after an update"):
        list(chunked)
    torch.testing.assert_close(naive_jacobian(whole), before)


# --- the choices of G -----------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["poisson", "vector", "log_fokker_planck"])
def test_empirical_scales_by_the_residual(term):
    """G = Σ_v r_nv G_nv, with the residual itself, without weight and 1/N."""
    model, x, loss_term = build("tanh"), points(), TERMS[term]
    u = oracles.at_point(model, oracles.trainable(model))
    residual = [oracles.residual_at(loss_term, u, x, n).detach() for n in range(len(x))]
    exact = linearize(loss_term, model, x).blocks
    empirical = linearize(loss_term, model, x, fisher=Empirical()).blocks
    for name, layer in empirical.items():
        assert layer.G.shape[0] == 1
        for n, r in enumerate(residual):
            wanted = sum(r[v] * exact[name].G[v, :, n] for v in range(len(r)))
            torch.testing.assert_close(layer.G[0, :, n], wanted)
        torch.testing.assert_close(layer.Z, exact[name].Z)


def test_forward_only_has_no_gradients():
    linearization = linearize(TERMS["poisson"], build("tanh"), points(), fisher=ForwardOnly())
    assert all(layer.G is None for layer in linearization.blocks.values())


def test_type2_is_the_default():
    linearization = linearize(TERMS["poisson"], build("tanh"), points())
    assert linearization.fisher == Type2()


# --- which parameters are captured ----------------------------------------------------------------


class WithScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.net(x)


class WithMatrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(2, 3))
        self.net = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.tanh(x @ self.matrix))


class WithConstantBranch(nn.Module):
    """A linear layer that is applied to a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.code = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.code(torch.ones(1, 2, dtype=torch.float64))


class UsedTwoWays(nn.Module):
    """A weight in a linear layer and in a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) / self.net.weight.norm()


class Transposed(nn.Module):
    """A tied auto-encoder: the weight and its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(self.net(x)), self.net.weight.t())[:, :1]


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        (WithScale(), {"net.weight"}),
        (WithMatrix(), {"matrix", "net.weight"}),
        (WithConstantBranch(), {"net.weight", "code.weight"}),
        (UsedTwoWays(), set()),
        (Transposed(), set()),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 1)), set()),
    ],
    ids=["scale", "matmul", "linear_on_constant", "two_ways", "transposed", "weight_norm"],
)
@pytest.mark.parametrize("term", ["value", "poisson"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the oracle's vmap
def test_parameters_anywhere(model, layers, term):
    """A linear layer keeps its structure wherever it is one, all else has rows."""
    model.double()
    linearization = linearize(TERMS[term], model, points())
    linear = {n for n, block in linearization.blocks.items() if not isinstance(block, DenseRows)}
    assert linear == layers
    wanted = oracles.jacobian(TERMS[term], model, points())
    oracles.assert_close(naive_jacobian(linearization), wanted)


def test_frozen_uncaptured_parameters_are_fine():
    model = WithScale().double()
    model.scale.requires_grad_(False)
    linearization = linearize(TERMS["value"], model, points())
    assert set(linearization.parameters) == {"net.weight", "net.bias"}


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_layers_are_left_out(frozen):
    model, x, term = build("tanh"), points(), TERMS["allen_cahn"]
    layer = [m for m in model if isinstance(m, nn.Linear)][frozen]
    layer.requires_grad_(False)
    linearization = linearize(term, model, x)
    assert len(linearization.blocks) == 2
    oracles.assert_close(naive_jacobian(linearization), oracles.jacobian(term, model, x))


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_half_frozen_layers(part):
    """What is left of a layer is a layer without bias, or a bias without a layer."""
    model = build("tanh")
    getattr(model[0], part).requires_grad_(False)
    linearization = linearize(TERMS["allen_cahn"], model, points())
    assert ("0.bias" in linearization.blocks) == (part == "weight")
    wanted = oracles.jacobian(TERMS["allen_cahn"], model, points())
    oracles.assert_close(naive_jacobian(linearization), wanted)


def test_network_without_trained_tensors_raises():
    model = build("tanh").requires_grad_(False)
    with pytest.raises(ValueError, match="must have a parameter that requires a gradient"):
        linearize(TERMS["value"], model, points())


class TwoHeads(nn.Module):
    """Tied weights with a bias each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) + torch.sin(self.second(x))


def test_tied_weights_with_different_biases():
    model = TwoHeads().double()
    linearization = linearize(TERMS["value"], model, points())
    assert set(linearization.blocks) == {"first.weight", "first.bias", "second.bias"}
    wanted = oracles.jacobian(TERMS["value"], model, points())
    oracles.assert_close(naive_jacobian(linearization), wanted)


def test_tied_layers():
    """The same module under two names is one layer with twice the channels."""
    model = build("tanh")
    tied = nn.Sequential(model[0], nn.Tanh(), model[2], nn.Tanh(), model[2], model[4])
    linearization = linearize(TERMS["poisson"], tied, points())
    oracles.assert_close(
        naive_jacobian(linearization), oracles.jacobian(TERMS["poisson"], tied, points())
    )


class TiedBias(nn.Module):
    """A bias that two layers share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.second.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_tied_biases():
    """One block per layer cannot hold a bias that belongs to two of them: it has its own."""
    model = TiedBias().double()
    linearization = linearize(TERMS["value"], model, points())
    assert set(linearization.blocks) == {"first.weight", "second.weight", "first.bias"}
    wanted = oracles.jacobian(TERMS["value"], model, points())
    oracles.assert_close(naive_jacobian(linearization), wanted)


def test_layer_whose_output_does_not_reach_the_residual():
    """A term that differentiates the network does not see its last bias: its gradient is zero."""
    model, x = build("tanh"), points()
    layers = linearize(TERMS["poisson"], model, x).blocks
    assert torch.equal(layers["4.weight"].G[0, 0], torch.zeros(3, 1, dtype=torch.float64))


# --- what must not happen -------------------------------------------------------------------------


def test_nothing_is_left_behind():
    model, x = build("gated"), points()
    frozen = model.v.weight
    model.v.requires_grad_(False)
    linearization = linearize(TERMS["vector"], model, x)
    assert all(p.grad is None for p in model.parameters())
    assert not frozen.requires_grad
    assert all(p.requires_grad for n, p in model.named_parameters() if not n.startswith("v."))
    assert not x.requires_grad
    assert x.grad is None
    for chunk in linearization:
        tensors = [chunk.residual, chunk.unscaled]
        for layer in chunk.blocks.values():
            tensors += [layer.Z, layer.G]
        assert all(t.grad_fn is None and not t.requires_grad for t in tensors)


def test_works_under_no_grad_and_in_training():
    model, x = build("tanh"), points()
    expected = naive_jacobian(linearize(TERMS["allen_cahn"], model, x))
    with torch.no_grad():
        torch.testing.assert_close(
            naive_jacobian(linearize(TERMS["allen_cahn"], model, x)), expected
        )
    TERMS["allen_cahn"].evaluate(model, x).sum().backward()
    assert model[0].weight.grad is not None


def test_inference_mode_raises():
    model, x = build("tanh"), points()
    chunked = linearize(TERMS["poisson"], model, x, chunk_size=1)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"term 'poisson'.*inference_mode.*no_grad\(\)"):
            linearize(TERMS["poisson"], model, x)
        with pytest.raises(RuntimeError, match=r"term 'poisson'.*inference_mode.*no_grad\(\)"):
            list(chunked)


def test_an_evaluation_in_inference_mode_does_no_harm():
    """What it leaves in the cache of plans must serve a backward pass."""
    matrix = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    term = LossTerm({"c": SecondOrder(matrix)}, lambda x, c: c, Fixed(points()))
    model, x = build("gated"), points()
    with torch.inference_mode():
        expected = term.evaluate(model, x)
    residual = term.evaluate(model, x)
    residual.sum().backward()
    torch.testing.assert_close(residual.detach(), expected.clone())
    linearize(term, model, x)


def test_a_failed_pass_leaves_no_tape_behind():
    term = LossTerm(
        {"u": Value()}, lambda x, u: 1 / 0 if len(x) else u, Fixed(points()), name="bad"
    )
    model = build("tanh")
    with pytest.raises(ZeroDivisionError):
        linearize(term, model, points())
    loss = TERMS["value"].evaluate(model, points()).square().sum()
    loss.backward()
    assert model[0].weight.grad is not None


def test_dtypes_must_match():
    with pytest.raises(ValueError, match=r"agree in dtype .* torch\.float32 .* term 'value'"):
        linearize(TERMS["value"], build("tanh"), points().float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_points_must_be_finite(bad):
    x = points()
    x[1, 0] = bad
    with pytest.raises(ValueError, match=r"Term 'value'.*NaN or infinity in 1 of 3"):
        linearize(TERMS["value"], build("tanh"), x)


@pytest.mark.parametrize("shape", [(0, 2), (3,), (3, 3), (3, 2, 1)])
def test_points_must_be_a_matrix_of_the_right_width(shape):
    with pytest.raises(ValueError, match="Term 'value'"):
        linearize(TERMS["value"], build("tanh"), torch.ones(shape, dtype=torch.float64))


def test_captured_rows_do_not_survive_blocks():
    """They would meet the wrong points; as data they are cut along."""
    x, observed = points(), points(3, 1, seed=6)
    captured = LossTerm({"u": Value()}, lambda x, u: u - observed, Fixed(x), name="measured")
    for chunk_size in (None, 2):
        with pytest.raises(ValueError, match=r"'measured': .* N = [12] points.* by data="):
            linearize(captured, build("tanh"), x, chunk_size=chunk_size)


def test_data_must_have_one_row_per_point():
    with pytest.raises(
        ValueError, match=r"'data': data 'observed' must have one row .* N = 2, got"
    ):
        linearize(TERMS["data"], build("tanh"), points()[:2])


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_chunk_size_must_be_positive(chunk_size):
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        linearize(TERMS["value"], build("tanh"), points(), chunk_size=chunk_size)


def test_mixing_points_raises():
    class BatchCentred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = self.net(x)
            return h - h.mean(0, keepdim=True)

    with pytest.raises(ValueError, match="first axis must stay the axis of the points"):
        linearize(TERMS["value"], BatchCentred().double(), points())


@pytest.mark.parametrize("term", ["poisson", "vector"])
def test_float32(term):
    model, x = build("gelu"), points()
    expected = naive_jacobian(linearize(TERMS[term], model, x))
    received = linearize(TERMS[term], model.float(), x.float())
    assert all(layer.Z.dtype == torch.float32 for layer in received.blocks.values())
    assert received.residual.dtype == torch.float32
    torch.testing.assert_close(
        naive_jacobian(received), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )


def test_terms_that_use_different_layers():
    """A network of two parts, each used by one term; the other term knows nothing of it."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([torch.tanh(self.u(x)).sum(-1), torch.sin(self.v(x)).sum(-1)], -1)

    model, x = Pair().double(), points()
    for component in (0, 1):
        term = LossTerm(
            {"w": Value(), "w_x": Partial(0), "lap": Laplacian()},
            lambda x, w, w_x, lap, i=component: (w + w_x - lap)[:, i],
            Fixed(x),
        )
        linearization = linearize(term, model, x)
        oracles.assert_close(naive_jacobian(linearization), oracles.jacobian(term, model, x))


def test_a_trainable_tensor_outside_the_network_is_refused():
    factor = nn.Parameter(torch.ones((), dtype=torch.float64))
    term = LossTerm({"u": Value()}, lambda x, u: factor * u - 1, Fixed(points()))
    with pytest.raises(UncapturedParameterError, match="no parameter of the network"):
        linearize(term, build("no_bias"), points())


def test_mixed_dtypes_are_refused_by_name():
    model = build("no_bias")
    list(model.modules())[-1].float()
    term = LossTerm({"u": Value()}, lambda x, u: u - 1, Fixed(points()))
    with pytest.raises(ValueError, match=r"parameter \S+ in torch.float32"):
        linearize(term, model, points())


def test_non_finite_parameters_are_refused_by_name():
    model = build("no_bias")
    name, parameter = next(model.named_parameters())
    with torch.no_grad():
        parameter[0] = torch.nan
    term = LossTerm({"u": Value()}, lambda x, u: u - 1, Fixed(points()))
    with pytest.raises(FloatingPointError, match=name):
        linearize(term, model, points())


@pytest.mark.parametrize("size", [1.5, float("nan"), True, [3]])
def test_a_chunk_size_is_a_whole_number(size):
    with pytest.raises(TypeError, match="chunk_size must be a whole number of points or None, got"):
        check_chunk_size(size)
