"""Random networks, residuals and operators, each a short program in torch that prints itself.

``python -m tests.fuzz SEED`` prints the case of a seed and compares it with nested ``torch.func``.
"""

from __future__ import annotations

import functools
import random
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType

import torch
from torch import Tensor, nn
from torch.nn import functional

from pinncurv.curvature import GaussNewton, MatrixFreeGaussNewton, Objective
from pinncurv.diffops import (
    Bilaplacian,
    Directional,
    Divergence,
    Gradient,
    Hessian,
    Laplacian,
    Partial,
    SecondOrder,
    Value,
)
from pinncurv.jets import supported
from pinncurv.problems import Fixed, LossTerm
from tests import oracles

# How a covered function is called on h, [N, w], and g, another such: f is the function, x the
# points, [N, d], and v a random width. P[...] is a parameter of a shape, K[...] a constant. Other
# functions are called as f(h). Methods of the same name are called as such in every other case.
_BOUNDED, _POSITIVE, _ALIVE = "{f}(torch.sin({h}))", "{f}({h}.square() + 1.2)", "{h} + {f}({h})"
_WIDE = "torch.cat([{h}, x, {h}.sin()], 1)"
_AXES = "({h}[:, :, None] * P[2])"
_ADD = ("{f}({h}, {g})", "{f}({h}, P[{w}])", "{f}({h}, {g}, alpha=0.3)", "{f}({h}, x[:, :1])")
_MUL = ("{f}({h}, {g})", "{f}({h}, P[{w}])", "{f}({h}, x[:, :1])", "{f}({h}, 0.7)")
_DIV = ("{f}({h}, {g}.square() + 1.3)", "{f}({h}, P[{w}].exp())", "{f}({h}, 1.7)")
_CAT = ("{f}((P[1, {v}].expand(len(x), -1), {h}), 1)", "{f}(({h}, x), 1)")
_MM = ("{f}({h}, P[{w}, {v}])", "{f}({h}, K[{w}, {v}])")
_SWAP = (f"{{f}}({_AXES}, 1, 2).mean(2)",)
_NORM = (f"{{f}}({_WIDE} + 2, dim=1, keepdim=True)", "{f}({h}[:, :, None] - P[3], 2, 1)")
_CROSS = ("{f}({h} @ P[{w}, 3], x @ K[{d}, 3], dim=1)", "{f}({h} @ K[{w}, 3], P[1, 3], dim=-1)")
_CHOICE = ("{f}({h}, {g})", "{f}({h}, P[{w}])")
_EXTREME = ("{f}({h}, {g})", "{f}({h}, 1, keepdim=True)[0]", f"{{f}}({_AXES}, 1).values")
_CLAMP = ("{h} + {f}({h}, -0.3, 0.4)", "{h} - {f}({h}, min=0.1)")
_SOFT = ("{f}({h}, dim=1)", f"{{f}}({_AXES}, 1).sum(2)")

