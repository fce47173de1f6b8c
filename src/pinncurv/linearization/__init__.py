"""Linearization of loss terms: the blocks of the Jacobian, for linear layers and for all else.

A term is bound to a network and points (``bound.py``), where one dry run finds the structure of its
passes (``structure.py``). A pass is one forward pass that records what trained tensors do, and one
backward pass to what was recorded (``capture.py``), at a part of the points (``part.py``). Its
result is a chunk of blocks (``blocks.py``): Z and G of linear layers, rows of other parameters.
"""

from pinncurv.linearization.blocks import (
    DenseRows as DenseRows,
    JacobianBlock as JacobianBlock,
    LinearLayer as LinearLayer,
)
from pinncurv.linearization.bound import (
    BoundTerm as BoundTerm,
    check_differentiable as check_differentiable,
    network_state as network_state,
    plain_network as plain_network,
    trained_tensors as trained_tensors,
)
from pinncurv.linearization.chunk import Chunk as Chunk
from pinncurv.linearization.entries import EntryRows as EntryRows, of_layer as of_layer
from pinncurv.linearization.fisher import (
    Empirical as Empirical,
    Fisher as Fisher,
    ForwardOnly as ForwardOnly,
    Type2 as Type2,
)
from pinncurv.linearization.footprint import fitting_chunk_size as fitting_chunk_size
from pinncurv.linearization.linearization import (
    Linearization as Linearization,
    Visitor as Visitor,
    bind as bind,
    linearize as linearize,
    linearize_some as linearize_some,
    run as run,
    visit_all as visit_all,
)
from pinncurv.linearization.part import TermPart as TermPart
from pinncurv.linearization.structure import UncapturedParameterError as UncapturedParameterError
