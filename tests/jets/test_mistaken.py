"""Jets that are mistaken for something else, and derivatives that only torch drops or keeps."""

import functools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pinncurv.curvature import KFAC, Jacobian, Objective
from pinncurv.diffops import Laplacian, SecondOrder, Value, evaluate
from pinncurv.jets import Contraction, Layout, register_elementwise, register_rule, seed
from pinncurv.linearization import linearize
from pinncurv.linops import Damped
from pinncurv.optim import CurvatureOptimizer
from pinncurv.problems import Fixed, LossTerm
from tests.networks import points

X = points().repeat(2, 1)[:5] + torch.linspace(0, 0.2, 5, dtype=torch.float64)[:, None]


class Between(nn.Module):
    """A network with any function between its layers."""

    def __init__(self, function=lambda h: h, use=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.function = use or (lambda net, h: function(h))
        self.double()

    def forward(self, x):
        h = self.function(self, torch.tanh(self.first(x)))
        return self.last(torch.tanh(self.middle(h)))


def poisson(x, u, u_xx):
    return u_xx + u**2


TERM = LossTerm({"u": Value(), "u_xx": Laplacian()}, poisson, points=Fixed(X))


def autograd(model):
    """The gradient of the loss, by nested reverse mode only."""
    x = X.clone().requires_grad_()
    u = model(x)
    options = {"create_graph": True, "materialize_grads": True, "allow_unused": True}
    (first,) = torch.autograd.grad(u.sum(), x, **options)
    laplacian = sum(torch.autograd.grad(first[:, i].sum(), x, **options)[0][:, i] for i in (0, 1))
    loss = 0.5 * poisson(x, u, laplacian[:, None]).square().mean()
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def numpy_power(h):
    return np.float64(2.0) ** h + h ** np.float64(3.0) - np.float32(2.0) * h / np.int64(3)


def augmented(h):
    h = h * 1.0
    h += 1.0
    h *= 0.5
    return h


def stop_gradient(h):
    return h + (h.square() - h).detach()


def through_integers(net, h):
    """A layer whose input has points but no derivatives."""
    return h * torch.tanh(net.middle((3 * h).long().double()))


AS_TORCH = {
    "detach": lambda h: h * h.detach(),
    "data": lambda h: h * h.data + h.square() / (1 + h.data.square()),
    "torch.detach": lambda h: torch.detach(h.sin()) + h,
    "stop_gradient": stop_gradient,
    "long": lambda h: h * (9 * h).long(),
    "to_int": lambda h: h * (9 * h).to(torch.int32),
    "bool": lambda h: h * (9 * h).round().bool(),
    "to_jet": lambda h: h.to(h).type_as(h).double(),
    "numpy": lambda h: np.sqrt(2.0) * h + np.float64(1.0) - h / np.float32(2.0),
    "numpy_power": numpy_power,
    "augmented": augmented,
    "modulo": lambda h: h * ((5 * h) % 0.7) + torch.fmod(5 * h, 0.3),
    "rounded": lambda h: h * torch.div(9 * h, 2, rounding_mode="trunc") + (+h),
    "floor": lambda h: h * torch.div(9 * h, 2, rounding_mode="floor"),
    "diagonal": lambda h: h * torch.einsum("nii->ni", h.unflatten(1, (2, 2))).repeat(1, 2),
    "trace": lambda h: h * torch.einsum("nii", h.unflatten(1, (2, 2)))[:, None],
    "ellipsis": lambda h: torch.einsum("...i,...i->...i", h, h.unflatten(1, (1, 4))[:, 0]),
    "lists": lambda h: torch.einsum(torch.ones(4, 4).double(), [2, 1], h, [0, 2], [0, 1]),
    "no_branch": lambda h: h if h.is_floating_point() and not h.is_complex() else 2 * h,
}


@pytest.mark.parametrize("name", AS_TORCH)
@pytest.mark.filterwarnings("ignore:The second derivative of")
def test_as_torch(name):
    agrees(Between(AS_TORCH[name]))


def agrees(model):
    linearized = torch.cat(
        [g.flatten() for g in Objective(model, [TERM], [X]).linearize().gradient()]
    )
    torch.testing.assert_close(linearized, autograd(model), rtol=1e-9, atol=1e-14)


def trained_diagonal(net, h):
    return torch.einsum("ni,ii->ni", h, net.middle.weight)


def trained_ellipsis(net, h):
    return torch.einsum("...ai,ij->...aj", h.unflatten(1, (1, 4)), net.middle.weight).flatten(1)


def checkpointed(net, h):
    return checkpoint(lambda h: torch.tanh(net.middle(h)), h, use_reentrant=False)


@pytest.mark.parametrize(
    "use", [trained_diagonal, trained_ellipsis, checkpointed, through_integers]
)
def test_trained_as_torch(use):
    agrees(Between(use=use))


class Checkpointed(nn.Module):
    """Runs a network once more in the backward pass: all of it, or what is behind a layer."""

    def __init__(self, part):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 2))
        self.part = part
        self.double()

    def forward(self, x):
        first, second = self.net[: self.part], self.net[self.part :]
        return checkpoint(second, first(x), use_reentrant=False)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_checkpointed_network_is_linearized_as_without(part):
    model = Checkpointed(part)
    term = LossTerm(TERM.operators, lambda x, u, u_xx: u_xx + u**2, points=Fixed(X))
    objectives = [Objective(net, [term], [X]) for net in (model, model.net)]
    received, expected = (Jacobian()(each.linearize()).to_dense() for each in objectives)
    torch.testing.assert_close(received, expected)
    optimizer = CurvatureOptimizer(model.parameters(), KFAC(), Damped(1e-3))
    assert optimizer.step(objectives[0]).accepted