TEMPLATES: dict[str, str | Sequence[str]] = {
    "Tensor.__add__": ("{h} + {g}", "{h} + P[]", "{h} + P[{w}]"),
    "Tensor.__radd__": ("0.5 + {h}", "P[] + {h}"),
    "Tensor.__sub__": ("{h} - {g}", "{h} - P[{w}]"),
    "Tensor.__rsub__": ("1 - {h}", "P[{w}] - {h}"),
    "Tensor.__mul__": ("{h} * {g}", "{h} * P[{w}]", "({h}[:, None] * P[{v}, {w}]).sum(2)"),
    "Tensor.__rmul__": ("0.7 * {h}", "P[] * {h} + (1 - P[]) * {g}"),
    "Tensor.__truediv__": ("{h} / ({g}.square() + 1.3)", "{h} / (1 + P[]**2)"),
    "Tensor.__rtruediv__": ("0.5 / ({h}.square() + 1.3)", "P[{w}] / ({h}.square() + 1.3)"),
    "Tensor.__pow__": ("{h} ** 3", "({h}.square() + 0.5) ** 1.5", "({h}.cosh()) ** {g}.sin()"),
    "Tensor.__matmul__": ("{h} @ P[{w}, {v}]", "(P[{v}, {w}] @ {h}[:, :, None])[..., 0]"),
    "Tensor.__getitem__": ("{h}[:, [0, -1]]", "{h}[..., None, :].sum(1)", "{h}[:, ::2]"),
    "Tensor.contiguous": "{h}.contiguous()",
    "Tensor.expand": ("{h}[:, :1].expand(-1, 3)", "{h}[:, None].expand(-1, 2, {w}).sum(1)"),
    "Tensor.new_full": "{h} * {h}.new_full(({w},), 0.3)",
    "Tensor.new_ones": "{h} - {h}.new_ones({w})",
    "Tensor.new_zeros": "{h} + {h}.new_zeros(())",
    "Tensor.new_tensor": "{h} * {h}.new_tensor(1.3)",
    "Tensor.repeat": "{h}.repeat(1, 2)",
    "Tensor.to": "{h}.to(torch.float64)",
    "Tensor.unfold": f"{_WIDE}.unfold(1, 2, 1).prod(2)",
    "Tensor.view": "{h}.view(-1, {w}, 1).mean(2)",
    "__eq__": "torch.where({h} == {g}, {g}, {h})",
    "__ne__": "{h} * ({h} != 2)",
    "__ge__": "{h} * ({h} >= {g})",
    "__le__": "{h} * (x[:, :1] <= 0.1)",
    "__gt__": "torch.where({h} > 0, {h}, {g})",
    "__lt__": "({h} < {g}) * {h}",
    **dict.fromkeys(
        ("eq", "ne", "ge", "le", "gt", "lt"), "torch.where({f}({h}, {g}), {h}, {h}**2)"
    ),
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), _ADD),
    **dict.fromkeys(("mul", "multiply"), _MUL),
    **dict.fromkeys(("div", "divide", "true_divide"), _DIV),
    **dict.fromkeys(("cat", "concat", "concatenate"), _CAT),
    **dict.fromkeys(("matmul", "mm", "spmm"), _MM),
    **dict.fromkeys(("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"), _SWAP),
    **dict.fromkeys(("norm", "linalg.norm", "linalg.vector_norm"), _NORM),
    **dict.fromkeys(("cross", "linalg.cross"), _CROSS),
    **dict.fromkeys(("maximum", "minimum"), _CHOICE),
    **dict.fromkeys(("max", "min"), _EXTREME),
    **dict.fromkeys(("amax", "amin"), ("{f}({h}, 1, keepdim=True)", f"{{f}}({_AXES}, 1)")),
    **dict.fromkeys(("clamp", "clip"), _CLAMP),
    **dict.fromkeys(("exp", "exp2", "expm1", "special.expm1", "sinh", "cosh", "tan"), _BOUNDED),
    **dict.fromkeys(("special.exp2",), _BOUNDED),
    **dict.fromkeys(("asin", "acos", "arcsin", "arccos"), "{f}(0.6 * torch.sin({h}))"),
    **dict.fromkeys(("atan2", "arctan2", "hypot"), "{f}({h}, {g}.square() + 1.2)"),
    "cumprod": "{f}({h} + 0.3, 1)",
    "roll": ("{f}({h}, 1, 1)", f"{{f}}({_AXES}, (1, 1), (1, 2)).sum(2)"),
    "sinc": "{f}({h}.square() + 0.3)",
    "special.sinc": "{f}({h}.square() + 0.3)",
    "tensordot": "{f}({h}, P[{w}, {v}], 1)",
    "tile": "{f}({h}, (1, 2))",
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal"), _POSITIVE),
    **dict.fromkeys(("log1p", "special.log1p"), "{f}({h}.square())"),
    **dict.fromkeys(("floor", "ceil", "round", "trunc", "sign", "sgn", "relu", "abs"), _ALIVE),
    **dict.fromkeys(
        ("softmax", "log_softmax", *(f"nn.functional.{n}" for n in ("softmax", "log_softmax"))),
        _SOFT,
    ),
    **dict.fromkeys(
        [f"nn.functional.{n}" for n in ("relu", "relu6", "hardtanh", "hardsigmoid", "hardswish")],
        _ALIVE,
    ),
    **dict.fromkeys(("prelu", "nn.functional.prelu"), ("{f}({h}, P[{w}])", "{f}({h}, P[1])")),
    **dict.fromkeys(
        ("layer_norm", "nn.functional.layer_norm"),
        (
            f"{{f}}({_WIDE}, (2 * {{w}} + {{d}},), P[2 * {{w}} + {{d}}], eps=0.1)",
            f"{{f}}({_WIDE}, [2 * {{w}} + {{d}}], bias=P[2 * {{w}} + {{d}}])",
            "{f}({h}[:, None] * P[3, {w}] + K[3, {w}], (3, {w}), P[3, {w}], eps=0.1).sum(1)",
        ),
    ),
    **dict.fromkeys(
        ("rms_norm", "nn.functional.rms_norm"),
        f"{{f}}({_WIDE}, (2 * {{w}} + {{d}},), P[2 * {{w}} + {{d}}], eps=0.1)",
    ),
    "addcmul": ("{f}({h}, {g}, {h}, value=0.3)", "{f}({h}, P[{w}], {g})"),
    "addmm": ("{f}(P[{v}], {h}, P[{w}, {v}], beta=0.5, alpha=2)", "{f}({g}, {h}, K[{w}, {w}])"),
    "bmm": "{f}({h}[:, None], {g}[:, :, None])[:, 0]",
    "chunk": ("{f}({h}, 2, 1)[0]", f"{{f}}({_WIDE}, 2, -1)[-1]"),
    "cumsum": ("{f}({h}, 1)", "{f}({h}, dim=-1)"),
    "einsum": (
        "{f}('ni,ij->nj', {h}, P[{w}, {v}])",
        "{f}('ni,ni->n', {h}, {g})[:, None]",
        "{f}('ni,kij,nj->nk', {h}, P[{v}, {w}, {w}], {g})",
        "{f}('...i,i->...', {h}, P[{w}])[:, None]",
        "{f}('nk,k', {h}, K[{w}])[:, None]",
        "{f}('nii->ni', {h}[:, :, None] * {g}[:, None])",
        "{f}('nij->nji', {h}[:, :, None] * P[2]).sum(2)",
    ),
    "empty_like": "{f}({h}).fill_(0.4) + {h}",
    **dict.fromkeys(("fmod", "remainder"), "{f}({h}, 0.7) + {h}"),
    "flatten": f"{{f}}({_AXES}, 1)",
    "flip": ("{f}({h}, [1])", f"{{f}}({_AXES}, (1, 2)).sum(1)"),
    "full_like": "{f}({h}, 0.3) * {h}",
    "gather": "{f}({h}, 1, torch.zeros(len(x), 2, dtype=torch.long))",
    "ger": "{f}({h}[:, 0], P[{v}])",
    "outer": "{f}({h}[:, -1], P[{v}])",
    "hstack": ("{f}(({h}, x))", "{f}((K[1, 2].expand(len(x), 2), {h}))"),
    "index_select": "{f}({h}, 1, torch.tensor([{w} - 1, 0]))",
    "lerp": ("{f}({h}, {g}, 0.3)", "{f}({h}, {g}.cos(), P[{w}])", "{f}({h}, {g}, {h}.sigmoid())"),
    "linalg.vecdot": ("{f}({h}, {g})[:, None]", f"{{f}}({_AXES}, K[{{w}}, 1], dim=1)"),
    "logsumexp": ("{f}({h}, 1, keepdim=True)", f"{{f}}({_AXES}, (1, 2))[:, None]"),
    "mean": ("{f}({h}, 1, keepdim=True)", f"{{f}}({_AXES}, (1, 2))[:, None]"),
    "sum": ("{f}({h}, 1, keepdim=True)", f"{{f}}({_AXES}, -1)"),
    "prod": ("{f}({h} + 0.3, 1, keepdim=True)", f"{{f}}({_AXES} + 0.3, 2)"),
    "mv": "{f}({h}, P[{w}])[:, None]",
    "narrow": "{f}({h}, 1, 0, 1)",
    "nn.functional.batch_norm": (
        "{f}({h}, K[{w}], K[{w}].square() + 0.5, P[{w}], P[{w}])",
        "{f}({h}[:, :, None] * P[2], K[{w}], K[{w}].exp(), P[{w}]).sum(2)",
    ),
    "nn.functional.bilinear": "{f}({h}, {g}, P[{v}, {w}, {w}], P[{v}])",
    "celu": "{f}({h}, 0.5)",  # torch rounds 1 / alpha to single precision
    "nn.functional.celu": "{f}({h}, 2.0)",
    "nn.functional.conv1d": (
        "{f}({h}[:, None], P[{v}, 1, 2], P[{v}], padding=1).mean(2)",
        "{f}({h}[:, None] * K[2, {w}], P[{v}, 2, 1], stride=2).sum(2)",
    ),
    "nn.functional.cosine_similarity": f"{{f}}({_WIDE} + 2, {_WIDE} - K[1], 1)[:, None]",
    "nn.functional.dropout": "{f}({h}, 0.3, training=False)",
    "nn.functional.elu": ("{f}({h}, 1.3)", "{f}({h})"),
    "nn.functional.gelu": ("{f}({h})", "{f}({h}, approximate='tanh')"),
    "nn.functional.glu": "{f}(torch.cat([{h}, {g}.sin()], 1), 1)",
    "nn.functional.group_norm": (
        f"{{f}}(torch.cat([{_WIDE}, {_WIDE} ** 2], 1), 2, P[4 * {{w}} + 2 * {{d}}], eps=0.1)",
        "{f}({h}[:, :, None] * P[3], {w}, P[{w}], P[{w}], eps=0.1).mean(2)",
    ),
    "nn.functional.leaky_relu": "{f}({h}, 0.3)",
    "nn.functional.linear": ("{f}({h}, P[{v}, {w}], P[{v}])", "{f}({h}, P[{w}, {w}])"),
    "nn.functional.normalize": f"{{f}}({_WIDE} + 2, dim=1)",
    "nn.functional.pad": (
        "{f}({h}, (1, 0), value=0.7)",
        "{f}({h}[:, None], (1, 1), mode='replicate')[:, 0]",
    ),
    "nn.functional.scaled_dot_product_attention": (
        "{f}({h}[:, None] * K[3, 1], {g}[:, None] * K[3, 1], {h}[:, None] * P[3, {w}]).sum(1)",
        "{f}(*[{h}[:, None] * P[2, 1]] * 3, is_causal=True)[:, 1]",
    ),
    "nn.functional.softmin": "{f}({h}, dim=1)",
    "nn.functional.softplus": ("{f}({h})", "{f}({h}, 2.0)", "{f}({h}, beta=1.5)"),
    "ones_like": "{f}({h}) - {h}",
    "permute": f"{{f}}({_AXES}, (0, 2, 1)).sum(1)",
    "pow": ("{f}({h}, 3)", "{f}({h}.square() + 0.5, {g})", "{f}({h}.cosh(), -0.5)"),
    "reshape": ("{f}({h}, (-1, 1, {w})).sum(1)", f"({{f}}({_AXES}, (-1, 2, {{w}})) + 0.3).prod(1)"),
    "select": "{f}({h}, 1, -1)[:, None]",
    "split": ("{f}({h}, 1, 1)[-1]", f"{{f}}({_WIDE}, [1, 2 * {{w}} + {{d}} - 1], dim=1)[1]"),
    "squeeze": ("{f}({h}[:, None], 1)", "{f}({h}[:, :, None], (2,))"),
    "stack": ("{f}(({h}, {g}), 1).sum(1)", "{f}((P[1, {w}].expand(len(x), -1), {h}), 2).prod(2)"),
    "std": f"{{f}}({_WIDE} * K[1] + x[:, :1], 1, keepdim=True)",
    "t": "{f}({h}[:, 0])[:, None]",
    "unbind": "{f}({h}, 1)[0][:, None]",
    "unflatten": "{f}({h}, 1, (1, {w})).sum(1)",
    "unsqueeze": ("{f}({h}, 1).mean(1)", "{f}({h}, -1).expand(-1, -1, 2).prod(2)"),
    "var": (f"{{f}}({_WIDE}, 1, keepdim=True)", f"{{f}}({_AXES}, 2, correction=0)"),
    "where": (
        "{f}({h} > 0.1, {h}, {g})",
        "{f}(x[:, :1] > 0.5, {h}, 0.3)",
        "{f}({g} > 0, P[{w}], {h})",
    ),
    "zeros_like": "{f}({h}) + {h}",
}
EXCLUDED = {
    "detach",  # cuts what is differentiated: tests/jets
    "nn.functional.hardsigmoid",  # torch's slope is 1/6 in single precision: tests/jets
    # conversions, predicates and a function that torch does not differentiate: test_mistaken
    *(f"Tensor.{n}" for n in ("bfloat16", "bool", "double", "float", "half", "int", "long")),
    *("Tensor.short", "Tensor.to", "Tensor.type_as", "is_complex", "is_floating_point"),
    "floor_divide",
}
_MINE = re.compile(r"Tensor\.|__|nn\.functional\.|linalg\.|special\.")  # others are torch's
NAMES = sorted(
    name
    for name in set(supported()) - EXCLUDED
    if _MINE.match(name) or hasattr(torch, name)  # not what other tests have registered
)
random.Random(0).shuffle(NAMES)

