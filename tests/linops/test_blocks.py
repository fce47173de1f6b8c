"""Layers as blocks."""

import pytest
import torch

from pinncurv.linops import Block, check_blocks, flat_positions, from_joint, to_joint
from tests.linops.cases import STRUCTURES, layers


@pytest.mark.parametrize("columns", [(), (1,), (4,), (0,)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_round_trip(structure, columns, generator):
    blocks, shapes = layers(*structure)
    tensors = [torch.randn(*shape, *columns, generator=generator) for shape in shapes]
    joints = to_joint(tensors, blocks)
    assert [joint.shape for joint in joints] == [(*columns, *block.shape) for block in blocks]
    assert all(map(torch.equal, from_joint(joints, blocks), tensors))


def test_order_of_positions():
    blocks = [Block("last", 3, 0, 1, 2), Block("first", 1, 2, 2, 2)]
    shapes = [(1,), (2, 2), (2,), (1, 2)]
    check_blocks(blocks, shapes)
    last, first = flat_positions(blocks, shapes)
    assert last.tolist() == [7, 8, 0]
    assert first.tolist() == [1, 2, 5, 3, 4, 6]


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Block("a", 0, None, 3, 2)], r"parameters \[1\] belong to none"),
        ([Block("a", 0, 1, 2, 3)], r"Parameter 0 of layer a must have shape \(2, 3\), got"),
        ([Block("a", 0, 2, 3, 2)], r"layer a must have shape \(3,\), got only 2 param"),
        ([Block("a", 0, 0, 3, 2)], r"Weight and bias of layer a must be different"),
        (
            [Block("a", 0, 1, 3, 2), Block("b", 0, None, 3, 2)],
            r"parameter 0 belongs to a and b",
        ),
    ],
)
def test_blocks_must_partition_the_parameters(blocks, message):
    with pytest.raises(ValueError, match=message):
        check_blocks(blocks, [(3, 2), (3,)])