class Square(torch.autograd.Function):
    """A square with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def without_grad(net, h):
    with torch.no_grad():
        return net.middle(h) + h


def gate_without_grad(net, h):
    with torch.no_grad():
        gate = torch.sigmoid(h)
    return gate * h


def branching(test):
    return lambda net, h: h if test(h) else torch.sin(h)


def alias(net, h):
    h = h * 1.0
    other = h
    h += 1.0
    return other * h


def view(net, h):
    h = h * 1.0
    part = h[:, :2]
    part *= 3
    return h


def viewed(net, h):
    h = h * 1.0
    part = h[:, :2]
    h -= 3
    return torch.cat([part, part], 1)


MISTAKEN = "must do on jets, by which it is differentiated, what it does on tensors"
SWITCHED = "must not switch autograd off"
MIXED = r"first axis must stay the axis of the points, but torch\."
REFUSED = {
    "isinstance": (branching(lambda h: isinstance(h, torch.Tensor)), ValueError, MISTAKEN),
    "is_tensor": (branching(torch.is_tensor), ValueError, MISTAKEN),
    "type": (branching(lambda h: type(h) is torch.Tensor), ValueError, MISTAKEN),
    "hasattr": (branching(lambda h: hasattr(h, "is_leaf")), ValueError, MISTAKEN),
    "alias": (alias, ValueError, rf"{MISTAKEN}.*h = h \+"),
    "view": (view, ValueError, MISTAKEN),
    "viewed": (viewed, ValueError, MISTAKEN),
    "in_place": (lambda net, h: h.sub_(1), NotImplementedError, r"Use torch\.Tensor\.sub instead"),
    "function": (lambda net, h: Square.apply(h), NotImplementedError, SWITCHED),
    "no_grad": (without_grad, NotImplementedError, rf"{SWITCHED}.*linear is called \(in middle\)"),
    "gate": (gate_without_grad, NotImplementedError, rf"{SWITCHED}.*torch\.sigmoid"),
    "reentrant": (
        lambda net, h: checkpoint(net.middle, h, use_reentrant=True),
        NotImplementedError,
        SWITCHED,
    ),
    "random": (lambda net, h: h * torch.rand(4), ValueError, "same whenever it is called"),
    "length": (lambda net, h: h / len(h), ValueError, "depend on its own point only"),
    "sum": (lambda net, h: h * h.sum([]), ValueError, rf"{MIXED}sum"),
    "mean": (lambda net, h: h * torch.mean(h, dim=[]), ValueError, rf"{MIXED}mean"),
    "mean_of_all": (lambda net, h: h * h.mean(()), ValueError, rf"{MIXED}mean"),
    "points_twice": (
        lambda net, h: h * torch.einsum("nn->n", h[:, :1].expand(-1, len(h)))[:, None],
        ValueError,
        rf"{MIXED}einsum",
    ),
    "complex": (lambda net, h: (h * 1j).real, NotImplementedError, r"torch\.mul got a complex"),
    "complex_tensor": (
        lambda net, h: torch.cat([h, torch.ones(len(h), 1) + 1j], 1).real[:, :4],
        NotImplementedError,
        "torch.cat got a complex",
    ),
    "to_complex": (
        lambda net, h: h.to(torch.complex128).real,
        NotImplementedError,
        "converted to torch.complex",
    ),
    "cdouble": (lambda net, h: h.cdouble().real, NotImplementedError, "Jets are real: compute"),
    "array": (lambda net, h: np.ones(4) * h.detach().double(), TypeError, "numpy"),
    "requires_grad_": (
        lambda net, h: h.requires_grad_(),
        NotImplementedError,
        r"requires_grad_ can't act on a jet \(called in the model Between\). Leave it out",
    ),
    "register_hook": (
        lambda net, h: (h.register_hook(lambda g: 2 * g), h)[1],
        NotImplementedError,
        "register_hook can't act on a jet",
    ),
    "as_tensor": (
        lambda net, h: torch.as_tensor(h),
        NotImplementedError,
        r"torch\.as_tensor can't act on a jet \(called in",
    ),
    "copy_": (
        lambda net, h: torch.empty_like(h).copy_(h),
        NotImplementedError,
        "Use the jet itself",
    ),
    "clamp": (
        lambda net, h: torch.clamp(h, min=h.flip(1)),
        NotImplementedError,
        r"torch\.clamp must have one jet.*torch\.maximum",
    ),
    "negative_base": (
        lambda net, h: torch.nan_to_num((-2.0) ** h),
        ValueError,
        "base of a power whose exponent is a jet must be positive, got -2.0",
    ),
    "view_dtype": (
        lambda net, h: h.view(torch.int64).view(torch.float64),
        NotImplementedError,
        r"can't be viewed as torch\.int64",
    ),
    "einsum_lists": (
        lambda net, h: torch.einsum(h, [0, 1], [0, 1]),
        NotImplementedError,
        "must be given an equation",
    ),
    "vmap": (
        lambda net, h: torch.vmap(torch.tanh)(h),
        ValueError,
        r"runs on tensors, but not on jets.*raised in the model Between\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")  # reentrant
def test_refused(name):
    use, kind, words = REFUSED[name]
    model = Between(use=use)
    with pytest.raises(kind, match=f"(?s){words}"):
        Objective(model, [TERM], [X])


class Attentive(Between):
    """Attention between tokens of one point, by a module of torch or by what it consists of."""

    def __init__(self, module=None):
        super().__init__(use=Attentive.attend)
        self.attention = module
        self.project, self.out = nn.Linear(2, 6).double(), nn.Linear(2, 2).double()

    def attend(self, h):
        tokens = h.unflatten(1, (2, 2))
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.attention(tokens, tokens, tokens)[0].flatten(1)
        if self.attention is not None:
            return self.attention(tokens).flatten(1)
        heads = self.project(tokens).unflatten(-1, (3, 2, 1)).permute(0, 3, 1, 2, 4)  # N, 2, 2, 3
        q, k, v = heads.unbind(3)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2)).flatten(1)


def test_attention_by_what_it_consists_of():
    model = Attentive()
    with sdpa_kernel(SDPBackend.MATH):  # which torch can differentiate twice
        agrees(model)
    module = nn.MultiheadAttention(2, 2, batch_first=True).double()
    with torch.no_grad():
        module.in_proj_weight.copy_(model.project.weight)
        module.in_proj_bias.copy_(model.project.bias)
    module.out_proj = model.out
    expected = model(X)
    model.attention = module
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize(
    ("module", "where"),
    [
        (nn.MultiheadAttention(2, 2, batch_first=True), "attention"),
        (nn.MultiheadAttention(2, 2), "attention"),
        (nn.TransformerEncoderLayer(2, 2, 4, 0.0, batch_first=True), r"attention\.self_attn"),
    ],
)
def test_attention_by_a_module(module, where):
    with pytest.raises(AttributeError, match=rf"\(asked for in {where}\).*scaled_dot_product_att"):
        Objective(Attentive(module.double()), [TERM], [X])


class Reversed(torch.autograd.Function):
    """The identity, with another sign in its backward: no function of torch is called."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -grad


