"""Exceptions for what a user can mend. Every package may import them, except what is uploaded to the Hub."""


class UserError(ValueError):
    """A wrong value, option, file or layout, described in one sentence: what is wrong, where, and what to do.

    The command prints the sentence and exits with 1. OSError is treated alike: a missing file, a full disk. Any other
    exception that reaches the command is reported as a bug.
    """


class UsageError(UserError):
    """Options that don't go together. The command exits with 2, as for any other wrong usage."""
