"""Curvature of physics-informed neural networks: Gauss-Newton, KFAC and relatives in PyTorch.

The names of an ordinary training stand here; the packages have the rest.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and editors; at run time see __getattr__
    from pinncurv import (
        comparison as comparison,
        curvature as curvature,
        diffops as diffops,
        jets as jets,
        linearization as linearization,
        linops as linops,
        machine as machine,
        optim as optim,
        presets as presets,
        problems as problems,
        verification as verification,
    )
    from pinncurv.comparison import compare as compare
    from pinncurv.curvature import (
        EKFAC as EKFAC,
        KFAC as KFAC,
        GaussNewton as GaussNewton,
        MatrixFreeGaussNewton as MatrixFreeGaussNewton,
        Objective as Objective,
        coverage as coverage,
    )
    from pinncurv.diffops import (
        Bilaplacian as Bilaplacian,
        Directional as Directional,
        Divergence as Divergence,
        Gradient as Gradient,
        Hessian as Hessian,
        Laplacian as Laplacian,
        Partial as Partial,
        RandomCoordinates as RandomCoordinates,
        RandomSigns as RandomSigns,
        SecondOrder as SecondOrder,
        Value as Value,
    )
    from pinncurv.jets import derivative as derivative
    from pinncurv.linearization import linearize as linearize
    from pinncurv.linops import Damped as Damped, FactorDamping as FactorDamping
    from pinncurv.optim import (
        CurvatureOptimizer as CurvatureOptimizer,
        FirstOrder as FirstOrder,
        HeldOut as HeldOut,
        QuadraticModel as QuadraticModel,
    )
    from pinncurv.problems import (
        L2 as L2,
        Box as Box,
        Energy as Energy,
        Fixed as Fixed,
        LossTerm as LossTerm,
        Problem as Problem,
        SpaceTimeBox as SpaceTimeBox,
    )
    from pinncurv.verification import verify as verify

__version__ = version("pinncurv")

_HOMES = {
    "comparison": "compare",
    "curvature": "EKFAC KFAC GaussNewton MatrixFreeGaussNewton Objective coverage",
    "diffops": (
        "Bilaplacian Directional Divergence Gradient Hessian Laplacian Partial RandomCoordinates "
        "RandomSigns SecondOrder Value"
    ),
    "jets": "derivative",
    "linearization": "linearize",
    "linops": "Damped FactorDamping",
    "optim": "CurvatureOptimizer FirstOrder HeldOut QuadraticModel",
    "problems": "Box Energy Fixed L2 LossTerm Problem SpaceTimeBox",
    "verification": "verify",
}
_MODULES = {name: home for home, names in _HOMES.items() for name in names.split()}
_PACKAGES = {*_HOMES, "machine", "presets"}


def __getattr__(name: str) -> Any:
    """Import a name when it is asked for, since importing all of torch takes seconds."""
    if name in _MODULES:
        return getattr(import_module(f"pinncurv.{_MODULES[name]}"), name)
    if name in _PACKAGES:
        return import_module(f"pinncurv.{name}")
    raise AttributeError(f"module 'pinncurv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*_MODULES, *_PACKAGES, "__version__"})
