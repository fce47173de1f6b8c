"""How much to work on at a time: what fits the caches of a CPU, or the memory of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Sizes:
    """Sizes of blocks on one kind of device.

    Args:
        cache: Elements of a jet or another temporary that is written and read again at once. On a
            CPU it then stays in the cache, and its memory is recycled by the allocator instead of
            being mapped anew for every operation.
        held: Elements of what serves one large matrix product: rows of a Jacobian, columns of a
            sketch.
        tile: Rows of a square block that is updated elementwise many times.
        panel: Columns from which on products XᵀX are cut into panels, and most columns of a panel.
    """

    cache: int
    held: int
    tile: int
    panel: int


# Three tiles of float64 take 1.5 MB, and half a million elements 4 MB.
_CPU = Sizes(cache=1 << 19, held=1 << 22, tile=256, panel=128)
# Launches are what costs there: a block is a fraction of the memory, of at least these sizes.
_ACCELERATOR = Sizes(cache=1 << 23, held=1 << 25, tile=2048, panel=2048)
_FRACTION = 256  # of the memory, of which a pass holds some dozens of jets at a time


def sizes_of(device: torch.device) -> Sizes:
    """Return the sizes of blocks for a device."""
    if device.type == "cpu":
        return _CPU
    if device.type != "cuda" or not torch.cuda.is_available():
        return _ACCELERATOR
    return _of_cuda(device)


@lru_cache
def _of_cuda(device: torch.device) -> Sizes:
    elements = torch.cuda.get_device_properties(device).total_memory // 8 // _FRACTION
    least = _ACCELERATOR
    return Sizes(max(least.cache, elements), max(least.held, elements), least.tile, least.panel)
