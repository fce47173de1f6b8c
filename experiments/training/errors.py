"""The error that is shown to the user as one line."""


class UserError(Exception):
    """A request that cannot be met; the message says why and what to do."""
