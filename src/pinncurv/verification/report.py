"""What was checked, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass


class VerificationError(AssertionError):
    """At least one check failed."""


@dataclass(frozen=True)
class Check:
    """One check.

    error <= tolerance

    Attributes:
        name: What was checked.
        passed: Whether it held; None if it could not be checked.
        error: The largest error, relative to the largest entry of what is right; None if nothing
            was compared.
        tolerance: The largest error that passes; None if nothing was compared.
        message: What disagrees, or why it could not be checked.
    """

    name: str
    passed: bool | None
    error: float | None = None
    tolerance: float | None = None
    message: str = ""

    def __str__(self) -> str:
        """Return one line, and one more for the message."""
        outcome = {True: "ok", False: "FAILED", None: "skipped"}[self.passed]
        error = "" if self.error is None else f"{self.error:.1e}"
        tolerance = "" if self.tolerance is None else f"<= {self.tolerance:.0e}"
        line = f"{outcome:8}{error:>8} {tolerance:9} {self.name}"
        return line + (f"\n{'':27}{self.message}" if self.message else "")


@dataclass(frozen=True)
class Report:
    """All checks of one verification; print it for a table.

    Attributes:
        checks: The checks, in the order in which they were made.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def raise_if_failed(self) -> Report:
        """Return the report if no check failed.

        Raises:
            VerificationError: If one did; lists all that did.
        """
        if self.failures:
            raise VerificationError(
                f"{len(self.failures)} of {len(self.checks)} checks failed:\n"
                + "\n".join(str(check) for check in self.failures)
            )
        return self

    def __add__(self, other: Report) -> Report:
        """Return the checks of both."""
        return Report(self.checks + other.checks)

    def __str__(self) -> str:
        """Return a table, one line per check."""
        count = len(self.failures)
        skipped = sum(check.passed is None for check in self.checks)
        passed = "all checks passed" + (f", but {skipped} skipped" if skipped else "")
        summary = f"{count} of {len(self.checks)} checks failed" if count else passed
        return "\n".join([*map(str, self.checks), summary])