OPENINGS = (
    "functional.linear(x, P[{v}, {d}], P[{v}])",
    "torch.tanh(functional.linear(x, P[{v}, {d}], P[{v}]))",
    "torch.sin(P[] * (x @ P[{d}, {v}]))",
    "torch.exp(-(x[:, None] - P[{v}, {d}]).square().sum(-1))",
    "torch.cat([x, P[2].expand(len(x), -1)], 1)",
    "torch.tanh(x @ P[{d}, {v}] + P[{v}])",
)


@functools.cache
def _compiled(source: str) -> CodeType:
    return compile(source, "<fuzz>", "exec")


class Program(nn.Module):
    """Some lines of torch, with the parameters and constants that they own."""

    def __init__(self, random: random.Random, generator: torch.Generator) -> None:
        super().__init__()
        self.random, self.generator = random, generator
        self.p, self.lines, self.names, self.result = nn.ParameterList(), [], [], "h0"

    def draw(self, *shape: int) -> Tensor:
        """Return random numbers of order one."""
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def _parameter(self, match: re.Match[str]) -> str:
        """Make a parameter or a constant; a parameter may be one that is there already."""
        shape = eval(f"({match[2]},)") if match[2] else ()
        if match[1] == "K":
            name = f"k{sum(1 for _ in self.buffers())}"
            self.register_buffer(name, self.draw(*shape))
            return f"self.{name}"
        same = [i for i, p in enumerate(self.p) if p.shape == shape]
        if not same or self.random.random() < 0.7:
            same = [len(self.p)]
            self.p.append(nn.Parameter(self.draw(*shape) / max(1, sum(shape)) ** 0.5))
            self.p[-1].requires_grad_(self.random.random() < 0.9)
        return f"self.p[{self.random.choice(same)}]"

    def expand(self, template: str, **names: object) -> str:
        """Fill in a template."""
        return re.sub(r"\b([PK])\[(.*?)\]", self._parameter, template.format(**names))

    def call(self, name: str, given: dict[str, Tensor], h: str = "h0") -> str:
        """Return a call of a covered function on h and another value of its shape."""
        templates = TEMPLATES.get(name, "{f}({h})")
        chosen = [templates] if isinstance(templates, str) else templates
        template = self.random.choice(chosen)
        full = name if name.startswith("nn.") else f"torch.{name}"
        full = full.removeprefix("nn.")
        if callable(getattr(Tensor, name, None)) and self.random.random() < 0.5:
            template = re.sub(r"\{f\}\(\{h\}(?:, |(?=\)))", f"{{h}}.{name}(", template)
        like = [k for k, t in given.items() if t.shape == given[h].shape]
        sizes = {"w": given[h].shape[1], "d": given["x"].shape[1], "v": self.random.randint(1, 4)}
        self.names.append(name)
        return self.expand(template, f=full, h=h, g=self.random.choice(like), **sizes)

    def add(self, name: str, expression: str, given: dict[str, Tensor]) -> str:
        """Add a line, run it, and bound what is large; return the name of the result."""
        self.lines.append(f"{name} = {expression}")
        given[name] = self._run(expression, given)
        if given[name].abs().max() > 3:
            self.lines.append(f"{name} = torch.sin({name})")
            given[name] = given[name].sin()
        if given[name].shape[1] > 5:
            self.lines.append(f"{name} = {name}[:, 1:5]")
            given[name] = given[name][:, 1:5]
        self.result = name
        return name

    def _run(self, expression: str, given: dict[str, Tensor]) -> Tensor:
        return eval(expression, {"torch": torch, "functional": functional, "self": self, **given})

    def forward(self, x: Tensor, **given: Tensor) -> Tensor:
        names = {"torch": torch, "functional": functional, "self": self, "x": x, **given}
        exec(_compiled("\n".join([*self.lines, f"result = {self.result}"])), names)
        return names["result"]

    def __str__(self) -> str:
        """Show the source, and the shapes of what it owns."""
        shapes = [f"{list(p.shape)}{'' if p.requires_grad else ' frozen'}" for p in self.p]
        return "\n    ".join([*self.lines, f"return {self.result}", f"p: {', '.join(shapes)}"])


