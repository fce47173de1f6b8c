"""The error that is shown to the user as one line."""


class UserError(Exception):
    """A request that cannot be met; the message says why and what to do."""


def first_line(error: BaseException | str) -> str:
    """Return what an error or a warning says first; torch adds a trace of C++ to some."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
