"""Linear and structural functions: sums, shapes, indices, concatenations, constants."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pinncurv.jets import Jet, Layout, record, register_rule, seed
from tests.jets.layouts import BASIS, CASES, N, channels, check

CONSTANT = torch.arange(6, dtype=torch.float64).reshape(2, 3) / 7
PER_POINT = torch.arange(N * 6, dtype=torch.float64).reshape(N, 2, 3) / 5
MASK = torch.tensor([True, False, True])


def _augmented(x):
    x = x + 0  # in place on a tensor, a new jet on a jet
    x += 1
    x *= 2
    return x


# functions of a value [N, 2, 3]
FUNCTIONS = {
    "add_number": lambda x: 1 + x + 0.5,
    "add_alpha": lambda x: torch.add(x, CONSTANT, alpha=2),
    "sub_number": lambda x: x - 2,
    "number_sub": lambda x: 2 - x,
    "sub_alpha": lambda x: torch.sub(x, x.sin(), alpha=3),
    "rsub": lambda x: torch.rsub(x, 2.0, alpha=3),
    "sub_itself": lambda x: x.exp() - x,
    "add_vector": lambda x: x + CONSTANT[0],
    "add_matrix": lambda x: CONSTANT + x,
    "matrix_sub": lambda x: CONSTANT - x,
    "add_broadcasts_the_jet": lambda x: x[..., :1] + CONSTANT,
    "mul_broadcasts_the_jet": lambda x: x[..., :1] * CONSTANT,
    "neg": lambda x: -x,
    "negative": torch.negative,
    "sum_last": lambda x: x.sum(-1),
    "sum_keepdim": lambda x: torch.sum(x, dim=1, keepdim=True),
    "sum_two": lambda x: x.sum((1, 2)),
    "sum_list": lambda x: torch.sum(x, [-1, -2], True),
    "mean_last": lambda x: torch.mean(x, -1),
    "mean_two": lambda x: x.mean(dim=(2, 1)),
    "cat": lambda x: torch.cat([x, x.sin()], dim=-1),
    "cat_constant": lambda x: torch.cat([CONSTANT.expand(x.shape[0], 2, 3), x], 1),
    "concatenate": lambda x: torch.concatenate([x, x], -2),
    "stack": lambda x: torch.stack([x, 2 * x], dim=-1),
    "stack_constant": lambda x: torch.stack((x[:, 0], torch.ones_like(x[:, 0])), 1),
    "hstack": lambda x: torch.hstack([x, x]),
    "reshape": lambda x: x.reshape(-1, 6),
    "reshape_keyword": lambda x: torch.reshape(x, shape=(x.shape[0], 3, 2)),
    "view": lambda x: x.view(x.size(0), 3, -1),
    "flatten": lambda x: torch.flatten(x, 1),
    "flatten_module": nn.Flatten(),
    "unflatten": lambda x: x.unflatten(-1, (3, 1)),
    "unflatten_module": nn.Sequential(nn.Flatten(), nn.Unflatten(1, (3, 2))),
    "squeeze": lambda x: x[..., :1].squeeze(-1),
    "squeeze_larger": lambda x: x.squeeze(-1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "unsqueeze_middle": lambda x: torch.unsqueeze(x, 1),
    "transpose": lambda x: x.transpose(-1, -2),
    "swapaxes": lambda x: torch.swapaxes(x, 1, 2),
    "permute": lambda x: x.permute(0, 2, 1),
    "permute_keyword": lambda x: torch.permute(x, dims=(0, 2, 1)),
    "movedim": lambda x: torch.movedim(x, 1, -1),
    "expand": lambda x: x[:, :1].expand(-1, 4, -1),
    "repeat": lambda x: x.repeat(1, 2, 1),
    "flip": lambda x: torch.flip(x, dims=[-1]),
    "flip_method": lambda x: x.flip(1, 2),
    "column": lambda x: x[:, 0],
    "columns": lambda x: x[:, :, 1:],
    "ellipsis": lambda x: x[..., 0],
    "new_axis": lambda x: x[:, None, :, 1],
    "list_index": lambda x: x[..., [2, 0, 0]],
    "tensor_index": lambda x: x[:, torch.tensor([1, 0])],
    "mask_index": lambda x: x[:, :, MASK],
    "two_indices": lambda x: x[:, [0, 1], [2, 0]],
    "narrow": lambda x: x.narrow(2, 1, 2),
    "pad": lambda x: functional.pad(x, (1, 2)),
    "pad_value": lambda x: functional.pad(x, (0, 1, 1, 0), value=0.7),
    "pad_circular": lambda x: functional.pad(x, (1, 1), mode="circular"),
    "pad_reflect": nn.ReflectionPad1d(1),
    "select": lambda x: x.select(1, -1),
    "index_select": lambda x: torch.index_select(x, -1, torch.tensor([2, 0])),
    "split": lambda x: torch.split(x, 2, dim=-1)[1],
    "split_sizes": lambda x: x.split([1, 2], 2)[1] * x.split([1, 2], 2)[0],
    "chunk": lambda x: x.chunk(2, dim=1)[0],
    "unbind": lambda x: x.unbind(-1)[2] * x.unbind(-1)[0],
    "where": lambda x: torch.where(MASK, x, x.sin()),
    "where_number": lambda x: torch.where(x > 0.3, x, 0.1),
    "where_number_first": lambda x: torch.where(x > 0.3, 0.1, x),
    "where_constant": lambda x: torch.where(MASK, CONSTANT, x),
    "where_method": lambda x: x.where(MASK, x.cos()),
    "where_comparisons": lambda x: torch.where((x >= 0.3) & (x < 0.35), x, -x),
    "equal": lambda x: torch.where(x == x, x.sin(), x) + torch.where(x != x, x, 0.0),
    "clone": lambda x: x.clone().contiguous(),
    "dropout": nn.Dropout(0.5).eval(),
    "identity": nn.Identity(),
    "zeros_like": lambda x: x + torch.zeros_like(x) + torch.ones_like(x),
    "augmented": _augmented,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name):
    function = FUNCTIONS[name]
    case = CASES["two_sums"]
    check(case, function, channels(case, 2, 3))


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize("name", ["add_matrix", "sum_two", "cat_constant", "where", "reshape"])
def test_layouts(name, layout):
    case = CASES[layout]
    check(case, FUNCTIONS[name], channels(case, 2, 3))


def test_constants_per_point():
    case = CASES["point_matrix"]
    jet = Jet(channels(case, 2, 3), case.layout)
    for n in range(N):
        one = Jet(jet.channels[:, n : n + 1], case.layout)
        torch.testing.assert_close(
            (jet * PER_POINT + PER_POINT).channels[:, n],
            (one * PER_POINT[n] + PER_POINT[n]).channels[:, 0],
        )


def test_broadcasting_against_a_constant_with_more_axes():
    """The channels stay in front, whatever axes the value gains."""
    case = CASES["two_sums"]
    jet = Jet(channels(case, 3), case.layout)
    constant = torch.ones(5, N, 3, dtype=torch.float64)
    for result in (
        jet + constant,
        constant * jet,
        jet - constant,
        torch.where(constant > 0, jet, 0),
    ):
        assert result.shape == (5, N, 3)
        assert result.channels.shape == (case.layout.S, 5, N, 3)
    torch.testing.assert_close((jet + constant).channels[1:, 2], jet.channels[1:])
    torch.testing.assert_close((jet * constant).channels[:, 4], jet.channels)


def test_sum_over_everything():
    case = CASES["two_sums"]
    jet = Jet(channels(case, 2), case.layout)
    for total in (jet.sum(), torch.sum(jet, dim=(0, 1)), jet.mean() * (2 * N)):
        torch.testing.assert_close(total.channels, jet.channels.sum((1, 2)))


def test_jet_looks_like_its_value():
    case = CASES["laplacian"]
    jet = Jet(channels(case, 2, 3), case.layout)
    assert jet.shape == (N, 2, 3)
    assert jet.size() == (N, 2, 3)
    assert (jet.size(-1), jet.dim(), jet.ndim, jet.numel(), len(jet)) == (3, 3, 3, 6 * N, N)
    assert jet.dtype == torch.float64
    assert jet.device.type == "cpu"
    assert not jet.requires_grad
    assert repr(jet) == f"Jet(shape=({N}, 2, 3), S=5, dtype=torch.float64)"
    assert not hasattr(jet, "no_such_attribute")
    with pytest.raises(RuntimeError, match="truth value"):
        bool(jet > 0 if False else jet)


def test_operations_do_not_write_to_their_arguments():
    case = CASES["two_sums"]
    data = channels(case, 2, 3)
    before, jet = data.clone(), Jet(data, case.layout)
    for name, function in FUNCTIONS.items():
        function(jet)
        assert torch.equal(data, before), name


def test_seed_is_the_jet_of_the_identity():
    x = torch.rand(2, 3, dtype=torch.float64)
    jet = seed(x, CASES["laplacian"].layout)
    torch.testing.assert_close(jet.value, x)
    torch.testing.assert_close(jet.channels[1:4], BASIS[:, None].expand(3, 2, 3))
    torch.testing.assert_close(jet.channels[4], torch.zeros_like(x))
    assert jet.channels.is_contiguous()


# --- functions without a rule, and what must not happen to the points -----------------------------


class Model(nn.Module):
    """A network whose third module misbehaves."""

    def __init__(self, culprit):
        super().__init__()
        self.net = nn.Sequential(nn.Identity(), nn.Identity(), culprit)

    def forward(self, x):
        return self.net(x)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("culprit", "name"),
    [
        (Apply(lambda x: torch.logcumsumexp(x, 1)), r"torch\.logcumsumexp"),
        (Apply(lambda x: x.logcumsumexp(1)), r"torch\.logcumsumexp"),
        (nn.LocalResponseNorm(2), r"torch\.nn\.functional\.local_response_norm"),
        (nn.Softshrink(), r"torch\.nn\.functional\.softshrink"),
        (Apply(torch.linalg.det), r"torch\.linalg\.det"),
    ],
    ids=["logcumsumexp", "method", "local_response_norm", "softshrink", "det"],
)
def test_function_without_a_rule_names_itself_the_module_and_the_remedy(culprit, name):
    jet = seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS))
    message = rf"No jet rule for {name} \(called in net\.2\)\. Register .*@register_rule\({name}\)"
    with pytest.raises(NotImplementedError, match=message):
        Model(culprit)(jet)


def test_the_remedy_works():
    @register_rule(torch.diff)
    def diff(input, *, dim):
        return input[:, 1:] - input[:, :-1]

    case = CASES["two_sums"]
    check(case, lambda x: torch.diff(x, dim=1), channels(case, 3))
    check(case, lambda x: x.diff(dim=1), channels(case, 3))


def test_errors_name_the_model_itself():
    class Net(nn.Module):
        def forward(self, x):
            return torch.logcumsumexp(x, 1)

    jet = seed(torch.ones(2, 3, dtype=torch.float64), Layout(BASIS))
    with pytest.raises(NotImplementedError, match=r"called in the model Net"):
        Net()(jet)
    with pytest.raises(NotImplementedError, match=r"called in no module"):
        torch.logcumsumexp(jet, 1)


MIXING = {
    "sum": lambda x: x.sum(0),
    "sum_everything": lambda x: x.sum(),
    "mean": lambda x: x - x.mean(0, keepdim=True),
    "prod": lambda x: x.prod(0),
    "prod_everything": lambda x: x.prod(),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "reshape": lambda x: x.reshape(-1, 1),
    "flatten": torch.flatten,
    "unsqueeze": lambda x: x.unsqueeze(0),
    "transpose": lambda x: x.transpose(0, 1),
    "t": torch.t,
    "permute": lambda x: x.permute(1, 0),
    "movedim": lambda x: x.movedim(0, 1),
    "flip": lambda x: x.flip(0),
    "repeat": lambda x: x.repeat(2, 1),
    "expand": lambda x: x.expand(2, *x.shape),
    "index": lambda x: x[0],
    "slice": lambda x: x[:2],
    "mask": lambda x: x[x > 0],
    "shuffle": lambda x: x[torch.tensor([1, 0, 2])],
    "narrow": lambda x: x.narrow(0, 0, 1),
    "split": lambda x: x.split(1)[0],
    "unbind": lambda x: x.unbind()[0],
    "left_matmul": lambda x: torch.ones(2, N, dtype=torch.float64) @ x,
    "einsum": lambda x: torch.einsum("mi,ni->mn", torch.ones(2, 3, dtype=torch.float64), x),
    "gram": lambda x: torch.einsum("ni,mi->nm", x, x),
    "broadcast_jets": lambda x: x[:, 0] * x[:, :1],
    "broadcast_sum": lambda x: x[:, 0] + x[:, :1],
    "broadcast_constant": lambda x: x[:, 0] * torch.ones(N, 1, dtype=torch.float64),
    "add_constant": lambda x: x[:, 0] + torch.ones(N, 1, dtype=torch.float64),
    "where_jets": lambda x: torch.where(MASK, x[:, 0], x[:, :1]),
    "where": lambda x: torch.where(torch.ones(2, 1, 1).bool(), x, x),
}


@pytest.mark.parametrize("name", MIXING)
def test_mixing_the_points_is_refused_when_recording(name):
    jet = Jet(channels(CASES["laplacian"], 3), CASES["laplacian"].layout)
    with record(), pytest.raises(ValueError, match="first axis must stay the axis of the points"):
        MIXING[name](jet)


@pytest.mark.parametrize("name", ["sum", "transpose", "broadcast_jets", "gram", "left_matmul"])
def test_mixing_the_points_is_refused_with_coefficients_per_point(name):
    case = CASES["point_matrix"]
    with pytest.raises(ValueError, match="first axis must stay the axis of the points"):
        MIXING[name](Jet(channels(case, 3), case.layout))


@pytest.mark.parametrize("name", ["broadcast_jets", "broadcast_sum", "where_jets"])
def test_broadcasting_points_against_points_is_refused_always(name):
    """[N] against [N, 1] is a bug in a plain forward pass, too."""
    case = CASES["laplacian"]
    message = r"broadcasting shapes \(3,\) and \(3, 1\) .* \(in no module\).*unsqueeze\(-1\)"
    with pytest.raises(ValueError, match=message):
        MIXING[name](Jet(channels(case, 3), case.layout))


@pytest.mark.parametrize("name", ["where_constant", "where_number_first"])
def test_constants_without_the_points_axis_are_fine_when_recording(name):
    case = CASES["point_matrix"]
    jet = Jet(channels(case, 2, 3), case.layout)
    wanted = FUNCTIONS[name](Jet(jet.channels, CASES["laplacian"].layout)).value
    with record():
        assert torch.equal(FUNCTIONS[name](jet).value, wanted)


@pytest.mark.parametrize("name", ["sum", "mean", "cat", "index", "shuffle", "left_matmul", "gram"])
def test_mixing_the_points_is_allowed_otherwise(name):
    case = CASES["laplacian"]
    assert isinstance(MIXING[name](Jet(channels(case, 3), case.layout)), Jet)


def test_assignment_raises():
    def assign(x):
        x[:, 0] = 1.0
        return x

    case = CASES["laplacian"]
    with pytest.raises(NotImplementedError, match=r"Jets are immutable.*in net\.2.*torch\.where"):
        Model(Apply(assign))(Jet(channels(case, 3), case.layout))


def test_axis_out_of_range_raises():
    case = CASES["laplacian"]
    with pytest.raises(IndexError, match=r"between -2 and 1 .* got 2"):
        Jet(channels(case, 3), case.layout).sum(2)


def test_separated_index_tensors_raise():
    case = CASES["laplacian"]
    jet = Jet(channels(case, 2, 2, 2), case.layout)
    with pytest.raises(NotImplementedError, match="Index in two steps"):
        jet[:, [0, 1], :, [0, 1]]


def test_dropout_in_training_raises():
    case = CASES["laplacian"]
    with pytest.raises(NotImplementedError, match=r"model\.eval\(\)"):
        nn.Dropout(0.5)(Jet(channels(case, 2), case.layout))