@dataclass
class Case:
    """A network, its terms and their points."""

    seed: int
    model: Program
    terms: list[LossTerm]
    points: list[Tensor]
    chunk_size: int | None

    @property
    def names(self) -> set[str]:
        """Which covered functions occur."""
        programs = [self.model, *(term.residual for term in self.terms)]
        return {name for program in programs for name in getattr(program, "program", program).names}

    def __str__(self) -> str:
        """Say what it takes to see it again."""
        lines = [f"python -m tests.fuzz {self.seed}", f"network:\n    {self.model}"]
        for term, x in zip(self.terms, self.points, strict=True):
            weight = type(term.weight).__name__
            lines.append(f"{term.name} at {list(x.shape)}: {term.operators}, weight: {weight}")
            lines.append(f"    {getattr(term.residual, 'program', term.residual)}")
        return "\n".join([*lines, f"chunk_size: {self.chunk_size}"])


class Plain:
    """A residual that is a function and no module: nothing in it is trained."""

    def __init__(self, program: Program) -> None:
        self.program = program.requires_grad_(False)

    def __call__(self, x: Tensor, **given: Tensor) -> Tensor:
        return self.program(x, **given)


def make(seed: int) -> Case:
    """Return the case of a seed; consecutive seeds draw consecutive functions."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    order = rng.choices((0, 1, 2, 3, 4), (1, 7, 9, 2, 1))[0]
    d = rng.randint(1, 3 if order < 3 else 2)
    names = iter([NAMES[(3 * seed + i) % len(NAMES)] for i in range(5)])
    model = Program(rng, generator)
    most = 3 if order < 2 else 2  # nested oracles are slow
    sizes = [min(rng.choice((1, 1, 2, 3)), most) for _ in range(rng.choices((1, 2), (2, 1))[0])]
    batch = [torch.rand(n, d, dtype=torch.float64, generator=generator) for n in sizes]
    outputs = _network(model, torch.cat(batch), names, depth=3 if order < 3 else 2)
    orders = (order, min(order, 1))  # one is enough to be slow
    terms = [
        _term(f"t{k}", x, outputs, orders[k], rng, generator, names) for k, x in enumerate(batch)
    ]
    return Case(seed, model, terms, batch, rng.choice([None, 1, 2, 3]))


def _network(
    model: Program, x: Tensor, names: Iterator[str], depth: int
) -> dict[int | str | None, int]:
    """Write the network; return its outputs, each with its width."""
    rng, given = model.random, {"x": x}
    sizes = {"d": x.shape[1], "v": rng.randint(1, 4)}
    h = model.add("h0", model.expand(rng.choice(OPENINGS), **sizes), given)
    for k, name in zip(range(1, depth + 1), names, strict=False):
        h = model.add(f"h{k}", model.call(name, given, h), given)
    heads = []
    for out in (rng.randint(1, 2), x.shape[1])[: rng.choices((1, 2), (3, 1))[0]]:
        w = given[h].shape[1]
        heads.append(model.expand("functional.linear({h}, P[{o}, {w}], P[{o}])", h=h, o=out, w=w))
        shapes = [out, x.shape[1]]
    model.p[-1].requires_grad_(True)
    if len(heads) == 1:
        model.result = heads[0]
        return {None: shapes[0]} if rng.random() < 0.9 else _tuple(model, heads[0], shapes[0])
    model.result = f"{{'a': {heads[0]}, 'b': {heads[1]}}}"
    return {"a": model(x)["a"].shape[1], "b": x.shape[1]}


def _tuple(model: Program, head: str, width: int) -> dict[int | str | None, int]:
    model.result = f"({head}, x.sin())"
    return {0: width}


def _term(
    name: str,
    x: Tensor,
    outputs: dict[int | str | None, int],
    order: int,
    rng: random.Random,
    generator: torch.Generator,
    names: Iterator[str],
) -> LossTerm:
    """Return a term with an operator of the order, and others, on all outputs."""
    operators: dict[str, object] = {}
    shapes: dict[str, list[int]] = {}
    orders = [order, *(rng.randint(0, order) for _ in range(rng.randint(len(outputs) - 1, 2)))]
    for k, (of, order_k) in enumerate(
        zip(_cycled(list(outputs), len(orders)), orders, strict=True)
    ):
        operator, shape = _operator(order_k, x, of, outputs[of], rng, generator)
        operators[f"o{k}"], shapes[f"o{k}"] = operator, shape
    program = Program(rng, generator)
    given = {"x": x}
    data = {}
    for key, shape in shapes.items():
        given[key] = torch.randn(len(x), *shape, dtype=torch.float64, generator=generator)
    if rng.random() < 0.3:
        given["y"] = data["y"] = torch.rand(len(x), 1, dtype=torch.float64, generator=generator)
    parts = []
    for key in list(given)[1:]:
        parts.append(program.add(f"{key}_", _as_matrix(key, given[key], rng), given))
    r = parts[0]
    for k, part in enumerate(parts[1:]):
        r = program.add(f"r{k}", _joined(r, part, given, program), given)
    for k, function in zip(range(rng.randint(0, 2)), names, strict=False):
        r = program.add(f"s{k}", program.call(function, given, r), given)
    if rng.random() < 0.2:
        program.result = f"{r}[:, 0]"
    trained = any(p.requires_grad for p in program.p) and rng.random() < 0.7
    residual = program if trained else Plain(program)
    weight = _weight(program(**given), x, rng, generator)
    return LossTerm(operators, residual, Fixed(x), weight, name, data)


def _cycled(items: list, number: int) -> list:
    return [items[k % len(items)] for k in range(number)]


def _as_matrix(key: str, value: Tensor, rng: random.Random) -> str:
    """Return an expression that makes [N, m] of an operator's value."""
    if value.ndim == 2:
        return key
    if value.ndim == 3:
        choices = ["{}[:, 0]", "{}[..., -1]", "{}.flatten(1)", "{}.square().sum(2)"]
    else:
        choices = ["{}[..., 0, -1]", "{}.flatten(2).sum(2)", "torch.einsum('noii->no', {})"]
    return rng.choice(choices).format(key)


