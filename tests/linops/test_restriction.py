"""Operators on some layers only, and mixtures of operators."""

import curvlinops
import pytest
import torch
from torch import nn

from pinncurv.linops import (
    Block,
    CGInverseLinearOperator,
    Damped,
    DenseBlockDiagonalLinearOperator,
    DenseLinearOperator,
    DiagonalLinearOperator,
    FactorDamping,
    PyTorchLinearOperator,
    SumKroneckerLinearOperator,
    flat_positions,
)
from pinncurv.linops.restriction import (
    BlockDiagonalLinearOperator,
    RestrictedLinearOperator,
    block_diagonal,
    restrict,
)
from tests.conformance import check_operator
from tests.linops.cases import kronecker, layers, psd

WIDTHS, BIAS = [3, 2, 4, 1], [True, False, True]


def well_conditioned(n, generator):
    return psd(n, generator) + torch.eye(n, dtype=torch.float64)


def structures(generator):
    """One operator of every kind on the same parameters."""
    blocks, shapes = layers(WIDTHS, BIAS)
    D = sum(torch.Size(shape).numel() for shape in shapes)
    one, two = (kronecker(WIDTHS, T, generator, BIAS, well_conditioned) for T in (1, 2))
    matrices = [psd(block.numel, generator) for block in blocks]
    return {
        "kronecker": one,
        "sum of kronecker": two,
        "eigenform": one.inverse(0.1),
        "inverse of blocks": two.inverse(0.1),
        "dense blocks": DenseBlockDiagonalLinearOperator(matrices, blocks, shapes),
        "mixture": block_diagonal([one, two, one], blocks),
        "diagonal": DiagonalLinearOperator(
            [1 + torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        ),
        "dense": DenseLinearOperator(psd(D, generator), shapes),
        "sum": one + 0.5 * two,
        "unknown": Unknown(psd(D, generator), shapes),
    }


class Unknown(PyTorchLinearOperator):
    """A self-adjoint operator that offers no more than curvlinops demands."""

    SELF_ADJOINT = True

    def __init__(self, matrix, shapes):
        super().__init__(shapes, shapes)
        self.matrix, self.device, self.dtype = matrix, matrix.device, matrix.dtype

    device = dtype = None

    def _matmat(self, X):
        flat = self.matrix @ torch.cat([x.flatten(end_dim=-2) for x in X])
        return [y.reshape(x.shape) for y, x in zip(flat.split(self._in_shape_flat), X, strict=True)]


NAMES = tuple(structures(torch.Generator().manual_seed(0)))


def selected(chosen):
    """Positions of some layers' entries, in the order of the parameters."""
    blocks, shapes = layers(WIDTHS, BIAS)
    positions = flat_positions(blocks, shapes)
    return torch.cat([positions[i] for i in chosen]).sort().values


@pytest.mark.parametrize("chosen", [(0,), (1,), (2, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_block_of_the_matrix(name, chosen, generator):
    operator = structures(generator)[name]
    blocks, shapes = layers(WIDTHS, BIAS)
    dense = operator @ torch.eye(operator.shape[0], dtype=torch.float64)
    index = selected(chosen)
    restricted = restrict(operator, [blocks[i] for i in chosen])
    dampings = () if name == "inverse of blocks" else (1e-9, 1e-3, 1.0)
    check_operator(restricted, dense[index[:, None], index], dampings, tolerance=1e-12)
    kept = {p for i in chosen for p in (blocks[i].weight, blocks[i].bias)} - {None}
    assert restricted.shapes == [torch.Size(shapes[p]) for p in sorted(kept)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sum of kronecker", SumKroneckerLinearOperator),
        ("dense blocks", DenseBlockDiagonalLinearOperator),
        ("unknown", RestrictedLinearOperator),
    ],
)
def test_structure_is_kept(name, kind, generator):
    blocks, _ = layers(WIDTHS, BIAS)
    assert type(restrict(structures(generator)[name], blocks[1:])) is kind


def test_structure_serves_factor_damping(generator):
    """The restriction of a factor-damped inverse is that of the restricted operator."""
    operator, (blocks, _) = kronecker(WIDTHS, 2, generator, BIAS), layers(WIDTHS, BIAS)
    damp = FactorDamping(1e-3)
    received = damp(restrict(operator, blocks[2:])).to_dense()
    index = selected((2,))
    torch.testing.assert_close(received, damp(operator).to_dense()[index[:, None], index])


def test_names_and_terms_are_kept(generator):
    operator = kronecker(WIDTHS, 2, generator, BIAS)
    restricted = restrict(operator, [operator.blocks[2]])
    assert [block.name for block in restricted.blocks] == [operator.blocks[2].name]
    assert restricted.terms == operator.terms
    assert restricted.blocks[0].weight == 0
    assert restricted.blocks[0].bias == 1


def test_large_blocks_are_solved_by_conjugate_gradients(generator, monkeypatch):
    blocks, _ = layers(WIDTHS, BIAS)
    operator = restrict(structures(generator)["unknown"], blocks[1:])
    b = torch.ones(operator.shape[0], dtype=torch.float64)
    expected = operator.inverse(0.5) @ b
    monkeypatch.setattr("pinncurv.linops.policy.LARGEST_DENSE", 3)
    inverse = operator.inverse(0.5)
    assert isinstance(inverse, CGInverseLinearOperator)
    torch.testing.assert_close(inverse @ b, expected)


def test_mixture_takes_each_block_from_its_operator(generator):
    operators, (blocks, shapes) = structures(generator), layers(WIDTHS, BIAS)
    chosen = [operators["sum of kronecker"], operators["unknown"], operators["dense blocks"]]
    alone = restrict(chosen[2], blocks[2:])
    mixed = block_diagonal([*chosen[:2], alone], blocks)
    assert isinstance(mixed, BlockDiagonalLinearOperator)
    identity = torch.eye(mixed.shape[0], dtype=torch.float64)
    expected = torch.zeros_like(identity)
    for position, operator in zip(flat_positions(blocks, shapes), chosen, strict=True):
        expected[position[:, None], position] = (operator @ identity)[position[:, None], position]
    check_operator(mixed, expected, dampings=(1e-9, 1e-3, 1.0), tolerance=1e-12)
    b = torch.randn(len(expected), generator=generator, dtype=torch.float64)
    wanted = torch.linalg.solve(expected + 0.1 * identity, b)
    torch.testing.assert_close(Damped(0.1)(mixed) @ b, wanted)


def test_mixture_with_operators_of_curvlinops_and_odd_order(generator):
    """A foreign operator on one layer, and a network whose bias is registered first."""
    blocks = [Block("last", 3, 0, 1, 2), Block("first", 1, 2, 2, 2)]
    shapes = [(1,), (2, 2), (2,), (1, 2)]
    whole = DenseLinearOperator(psd(9, generator), shapes)
    foreign = Unknown(psd(3, generator), [(1,), (1, 2)])  # in the parameters' order: bias first
    mixed = block_diagonal([foreign, whole], blocks)
    last, first = flat_positions(blocks, shapes)
    expected = torch.zeros(9, 9, dtype=torch.float64)
    order = last.sort().values
    expected[order[:, None], order] = foreign.matrix
    expected[first[:, None], first] = whole.matrix[first[:, None], first]
    check_operator(mixed, expected, dampings=(1e-3, 1.0), tolerance=1e-12)


def test_operator_of_curvlinops():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    data = [(x, torch.ones(4, 1, dtype=torch.float64))]
    ggn = curvlinops.GGNLinearOperator(model, nn.MSELoss(), list(model.parameters()), data)
    block = Block("2", 2, 3, 1, 3)
    dense = ggn @ torch.eye(13, dtype=torch.float64)
    check_operator(restrict(ggn, [block]), dense[9:, 9:], (1e-3,), tolerance=1e-10)


def test_float32(generator):
    operator = kronecker(WIDTHS, 2, generator, BIAS, well_conditioned, torch.float32)
    mixed = block_diagonal([operator] * 3, operator.blocks)
    check_operator(restrict(mixed, mixed.blocks[1:]), dampings=(1e-3,), tolerance=1e-5)


def test_errors(generator):
    operators, (blocks, shapes) = structures(generator), layers(WIDTHS, BIAS)
    foreign = Block("other", 0, None, 2, 3)
    with pytest.raises(ValueError, match=r"one or more of those of the operator's 5 parameters"):
        restrict(operators["unknown"], [])
    with pytest.raises(ValueError, match=r"one or more of those of the operator's 5 parameters"):
        restrict(operators["dense"], [Block("other", 7, None, 2, 3)])
    with pytest.raises(ValueError, match=r"among \['net.0', 'net.2', 'net.4'\].*other"):
        restrict(operators["kronecker"], [foreign])
    with pytest.raises(ValueError, match=r"belongs to net\.0 and net\.0"):
        restrict(operators["dense"], [blocks[0], blocks[0]])
    with pytest.raises(ValueError, match=r"one operator for each of the 3 layers, got 1"):
        block_diagonal([operators["dense"]], blocks)
    single = DenseLinearOperator(operators["dense"].matrix.float(), shapes)
    with pytest.raises(ValueError, match=r"operator of layer net.4 must act on .*torch.float64"):
        block_diagonal([operators["dense"], operators["kronecker"], single], blocks)
