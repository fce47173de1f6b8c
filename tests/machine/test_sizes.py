"""Sizes of blocks by device."""

import torch

from pinncurv.machine import sizes_of


def test_an_accelerator_gets_larger_blocks():
    cpu, other = sizes_of(torch.device("cpu")), sizes_of(torch.device("meta"))
    for name in ("cache", "held", "tile", "panel"):
        assert getattr(other, name) > getattr(cpu, name)