def _joined(r: str, s: str, given: dict[str, Tensor], program: Program) -> str:
    """Return an expression that joins two matrices."""
    m, n = given[r].shape[1], given[s].shape[1]
    if m != n and 1 not in (m, n):
        r, m = f"{r}[:, :1]", 1
    joins = ["{r} + {s}", "{r} * {s}", "{r} - 0.3 * {s}.square()", "{r} * torch.sin({s})"]
    joins += ["P[] * {r} - {s}", "{r} * {s} - functional.linear(x, P[1, {d}], P[1])"]
    joins += ["torch.cat([{r}, {s}], 1)", "{r} - {s} * P[{n}]"]
    names = {"r": r, "s": s, "n": n, "d": given["x"].shape[1]}
    return program.expand(program.random.choice(joins), **names)


def _weight(r: Tensor, x: Tensor, rng: random.Random, generator: torch.Generator) -> object:
    """Return a weight of a random kind."""
    V = 1 if r.ndim == 1 else r.shape[1]
    shape = rng.choice([(len(x),), (len(x), V)])
    return rng.choice(
        [
            1.0,
            2.5,
            tuple(rng.random() for _ in range(V)),
            torch.rand(shape, dtype=torch.float64, generator=generator),
            _one_plus_square,
        ]
    )


