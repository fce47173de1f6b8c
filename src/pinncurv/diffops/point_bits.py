"""Random bits that are a function of a point and a seed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014), in signed integers that wrap around on every device
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def point_bits(x: Float[Tensor, "N d"], seed: int, count: int) -> Int[Tensor, "N {count}"]:
    """Return 64 random bits, ``count`` times for every point.

    They depend on the point and the seed, not on the other points: they are the same in any chunk
    and order, on any device, and in any precision, since points are compared in single precision.

    Args:
        x: The points.
        seed: Of 64 bits.
        count: How many words for each point.
    """
    single = x.detach().to(torch.float32) + 0.0  # makes -0.0 and 0.0 the same point
    words = single.contiguous().view(torch.int32).to(torch.int64)
    start = _mixed(torch.tensor(seed, device=x.device))
    of_point = _mixed(_mixed(words + start + _multiples(x.shape[1], x)).sum(1, keepdim=True))
    return _mixed(of_point + _multiples(count, x))


def _multiples(count: int, x: Tensor) -> Tensor:
    return torch.arange(1, count + 1, device=x.device) * _STEP


def _mixed(words: Tensor) -> Tensor:
    words = (words ^ _shifted(words, 30)) * _FIRST
    words = (words ^ _shifted(words, 27)) * _SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    """Shift to the right and fill with zeros, where torch fills with the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
