"""Functions that are compositions of others: against nested torch.func, and what they refuse."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from pinncurv.jets import Jet, supported
from tests.jets.layouts import CASES, channels, check


def layer_norm(x, shape, weight=None, bias=None):
    """Torch's own has a wrong third derivative (2.13), so tensors get the definition."""
    if isinstance(x, Jet):
        return functional.layer_norm(x, shape, weight, bias)
    dims = tuple(range(-len(shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    result = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def bilinear(x, y):
    """Torch's own has no batching rule."""
    if isinstance(x, Jet):
        return nn_bilinear(x, y)
    return torch.einsum("ni,oij,nj->no", x, nn_bilinear.weight, y) + nn_bilinear.bias


def first(function):
    """Take the values out of torch.max and torch.min along an axis."""
    return lambda x: function(x).values


AXIS = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64)
FACTOR = torch.arange(24, dtype=torch.float64).sin().reshape(2, 3, 4)
CONVOLUTIONS = {
    "conv1d": nn.Conv1d(2, 3, 2),
    "conv1d_same": nn.Conv1d(2, 1, 3, padding="same", dilation=2, bias=False),
    "conv1d_strided": nn.Conv1d(2, 2, 3, stride=2, padding=2),
    "conv1d_circular": nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"),
}


def attention(query, key, value, **options):
    """The fused kernel that torch 2.14 prefers has no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return functional.scaled_dot_product_attention(query, key, value, **options)


SHAPED = {
    "layer_norm": ((4,), lambda x: layer_norm(x, (4,))),
    "layer_norm_affine": (
        (2, 3),
        lambda x: layer_norm(x, (2, 3), torch.arange(6.0).reshape(2, 3).double(), x.new_ones(3)),
    ),
    "rms_norm": ((4,), lambda x: functional.rms_norm(x, (4,))),
    "batch_norm": ((4,), nn.BatchNorm1d(4).double().eval()),
    "batch_norm_channels": ((4, 2), nn.BatchNorm1d(4).double().eval()),
    "group_norm": ((4,), nn.GroupNorm(2, 4, affine=False).double()),
    "group_norm_channels": ((4, 2), nn.GroupNorm(2, 4).double()),
    "softmax": ((4,), lambda x: torch.softmax(x, -1)),
    "softmax_module": ((2, 3), nn.Softmax(dim=1)),
    "softmax_dtype": ((4,), lambda x: functional.softmax(x, -1, dtype=torch.float64)),
    "softmin": ((2, 3), lambda x: functional.softmin(x, 1)),
    "log_softmax": ((4,), lambda x: functional.log_softmax(x, -1)),
    "logsumexp": ((2, 3), lambda x: torch.logsumexp(x, (1, 2))),
    "logsumexp_kept": ((4,), lambda x: x.logsumexp(1, keepdim=True)),
    "glu": ((4,), nn.GLU()),
    "prelu": ((4,), nn.PReLU().double()),
    "prelu_channels": ((4,), nn.PReLU(4).double()),
    "norm": ((4,), lambda x: torch.linalg.vector_norm(x, dim=-1)),
    "norm_function": ((4,), lambda x: torch.norm(x, dim=-1)),
    "norm_function_3": ((2, 3), lambda x: torch.norm(x, 3, (1, 2))),
    "norm_inf": ((2, 3), lambda x: torch.linalg.vector_norm(x, float("inf"), (1, 2))),
    "linalg_norm": ((4,), lambda x: torch.linalg.norm(x, 3, -1)),
    "linalg_norm_frobenius": ((2, 3), lambda x: torch.linalg.norm(x, dim=(1, 2))),
    "norm_method": ((4,), lambda x: x.norm(dim=1, keepdim=True)),
    "norm_3": ((2, 3), lambda x: torch.linalg.vector_norm(x, ord=3, dim=(1, 2))),
    "norm_1": ((4,), lambda x: x.norm(p=1, dim=-1)),
    "normalize": ((4,), lambda x: functional.normalize(x, dim=-1)),
    "normalize_3": ((4,), lambda x: functional.normalize(x, 3.0)),
    "cosine_similarity": ((4,), lambda x: functional.cosine_similarity(x, x.sin() - 0.2)),
    "cosine_similarity_constant": ((3,), lambda x: functional.cosine_similarity(x, AXIS, dim=-1)),
    "vecdot": ((4,), lambda x: torch.linalg.vecdot(x, x.sin())),
    "cross": ((3,), lambda x: torch.linalg.cross(x, x.sin())),
    "cross_axis": ((3, 2), lambda x: torch.cross(x.sin(), x**2, dim=1)),
    "cross_constant": ((3,), lambda x: torch.linalg.cross(AXIS[None], x)),
    "outer": ((4,), lambda x: torch.outer(x[:, 0], AXIS)),
    "maximum": ((4,), lambda x: torch.maximum(x, x.flip(-1) ** 2)),
    "minimum_constant": ((4,), lambda x: torch.minimum(x, torch.full((4,), 0.3).double())),
    "amax": ((4,), lambda x: x.amax(-1)),
    "amin": ((2, 3), lambda x: torch.amin(x, 2, keepdim=True)),
    "max": ((4,), lambda x: torch.max(x, -1).values),
    "amax_axes": ((2, 3), lambda x: x.amax((1, 2))),
    "min": ((2, 3), first(lambda x: x.min(2, keepdim=True))),
    "max_of_two": ((4,), lambda x: torch.max(x, other=x.flip(-1))),
    "min_of_two": ((4,), lambda x: x.min(torch.full((4,), 0.3).double())),
    "gather": ((4,), lambda x: x.gather(1, torch.tensor([[0, 2]]).expand(len(x), -1))),
    "cumsum": ((4,), lambda x: x.cumsum(-1) ** 2),
    "var": ((4,), lambda x: x.var(-1)),
    "std": ((2, 3), lambda x: torch.std(x, (1, 2), correction=0)),
    "var_biased": ((4,), lambda x: torch.var(x, -1, False)),
    "std_biased": ((2, 3), lambda x: x.std(2, unbiased=False, keepdim=True)),
    "lerp": ((4,), lambda x: torch.lerp(x, x**2, 0.3)),
    "addcmul": ((4,), lambda x: torch.addcmul(x, x, x.sin(), value=0.5)),
    "addmm": ((2,), lambda x: torch.addmm(x, x.sin(), torch.eye(2).double() + 0.1)),
    "bilinear": ((3,), lambda x: bilinear(x, x.sin())),
    "attention": ((2, 3), lambda x: attention(x, x.sin(), x**2)),
    "causal": ((2, 3), lambda x: attention(x, x, x, is_causal=True)),
    "cumprod": ((2, 3), lambda x: torch.cumprod(x, 1)),
    "hypot": ((4,), lambda x: torch.hypot(x, x.sin() - 2)),
    "hypot_constant": ((3,), lambda x: torch.hypot(AXIS.expand(len(x), -1), x)),
    "atan2": ((4,), lambda x: torch.atan2(x - 0.5, x.sin() - 0.4)),
    "atan2_constant": ((3,), lambda x: torch.atan2(x, AXIS.expand(len(x), -1))),
    "atan2_of_constant": ((3,), lambda x: torch.arctan2(AXIS.expand(len(x), -1), -x)),
    "tensordot": ((2, 3), lambda x: torch.tensordot(x, FACTOR, 2)),
    "tensordot_axes": ((2, 3), lambda x: torch.tensordot(x, FACTOR, ([1, -1], [0, 1]))),
    "tensordot_matrix": ((3,), lambda x: torch.tensordot(x, FACTOR[0], dims=([1], [0]))),
    "roll": ((4,), lambda x: x.roll(1, -1) ** 2),
    "roll_axes": ((2, 3), lambda x: torch.roll(x, (1, 2), (1, 2)) ** 2),
    "tile": ((3,), lambda x: torch.tile(x, (2,)) ** 2),
    "tile_method": ((2, 3), lambda x: x.tile(1, 2, 2) ** 2),
    "transposed": ((2, 3), lambda x: x.mT @ x.sin()),
    **{name: ((2, 4), module.double()) for name, module in CONVOLUTIONS.items()},
}
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    nn_bilinear = nn.Bilinear(3, 3, 2).double()
    for batch_norm in (SHAPED["batch_norm"][1], SHAPED["batch_norm_channels"][1]):
        nn.init.normal_(batch_norm.running_mean)
        nn.init.uniform_(batch_norm.running_var, 0.5, 2.0)


@pytest.mark.parametrize("name", SHAPED)
@pytest.mark.filterwarnings("ignore:The second derivative of")  # of abs and clamp, on purpose
def test_values_and_derivatives(name):
    shape, function = SHAPED[name]
    case = CASES["two_sums"]
    check(case, function, channels(case, *shape, around=0.4))


def test_max_and_min_return_where():
    case = CASES["laplacian"]
    jet = Jet(channels(case, 4), case.layout)
    for function in (torch.max, torch.min):
        received, wanted = function(jet, -1), function(jet.value, -1)
        torch.testing.assert_close(received.values.value, wanted.values)
        assert torch.equal(received.indices, wanted.indices)
        torch.testing.assert_close(function(jet).value, function(jet.value))


def test_normalization_of_short_vectors():
    """Below eps they are divided by eps, as torch does."""
    case = CASES["laplacian"]
    check(case, lambda x: functional.normalize(x, eps=3.0), channels(case, 4, around=0.4))


def test_normalize_does_not_warn():
    case = CASES["laplacian"]
    functional.normalize(Jet(channels(case, 4), case.layout))


REFUSED = {
    "batch_norm": (nn.BatchNorm1d(4).double(), "model.eval"),
    "dropout": (
        lambda x: functional.scaled_dot_product_attention(
            x[:, None], x[:, None], x[:, None], dropout_p=0.1
        ),
        "neither dropout",
    ),
    "norm_0": (lambda x: torch.linalg.vector_norm(x, 0, -1), "must be a positive number, got 0"),
    "nuclear": (lambda x: torch.norm(x[:, None], "nuc", (1, 2)), "positive number, got 'nuc'"),
    "spectral": (
        lambda x: torch.linalg.norm(x[:, None], 2, (1, 2)),
        "must be Frobenius', got ord=2",
    ),
    "groups": (nn.Conv1d(4, 4, 1, groups=2).double(), "one group of channels, got groups=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    function, match = REFUSED[name]
    case, shape = CASES["laplacian"], (4, 1) if name == "groups" else (4,)
    with pytest.raises(NotImplementedError, match=match):
        function(Jet(channels(case, *shape), case.layout))


@pytest.mark.parametrize(
    "function",
    [
        functional.softmax,
        nn.Softmin(),
        functional.log_softmax,
        lambda x: torch.cross(x, x, dim=None),
    ],
    ids=["softmax", "softmin", "log_softmax", "cross"],
)
def test_the_axis_is_not_guessed(function):
    case = CASES["laplacian"]
    with pytest.raises(ValueError, match=r"must be given its axis, got dim=None.*Pass dim=-1"):
        function(Jet(channels(case, 3), case.layout))


def test_convolution_over_the_points_is_refused():
    case = CASES["laplacian"]
    convolution = nn.Conv1d(3, 3, 2).double()
    with pytest.raises(ValueError, match=r"\[N, channels, length\], got shape \(3, 4\).*unsqueeze"):
        convolution(Jet(channels(case, 4), case.layout))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.softmax(x, 0),
        torch.linalg.vector_norm,
        lambda x: x.var(0),
        lambda x: x.cumsum(0),
        lambda x: functional.layer_norm(x, (3, 4)),
        lambda x: x.amax(0),
        torch.max,
        lambda x: torch.min(x, 0),
        lambda x: torch.var(x, False),
        lambda x: x.gather(0, torch.zeros(1, 4).long()),
        lambda x: functional.normalize(x, dim=0),
        lambda x: functional.cosine_similarity(x, x, 0),
        lambda x: torch.linalg.vecdot(x, x, dim=0),
        lambda x: torch.linalg.cross(x, x, dim=0),
        lambda x: torch.outer(x[:, 0], x[:, 1]),
        lambda x: x.unfold(0, 2, 1),
        lambda x: functional.pad(x, (0, 0, 1, 1)),
    ],
    ids=[
        "softmax",
        "norm",
        "var",
        "cumsum",
        "layer_norm",
        "amax",
        "max",
        "min",
        "var_unbiased",
        "gather",
        "normalize",
        "cosine_similarity",
        "vecdot",
        "cross",
        "outer",
        "unfold",
        "pad",
    ],
)
def test_the_points_are_not_mixed(function):
    case = CASES["point_matrix"]
    with pytest.raises(ValueError, match="first axis must stay the axis of the points"):
        function(Jet(channels(case, 4), case.layout))


def test_supported_names_are_those_of_torch():
    names = supported()
    assert {"tanh", "nn.functional.linear", "nn.functional.layer_norm", "einsum"} <= set(names)
    assert names == sorted(set(names))