def _one_plus_square(x: Tensor) -> Tensor:
    return 1 + x[:, 0].square()


def _factors(x: Tensor) -> Tensor:
    return torch.stack([x.cos(), x + 1], -1)


def _symmetric(x: Tensor) -> Tensor:
    return x[:, :, None] * x[:, None] + 1


def _operator(
    order: int,
    x: Tensor,
    of: int | str | None,
    width: int,
    rng: random.Random,
    generator: torch.Generator,
) -> tuple[object, list[int]]:
    """Return an operator of an order and the shape of its value at one point."""
    N, d = x.shape
    dims = [rng.randrange(d) for _ in range(order)]
    some = rng.choice([None, sorted(rng.sample(range(d), rng.randint(1, d)))])
    k = d if some is None else len(some)

    def draw(*shape: int, trained: bool = False) -> Tensor:
        tensor = torch.randn(shape, dtype=torch.float64, generator=generator)
        return nn.Parameter(tensor) if trained else tensor

    if order == 0:
        return Value(of=of), [width]
    directions = [draw(d), draw(N, d), torch.cos, draw(d, trained=True), nn.Linear(d, d).double()]
    for parameter in directions[-1].parameters():
        nn.init.normal_(parameter, generator=generator)
    along = rng.choice(directions if order < 3 else directions[:3])
    directional = Directional(along, order=order, of=of), [width]
    choices = [(Partial(*dims, of=of), [width])] * 2 + [directional]
    if order == 1:
        choices += [(Gradient(some, of=of), [width, k])]
        if width == d:
            choices += [(Divergence(of=of), [1])]
    if order == 2:
        matrices = [draw(k, k), draw(N, k, k), draw(k, k, trained=True)]
        matrices += [_symmetric] if some is None else []
        factors = [draw(d, 2), draw(N, d, 1), _factors, draw(d, 1, trained=True)]
        choices += [
            (Laplacian(some, of=of), [width]),
            (Hessian(some, of=of), [width, k, k]),
            (SecondOrder(rng.choice(matrices), dims=some, of=of), [width]),
            (SecondOrder.from_factors(rng.choice(factors), of=of), [width]),
        ]
    if order == 4:
        choices += [(Bilaplacian(some, of=of), [width])] * 2
    return rng.choice(choices)


