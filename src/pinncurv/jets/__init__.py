"""Taylor-mode automatic differentiation through unmodified ``nn.Module``s.

``jet.py`` is the type and the registry of rules, ``layout.py`` says what its channels mean,
``requests.py`` how they are asked for, and ``recording.py`` keeps what trainable tensors do. The
rules stand in ``linear.py``, ``elementwise.py`` (the functions themselves in ``functions.py``),
``bilinear.py`` and ``structural.py``, by their algebraic kind, and what is composed of them in
``composite.py``; ``nested.py`` differentiates inside of a network, and ``network.py`` checks that
a network does on jets what it does on tensors.
"""

from pinncurv.jets import (
    bilinear as bilinear,
    composite as composite,
    functions as functions,
    linear as linear,
    structural as structural,
)
from pinncurv.jets.elementwise import register_elementwise as register_elementwise
from pinncurv.jets.jet import (
    Jet as Jet,
    dispatched as dispatched,
    lift as lift,
    register_rule as register_rule,
    seed as seed,
    supported as supported,
)
from pinncurv.jets.layout import Contraction as Contraction, Layout as Layout, merge as merge
from pinncurv.jets.nested import derivative as derivative
from pinncurv.jets.network import (
    agree as agree,
    check_hooks as check_hooks,
    check_network as check_network,
    check_output as check_output,
    has_hooks as has_hooks,
    outputs as outputs,
)
from pinncurv.jets.recording import (
    ConstantUse as ConstantUse,
    LinearCall as LinearCall,
    Tape as Tape,
    for_every_point as for_every_point,
    record as record,
)
from pinncurv.jets.requests import Derivative as Derivative