def test_a_backward_that_is_not_that_of_its_forward():
    with pytest.raises(ValueError, match=r"derivative 1 .* torch\.autograd\.Function"):
        Objective(Between(Reversed.apply), [TERM], [X])


@pytest.mark.parametrize("name", ["isinstance", "alias", "view"])
def test_an_evaluation_alone_is_checked(name):
    with pytest.raises(ValueError, match=MISTAKEN):
        evaluate({"u": Value()}, Between(use=REFUSED[name][0]), X)


def test_what_torch_refuses_is_said_by_torch():
    model = Between(lambda h: h @ torch.ones(3, 4).double())
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied \(5x4 and 3x4\)"):
        Objective(model, [TERM], [X])


def test_a_write_to_the_input_is_refused():
    class Shifting(Between):
        def forward(self, x):
            x += 1
            return super().forward(x)

    with pytest.raises(ValueError, match="must not write to its input"):
        Objective(Shifting(), [TERM], [X])


def test_an_output_that_differs_is_named():
    class Several(Between):
        def forward(self, x):
            u = super().forward(x)
            return {"u": u, "v": u if isinstance(u, torch.Tensor) else 2 * u}

    term = LossTerm({"u": Value(of="u")}, lambda x, u: u, points=Fixed(X))
    with pytest.raises(ValueError, match=r"the output\['v'\] differs: got .* on a jet"):
        Objective(Several(), [term], [X])


