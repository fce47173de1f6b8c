"""Blocks of all kinds in one list: a layer, a transposed one, a number and a tensor."""

import math

import pytest
import torch

from pinncurv.linops import (
    Damped,
    DenseBlockDiagonalLinearOperator,
    FactorDamping,
    block_diagonal,
    check_blocks,
    flat_positions,
    from_joint,
    restrict,
    same,
    to_joint,
    trace_norm,
)
from pinncurv.linops.kronecker_inverse import cg_inverse
from tests.conformance import check_operator, to_list
from tests.linops.cases import kronecker_oracle, mixed_kronecker, mixed_parameters, psd


@pytest.mark.parametrize("columns", [(), (1,), (4,), (0,)])
def test_round_trip(columns, generator):
    blocks, shapes = mixed_parameters()
    check_blocks(blocks, shapes)
    tensors = [torch.randn((*shape, *columns), generator=generator) for shape in shapes]
    joints = to_joint(tensors, blocks)
    assert [joint.shape for joint in joints] == [(*columns, *block.shape) for block in blocks]
    assert all(map(torch.equal, from_joint(joints, blocks), tensors))


def test_positions():
    blocks, shapes = mixed_parameters()
    _, transposed, slope, tensor = (p.tolist() for p in flat_positions(blocks, shapes))
    start = 1 + 3 + 12 + 6
    columns = [[start + o, start + 4 + o, start + 8 + o] for o in range(4)]
    assert transposed == [position for column in columns for position in column]
    assert slope == [0]
    assert tensor == list(range(4, 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_kronecker(T, dtype, generator):
    operator = mixed_kronecker(T, generator, dtype)
    check_operator(operator, kronecker_oracle(operator))


def test_conjugate_gradients(generator):
    operator = mixed_kronecker(2, generator)
    b = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    torch.testing.assert_close(cg_inverse(operator, 1e-2) @ b, operator.inverse(1e-2) @ b)


def test_dense_blocks_and_averages(generator):
    blocks, shapes = mixed_parameters()
    matrices = [psd(block.numel, generator) for block in blocks]
    operator = DenseBlockDiagonalLinearOperator(matrices, blocks, shapes)
    check_operator(operator)
    kronecker = mixed_kronecker(2, generator)
    halved = kronecker.with_tensors([M / 2 for M in kronecker.tensors()])
    torch.testing.assert_close(halved.to_dense(), kronecker.to_dense() / 4)


def test_restriction_and_mixture(generator):
    blocks, shapes = mixed_parameters()
    kronecker = mixed_kronecker(2, generator)
    dense = DenseBlockDiagonalLinearOperator(
        [psd(block.numel, generator) for block in blocks], blocks, shapes
    )
    for operator in (kronecker, dense, kronecker + dense):
        check_operator(restrict(operator, blocks[1:3]), dampings=(1e-3,), tolerance=1e-12)
    mixed = block_diagonal([kronecker, dense, kronecker, dense], blocks)
    expected = torch.zeros(mixed.shape, dtype=torch.float64)
    for i, position in enumerate(flat_positions(blocks, shapes)):
        expected[position[:, None], position] = (dense if i % 2 else kronecker).block_to_dense(i)
    check_operator(mixed, expected, dampings=(1e-3,), tolerance=1e-12)


@pytest.mark.parametrize("heuristic", [same, trace_norm])
@pytest.mark.parametrize("T", [1, 2, 3])
def test_factor_damping_is_exact_where_there_are_no_factors(T, heuristic, generator):
    operator, damping = mixed_kronecker(T, generator), 1e-3
    check_operator(inverse := FactorDamping(damping, heuristic)(operator), dampings=())
    exact = Damped(damping)(operator).to_dense()
    for position in flat_positions(operator.blocks, operator.shapes)[2:]:
        torch.testing.assert_close(
            inverse.to_dense()[position[:, None], position], exact[position[:, None], position]
        )


def test_factor_damping_of_a_singular_block(generator):
    """Where Cholesky fails the eigenvalues are bounded by the damping, not by a guess."""
    operator = mixed_kronecker(2, generator)
    T = len(operator.terms)
    kept = 2 * T * 2  # tensors of the two layers; after those A and B = 1 of each other parameter
    zero = operator.with_tensors(
        [M if i < kept or i % 2 else 0 * M for i, M in enumerate(operator.tensors())]
    )
    b = torch.ones(operator.shape[0], dtype=torch.float64)
    slope, _, tensor, *_ = to_list(FactorDamping(1e-15)(zero) @ b, zero)
    assert math.isclose(slope.item(), 1e15, rel_tol=1e-12)
    torch.testing.assert_close(tensor, torch.full_like(tensor, 1e15))
