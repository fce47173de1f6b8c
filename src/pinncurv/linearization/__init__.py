"""Linearization of loss terms: the blocks of the Jacobian, for linear layers and for all else.

A term is bound to a network and points (``bound.py``), where one dry run finds the structure of its
passes (``structure.py``). A pass is one forward pass that records what trained tensors do, and one
backward pass to what was recorded (``capture.py``), at a part of the points (``part.py``). Its
result is a chunk of blocks (``blocks.py``): Z and G of linear layers, rows of other parameters.
"""

from pinncurv.linearization.blocks import DenseRows, JacobianBlock, LinearLayer, squared_rows
from pinncurv.linearization.bound import BoundTerm, check_differentiable, trained_tensors
from pinncurv.linearization.chunk import Chunk
from pinncurv.linearization.fisher import Empirical, Fisher, ForwardOnly, Type2
from pinncurv.linearization.linearization import (
    Linearization,
    Visitor,
    linearize,
    run,
    visit_all,
)
from pinncurv.linearization.part import TermPart
from pinncurv.linearization.structure import UncapturedParameterError

__all__ = [
    "BoundTerm",
    "Chunk",
    "DenseRows",
    "Empirical",
    "Fisher",
    "ForwardOnly",
    "JacobianBlock",
    "LinearLayer",
    "Linearization",
    "TermPart",
    "Type2",
    "UncapturedParameterError",
    "Visitor",
    "check_differentiable",
    "linearize",
    "run",
    "squared_rows",
    "trained_tensors",
    "visit_all",
]