def test_outputs_that_are_constant():
    class Masking(Between):
        def forward(self, x):
            u = super().forward(x)
            return {"mask": x > 0.5, "one": torch.ones(len(x), 2), "u": u, "bias": self.last.bias}

    operators = {"u": Value(of="u"), "u_xx": Laplacian(of="u")}
    term = LossTerm(operators, poisson, points=Fixed(X))
    linearized, alone = (
        Objective(model, [t], [X]).linearize().gradient()
        for model, t in ((Masking(), term), (Between(), TERM))
    )
    torch.testing.assert_close(linearized, alone)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_mask_of_the_wrong_shape(chunk_size):
    class Masked(Between):
        def forward(self, x):
            return torch.where(x[:, 0] > 0.5, super().forward(x), 0.0)

    with pytest.raises(ValueError, match="may have been broadcast against one of"):
        Objective(Masked(), [TERM], [X], chunk_size=chunk_size)


HOOKS = {
    "full": (lambda m: m.middle.register_full_backward_hook(lambda *_: None), "middle"),
    "pre": (lambda m: m.middle.register_full_backward_pre_hook(lambda *_: None), "middle"),
    "model": (lambda m: m.register_full_backward_hook(lambda *_: None), "Between"),
    "parameter": (lambda m: m.last.bias.register_hook(lambda g: 0 * g), r"last\.bias"),
    "after": (
        lambda m: m.last.bias.register_post_accumulate_grad_hook(lambda p: None),
        r"last\.bias",
    ),
    "global": (
        lambda m: nn.modules.module.register_module_full_backward_hook(lambda *_: None),
        "all modules",
    ),
}


