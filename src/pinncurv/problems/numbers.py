"""Checks of the numbers that problems are made of."""

import math


def check_positive(what: str, number: float) -> None:
    """Check a number of which 0 < number < ∞ must hold.

    Raises:
        ValueError: If it does not.
    """
    if not 0 < number < math.inf:
        raise ValueError(
            f"The {what} must be positive and finite, got {number}. Pass a number such as 0.1."
        )


def check_finite(what: str, number: float) -> None:
    """Check a number that must be finite.

    Raises:
        ValueError: If it is not.
    """
    if not math.isfinite(number):
        raise ValueError(f"The {what} must be finite, got {number}. Pass a number such as 0.1.")
