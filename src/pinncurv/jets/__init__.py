"""Taylor-mode automatic differentiation through unmodified ``nn.Module``s.

``jet.py`` is the type and the registry of rules, ``layout.py`` says what its channels mean, and
``recording.py`` keeps the linear maps that a jet passes through. The rules stand in ``linear.py``,
``elementwise.py`` (the functions themselves in ``functions.py``), ``bilinear.py`` and
``structural.py``, by their algebraic kind.
"""

from pinncurv.jets import bilinear, functions, linear, structural
from pinncurv.jets.elementwise import register_elementwise
from pinncurv.jets.jet import Jet, lift, register_rule, seed
from pinncurv.jets.layout import Contraction, Layout
from pinncurv.jets.recording import LinearCall, Tape, record

__all__ = [
    "Contraction",
    "Jet",
    "Layout",
    "LinearCall",
    "Tape",
    "bilinear",
    "functions",
    "lift",
    "linear",
    "record",
    "register_elementwise",
    "register_rule",
    "seed",
    "structural",
]
