"""Checks of a user's own network, PDE, activation and curvature against brute force.

    report = verify(model, terms, points, curvature=my_recipe)
    print(report)  # a table, one line per check
    report.raise_if_failed()

``verify`` checks all of a training problem; ``verify_network``, ``verify_term``,
``verify_activation``, ``verify_operator`` and ``verify_curvature`` check one part. Each works on a
copy in float64 at a few points, returns a ``Report``, and never raises: what goes wrong is a check
that failed, with the message. Keep the network small, since the right answers come from nested
``torch.func`` transformations, point by point (``brute_force.py``).

``report.py`` and ``checklist.py`` hold the results.
"""

from pinncurv.verification.activation import verify_activation as verify_activation
from pinncurv.verification.brute_force import gauss_newton as gauss_newton, hessian as hessian
from pinncurv.verification.curvature import verify_curvature as verify_curvature
from pinncurv.verification.operator import verify_operator as verify_operator
from pinncurv.verification.problem import verify as verify
from pinncurv.verification.report import (
    Check as Check,
    Report as Report,
    VerificationError as VerificationError,
)
from pinncurv.verification.term import verify_network as verify_network, verify_term as verify_term
