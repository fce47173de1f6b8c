"""Taylor-mode automatic differentiation through unmodified ``nn.Module``s.

``jet.py`` is the type and the registry of rules, ``layout.py`` says what its channels mean,
``derivative.py`` how they are asked for, and ``recording.py`` keeps what trainable tensors do. The
rules stand in ``linear.py``, ``elementwise.py`` (the functions themselves in ``functions.py``),
``bilinear.py`` and ``structural.py``, by their algebraic kind, and what is composed of them in
``composite.py``; ``nested.py`` differentiates inside
of a network.
"""

from pinncurv.jets import bilinear, composite, functions, linear, structural
from pinncurv.jets.derivative import Derivative
from pinncurv.jets.elementwise import register_elementwise
from pinncurv.jets.jet import Jet, lift, register_rule, seed, supported
from pinncurv.jets.layout import Contraction, Layout, merge
from pinncurv.jets.nested import derivative
from pinncurv.jets.recording import ConstantUse, LinearCall, Tape, for_every_point, record

__all__ = [
    "ConstantUse",
    "Contraction",
    "Derivative",
    "Jet",
    "Layout",
    "LinearCall",
    "Tape",
    "bilinear",
    "composite",
    "derivative",
    "for_every_point",
    "functions",
    "lift",
    "linear",
    "merge",
    "record",
    "register_elementwise",
    "register_rule",
    "seed",
    "structural",
    "supported",
]