@pytest.mark.parametrize("name", HOOKS)
def test_backward_hooks(name):
    model, (register, hooked) = Between(), HOOKS[name]
    handle = register(model)
    with pytest.raises(NotImplementedError, match=f"no backward hooks.*on {hooked}"):
        Objective(model, [TERM], [X])
    handle.remove()
    objective = Objective(model, [TERM], [X])
    handle = register(model)  # later
    with pytest.raises(NotImplementedError, match="no backward hooks"):
        objective.linearize()
    handle.remove()


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X)])
def test_scripted_modules(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(nn.Linear(2, 1).double())
    with pytest.raises(NotImplementedError, match="scripted or traced module can't act on a jet"):
        Objective(model, [TERM], [X])


class Scaled(nn.Module):
    """A residual with a trained factor and any function of the network's value."""

    def __init__(self, function):
        super().__init__()
        self.factor, self.function = nn.Parameter(torch.tensor(1.5).double()), function

    def forward(self, x, u):
        return self.function(u) * self.factor


def test_a_residual_that_mistakes_jets():
    residual = Scaled(lambda u: u if isinstance(u, torch.Tensor) else 2 * u)
    with pytest.raises(ValueError, match="'term': the residual must do on jets"):
        linearize(LossTerm({"u": Value()}, residual, points=Fixed(X)), Between(), X)


@pytest.mark.parametrize("cut", [lambda u: u.detach(), lambda u: u.data], ids=["detach", "data"])
def test_detach_in_a_residual(cut):
    term = LossTerm({"u": Value()}, Scaled(lambda u: u * cut(u)), points=Fixed(X))
    objective = Objective(Between(), [term], [X])
    received = torch.cat([g.flatten() for g in objective.linearize().gradient()])
    wanted = torch.autograd.grad(objective.loss(), objective.parameters())
    torch.testing.assert_close(received, torch.cat([g.flatten() for g in wanted]))


FACTOR = torch.tensor(0.5).double().requires_grad_()


def scaled_identity(x, factor=FACTOR):
    return factor * torch.eye(2).double().expand(len(x), 2, 2)


@pytest.mark.parametrize(
    "coefficient", [scaled_identity, functools.partial(scaled_identity, factor=FACTOR)]
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_coefficients_that_hide_trained_tensors(coefficient, mode):
    term = LossTerm({"u": SecondOrder(coefficient)}, lambda x, u: u, points=Fixed(X))
    with mode(), pytest.raises(ValueError, match=r"matrix .* must not depend on trained tensors"):
        Objective(Between(), [term], [X])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_weights_that_hide_trained_tensors(mode):
    term = LossTerm(
        {"u": Value()}, lambda x, u: u, points=Fixed(X), weight=lambda x: FACTOR.expand(len(x))
    )
    with mode(), pytest.raises(ValueError, match="weight must not require a gradient"):
        Objective(Between(), [term], [X])


def test_a_direction_may_take_part_in_a_sum_several_times():
    """∂_00 + ∂_00 + ∂_11, of a product and of a function."""
    layout = Layout(torch.eye(2).double(), (Contraction((0, 0, 1)),))
    weights = torch.tensor([2.0, 1.0]).double()
    once = Layout(torch.eye(2).double(), (Contraction((0, 1), weights=weights),))
    for function in (torch.sin, lambda x: x * torch.exp(x)):
        torch.testing.assert_close(
            function(seed(X, layout)).channels, function(seed(X, once)).channels
        )
    received, wanted = (
        {(p.left, p.right): p.weight for p in one.products} for one in (layout, once)
    )
    assert {key: float(weight) for key, weight in wanted.items()} == received


def test_functions_of_the_same_name_as_methods():
    """A function of one's own does not change what Tensor.sin does."""

    def sin(x):
        return torch.overrides.handle_torch_function(sin, (x,), x)

    register_elementwise(sin)(lambda x: iter((2 * x, torch.full_like(x, 2.0))))
    jet = seed(X, Layout(torch.eye(2).double()))
    torch.testing.assert_close(jet.sin().value, X.sin())
    torch.testing.assert_close(sin(jet).value, 2 * X)
    with pytest.raises(ValueError, match="one jet rule, but there is one for"):
        register_rule(sin)(lambda x: x)


def term_of(residual, **options):
    return LossTerm({"u": Value()}, residual, points=Fixed(X), **options)


KINDS = {
    "weight": (
        lambda: term_of(lambda x, u: u, weight=lambda x: 2.0).weights(X),
        TypeError,
        r"must return a tensor.*got float",
    ),
    "no_component": (
        lambda: linearize(term_of(lambda x, u: u[:, :0]), Between(), X),
        ValueError,
        r"V >= 1.*got \[\d, 0\]",
    ),
    "in_place": (
        lambda: term_of(lambda x, u: u.sub_(1)).evaluate(Between(), X),
        ValueError,
        "must not write to its arguments",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_other_kinds_of_input(name):
    make, kind, words = KINDS[name]
    with pytest.raises(kind, match=words):
        make()
