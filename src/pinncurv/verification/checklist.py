"""Making checks, where nothing that a check runs into may end the verification."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from pinncurv.verification.report import Check, Report

T = TypeVar("T")
TOLERANCE = 1e-9
# Errors are relative to the largest entry, or to this number if that is smaller.
_SMALLEST_SCALE = 1e-3


class Checklist:
    """The checks made so far, and the subject that begins their names."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self._checks: list[Check] = []

    @property
    def report(self) -> Report:
        """The checks made so far."""
        return Report(tuple(self._checks))

    def compare(
        self,
        name: str,
        got: Tensor | Callable[[], Tensor],
        expected: Tensor | Callable[[], Tensor],
        tolerance: float = TOLERANCE,
    ) -> None:
        """Check that two tensors, or what is computed for them, agree.

        max |got - expected| <= tolerance · max |expected|

        What computing the first raises is a failure. If torch raises in what is computed for the
        second, by brute force, nothing is checked.
        """
        check = Check(f"{self.subject}: {name}", False, None, tolerance)
        try:
            tensor = (got if isinstance(got, Tensor) else got()).detach()
        except Exception as error:
            self.fail(name, error)
            return
        right = expected if isinstance(expected, Tensor) else self.by_brute_force(name, expected)
        if right is not None:
            self._checks.append(_compared(check, tensor, right.detach(), tolerance))

    def by_brute_force(self, name: str, make: Callable[[], T]) -> T | None:
        """Return what is right, or None and why there is none to be had: torch lacks much."""
        try:
            return make()
        except RuntimeError as error:  # also NotImplementedError
            self.skip(name, f"not checked: brute force raised {describe(error)}")
        except Exception as error:
            self.demand(name, f"brute force raised {describe(error)}")
        return None

    def attempt(self, name: str, make: Callable[[], T]) -> T | None:
        """Return what further checks need, or None after adding a failed check of this name."""
        try:
            return make()
        except Exception as error:
            self.fail(name, error)
            return None

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn what anything between two checks raises into a failure."""
        try:
            yield
        except Exception as error:
            self.fail("could be verified", error)

    def fail(self, name: str, error: Exception) -> None:
        """Note an exception as a failure."""
        self.demand(name, f"raised {describe(error)}")

    def demand(self, name: str, violation: str) -> bool:
        """Check that something holds; ``violation`` says what is wrong, or is empty."""
        self._checks.append(Check(f"{self.subject}: {name}", not violation, message=violation))
        return not violation

    def skip(self, name: str, why: str) -> None:
        """Note that something could not be checked."""
        self._checks.append(Check(f"{self.subject}: {name}", None, message=why))


def describe(error: Exception) -> str:
    """Return what an exception says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _compared(check: Check, got: Tensor, expected: Tensor, tolerance: float) -> Check:
    """Fill in error, outcome and explanation."""
    if got.shape != expected.shape:
        return replace(check, message=f"shape {list(got.shape)}, not {list(expected.shape)}")
    if not expected.numel():
        return replace(check, passed=True, error=0.0)
    right = expected.double()
    difference = got.to(right) - right
    scale = max(right.abs().max().item(), _SMALLEST_SCALE)
    error = difference.abs().max().item() / scale
    if error <= tolerance:  # not if it is NaN
        return replace(check, passed=True, error=error)
    return replace(check, error=error, message=_explain(got.to(right), right, difference))


def _explain(got: Tensor, expected: Tensor, difference: Tensor) -> str:
    """Say how two tensors disagree: by a constant factor, or where most."""
    if not bool(got.isfinite().all()):
        return f"{int((~got.isfinite()).sum())} of {got.numel()} entries are not finite"
    norm = torch.linalg.vector_norm(expected).item()
    if norm > 0:
        factor = float((got * expected).sum()) / norm**2
        rest = torch.linalg.vector_norm(got - factor * expected).item()
        if rest <= 1e-6 * norm:
            return f"it is {factor:.6g} times what is right"
    worst = int(difference.abs().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), expected.shape))
    values = f"{got.flatten()[worst].item():.6g}, not {expected.flatten()[worst].item():.6g}"
    return f"entry {index} is {values}" if index else f"it is {values}"