def check(case: Case) -> None:
    """Compare residual, loss, gradient and Gauss-Newton matrix with nested torch.func.

    The objective's own check, and the ways that differentiate once more, take turns.

    Raises:
        Exception: If they differ, or the case is refused; with the case as a note.
    """
    try:
        _check(case)
    except Exception as error:
        error.add_note(str(case))
        raise


def _check(case: Case) -> None:
    model, terms = case.model, case.terms
    parameters = oracles.trainable(model, *terms)
    exact = [_exact(t, model, x, parameters) for t, x in zip(terms, case.points, strict=True)]
    J, rows = torch.cat([J for J, _ in exact]), [row for _, row in exact]
    r = torch.cat([row.flatten() for row in rows])
    G, g = J.T @ J, J.T @ r
    v = torch.randn(len(g), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = case.seed % 4
    objective = Objective(model, terms, case.points, case.chunk_size, check=turn == 0)
    linearized = objective.linearize()
    for received, row in zip(linearized.residual, rows, strict=True):
        oracles.assert_close(received, row)
    oracles.assert_close(_flat(linearized.gradient()), g)
    oracles.assert_close(GaussNewton()(linearized).to_dense(), G)
    if turn % 2:
        oracles.assert_close(objective.loss().detach(), 0.5 * r @ r)
        objective.backward()
        oracles.assert_close(_flat(p.grad for p in objective.parameters()), g)
    else:
        oracles.assert_close(MatrixFreeGaussNewton()(linearized) @ v, G @ v)


def _exact(
    term: LossTerm, model: Program, x: Tensor, parameters: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the Jacobian of a scaled residual, and itself, by nested torch.func."""

    def rows(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        residual = oracles.scaled_residual(term, model, x, values)
        return residual.flatten(), residual

    J, residual = torch.func.jacrev(rows, has_aux=True)(parameters)
    return torch.cat([part.reshape(len(part), -1) for part in J.values()], 1), residual.detach()


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


if __name__ == "__main__":
    chosen = make(int(sys.argv[1]))
    print(chosen)
    _check(chosen)
