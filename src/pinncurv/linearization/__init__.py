"""Linearization of one loss term: inputs Z and output gradients G of every linear layer.

``blocks.py`` cuts the points, ``capture.py`` runs the two passes, ``layers.py`` is what they leave,
``fisher.py`` are the choices of G, and ``linearization.py`` puts them together for all points or
chunk by chunk.
"""

from pinncurv.linearization.blocks import TermBlock, points_per_block
from pinncurv.linearization.capture import (
    UncapturedParameterError,
    check_differentiable,
    trainable_parameters,
)
from pinncurv.linearization.fisher import Empirical, Fisher, ForwardOnly, Type2
from pinncurv.linearization.layers import Chunk, LayerLinearization
from pinncurv.linearization.linearization import (
    Linearization,
    check_compatible,
    check_finite_parameters,
    linearize,
)

__all__ = [
    "Chunk",
    "Empirical",
    "Fisher",
    "ForwardOnly",
    "LayerLinearization",
    "Linearization",
    "TermBlock",
    "Type2",
    "UncapturedParameterError",
    "check_compatible",
    "check_differentiable",
    "check_finite_parameters",
    "linearize",
    "points_per_block",
    "trainable_parameters",
]
